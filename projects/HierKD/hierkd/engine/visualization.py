"""Boxes with readable labels on pictures of any size, drawn by detectron2's Visualizer."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from detectron2.structures import Instances
from detectron2.utils.colormap import colormap
from detectron2.utils.visualizer import Visualizer
from numpy.typing import ArrayLike, NDArray

__all__ = ["class_color", "draw_boxes", "draw_instances", "enlarge"]

Image = NDArray[np.uint8]
Color = tuple[float, float, float]

# Below this a label of a small picture is unreadable. [ours]
_MIN_LONG_SIDE_PX = 640
# Labels on photographs: this many of their heights make up the picture's (mean) side. [ours]
_LABELS_PER_SIDE = 45
_POINTS_PER_PX = 0.72  # the Visualizer draws at 100 dots per inch


def enlarge(image: Image, min_long_side: int = _MIN_LONG_SIDE_PX) -> tuple[Image, float]:
    """Enlarge a small picture; a larger one is returned as it is.

    Args:
        image: (H, W, 3).
        min_long_side: Wanted length of the longer side, in pixels.

    Returns:
        The picture and the factor its sides grew by.
    """
    factor = min_long_side / max(image.shape[:2])
    if factor <= 1:
        return image, 1.0
    size = (round(image.shape[1] * factor), round(image.shape[0] * factor))
    resized = cv2.resize(np.ascontiguousarray(image), size, interpolation=cv2.INTER_CUBIC)
    return np.asarray(resized, np.uint8), factor


def class_color(index: int) -> Color:
    """Return the colour (RGB, 0..1) of a class: always the same for the same index."""
    table = colormap(rgb=True, maximum=1)
    red, green, blue = table[index % len(table)]
    return float(red), float(green), float(blue)


def draw_boxes(
    image: Image,
    boxes: ArrayLike,
    labels: Sequence[str],
    colors: Sequence[Color],
    *,
    min_long_side: int = _MIN_LONG_SIDE_PX,
    font_px: float | None = None,
) -> Image:
    """Draw labelled boxes, the first ones lowest, with all labels above all boxes.

    Args:
        image: (H, W, 3), RGB, 0..255.
        boxes: (M, 4) XYXY in pixels of ``image``.
        labels: M texts; "" draws the box alone.
        colors: M RGB colours, 0..1.
        min_long_side: The picture is enlarged to this before drawing, if it is smaller.
        font_px: Height of the labels, in pixels of the drawn picture; by default it grows with it.

    Returns:
        RGB picture of the enlarged size.
    """
    canvas, factor = enlarge(image, min_long_side)
    height, width = canvas.shape[:2]
    font_px = font_px or (height * width) ** 0.5 / _LABELS_PER_SIDE
    label_px = 1.4 * font_px  # with its ground
    visualizer = Visualizer(canvas)
    scaled = np.asarray(boxes, dtype=np.float64).reshape(-1, 4) * factor
    for box, color in zip(scaled, colors, strict=True):
        visualizer.draw_box(box, alpha=1.0, edge_color=color)
    for (x0, y0, x1, _), label, color in zip(scaled, labels, colors, strict=True):
        # Above the box where there is room, and towards the middle: no label leaves the picture.
        to_the_left = x0 + x1 > width
        top = y0 - label_px if y0 >= label_px else min(max(y0, 0), height - label_px)
        visualizer.draw_text(
            label,
            (min(x1, width) if to_the_left else max(x0, 0), top),
            font_size=font_px * _POINTS_PER_PX,
            color=tuple((1 + channel) / 2 for channel in color),  # on a dark ground
            horizontal_alignment="right" if to_the_left else "left",
        )
    return np.asarray(visualizer.output.get_image(), np.uint8)


def draw_instances(image: Image, instances: Instances, vocabulary: Sequence[str]) -> Image:
    """Draw detections with class names and scores in percent, one colour per class.

    Args:
        image: (H, W, 3), RGB, 0..255.
        instances: ``pred_boxes`` in pixels of ``image``, ``scores``, ``pred_classes``.
        vocabulary: Names that ``pred_classes`` index.

    Returns:
        RGB picture, enlarged if ``image`` is small.
    """
    classes = instances.pred_classes.tolist()
    scores = instances.scores.tolist()
    return draw_boxes(
        image,
        instances.pred_boxes.tensor.numpy(),
        [f"{vocabulary[k]} {score:.0%}" for k, score in zip(classes, scores, strict=True)],
        [class_color(k) for k in classes],
    )
