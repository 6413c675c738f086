"""Boxes with readable labels on pictures of any size; sheets of several pictures with titles.

Pillow draws. detectron2's Visualizer takes some thirty times as long, more than the detector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import cv2
import numpy as np
from detectron2.structures import Instances
from detectron2.utils.colormap import colormap
from matplotlib.font_manager import FontProperties, findfont
from numpy.typing import ArrayLike, NDArray
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

from hierkd.files import replacing

__all__ = [
    "Color",
    "Image",
    "SheetRow",
    "class_color",
    "draw_boxes",
    "draw_instances",
    "draw_sheet",
    "enlarge",
    "fit",
    "save_picture",
]

Image = NDArray[np.uint8]
Color = tuple[float, float, float]

# Below this a label of a small picture is unreadable. [ours]
_MIN_LONG_SIDE_PX = 640
# Labels on photographs: this many of their heights make up the picture's (mean) side. [ours]
_LABELS_PER_SIDE = 45
_LINES_PER_SIDE = 180  # likewise, of the lines' widths; at least 3 px. [ours]
_REFERENCE_PX = 20  # advance widths grow with the size of a font


def enlarge(image: Image, min_long_side: int = _MIN_LONG_SIDE_PX) -> tuple[Image, float]:
    """Bring the longer side of an (H, W, 3) picture to at least this; and its growth."""
    if max(image.shape[:2]) >= min_long_side:
        return image, 1.0
    return fit(image, min_long_side)


def fit(image: Image, side: int) -> tuple[Image, float]:
    """Bring the longer side of an (H, W, 3) picture to ``side`` pixels; and its growth."""
    height, width = image.shape[:2]
    factor = side / max(height, width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    method = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
    resized = cv2.resize(np.ascontiguousarray(image), size, interpolation=method)
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
        image: (H, W, 3), RGB, 0..255; enlarged to ``min_long_side`` before drawing, if smaller.
        boxes: (M, 4) XYXY in pixels of ``image``.
        labels: M texts; "" draws the box alone.
        colors: M RGB colours, 0..1.
        min_long_side: In pixels.
        font_px: Height of the labels in the drawn picture; by default it grows with it.
    """
    canvas, factor = enlarge(image, min_long_side)
    height, width = canvas.shape[:2]
    side = (height * width) ** 0.5
    font_px = font_px or side / _LABELS_PER_SIDE
    label_px = 1.4 * font_px  # with its ground
    picture = PILImage.fromarray(np.ascontiguousarray(canvas))
    draw = ImageDraw.Draw(picture, "RGBA")  # blends
    line = max(3, round(side / _LINES_PER_SIDE))
    scaled = np.asarray(boxes, dtype=np.float64).reshape(-1, 4) * factor
    for box, color in zip(scaled.round().astype(int), colors, strict=True):
        around = [*(box[:2] - line // 2), *(box[2:] + line // 2)]
        draw.rectangle(around, outline=_rgb(color), width=line)
    font = _font(max(1, round(font_px)))
    places = _place_labels(scaled, labels, font_px, label_px, (height, width))
    for (x, y), label, color in zip(places, labels, colors, strict=True):
        if label:
            ground = (x, y, x + font.getlength(label) + 2, y + label_px)
            draw.rectangle(ground, fill=(0, 0, 0, 204))
            pale = _rgb([(1 + channel) / 2 for channel in color])
            draw.text((x + 1, y + label_px / 2), label, fill=pale, font=font, anchor="lm")
    return np.array(picture, np.uint8)


def _rgb(color: Sequence[float]) -> tuple[int, ...]:
    """A colour as Pillow takes it, 0..255."""
    return tuple(round(255 * channel) for channel in color)


def _place_labels(
    boxes: NDArray[np.float64],
    labels: Sequence[str],
    font_px: float,
    label_px: float,
    size: tuple[int, int],
) -> list[tuple[float, float]]:
    """Choose M upper left corners (x, y) of labels: inside the picture, least on other labels.

    The last label, which is drawn on top, chooses first. It prefers the place above its box, then
    the ones below and inside, towards the middle of the picture; then further down the box.
    """
    height, width = size
    taken: list[tuple[float, float, float, float]] = []
    places = []
    for (x0, y0, x1, y1), label in zip(boxes[::-1], labels[::-1], strict=True):
        label_width = _font(_REFERENCE_PX).getlength(label) * font_px / _REFERENCE_PX + 2
        sides = [x1 - label_width, x0] if x0 + x1 > width else [x0, x1 - label_width]
        rows = [y0 - label_px] if y0 >= label_px else []
        rows += [y0] if y1 + label_px > height else [y1, y0]
        rows += [y0 + step * label_px for step in range(1, 8)]
        candidates = []
        for y in rows:
            for x in sides:
                left = min(max(x, 0.0), max(width - label_width, 0.0))
                top = min(max(y, 0.0), max(height - label_px, 0.0))
                candidates.append((left, top, left + label_width, top + label_px))
        best = min(candidates, key=lambda place: sum(_overlap(place, t) for t in taken))
        places.append((best[0], best[1]))
        taken += [best] if label else []
    return places[::-1]


def _overlap(
    one: tuple[float, float, float, float], other: tuple[float, float, float, float]
) -> float:
    """Area that two XYXY rectangles share."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0.0) * max(height, 0.0)


@cache
def _font(size_px: int, weight: str = "normal") -> ImageFont.FreeTypeFont:
    """The font that matplotlib writes in."""
    return ImageFont.truetype(findfont(FontProperties(family="sans-serif", weight=weight)), size_px)


@dataclass(frozen=True)
class SheetRow:
    """A row of a sheet: RGB pictures, a title ("": none) above each, and a line between them."""

    panels: Sequence[Image]
    titles: Sequence[str]
    caption: str = ""


def draw_sheet(
    rows: Sequence[SheetRow],
    *,
    panel_px: int,
    legend: Sequence[tuple[Image, str]] = (),
    title_px: int = 24,
) -> Image:
    """Arrange pictures in rows and columns with titles, captions and a legend below, on white.

    Args:
        rows: From top to bottom; their columns line up.
        panel_px: Width of a column; no panel is wider.
        legend: Swatches (H, W, 3), RGB, no higher than two lines, and their meaning.
        title_px: Height of titles; all become smaller together where one is too long.
    """
    gap, line = round(0.6 * title_px), round(1.5 * title_px)
    width = max(len(row.panels) for row in rows) * (panel_px + gap) + gap
    heights = [
        line * (bool(row.caption) + any(row.titles)) + max(p.shape[0] for p in row.panels) + gap
        for row in rows
    ]
    sheet = PILImage.new("RGB", (width, gap + sum(heights) + 2 * line * bool(legend)), "white")
    draw = ImageDraw.Draw(sheet)
    titles_font = _fitting_font([t for row in rows for t in row.titles], panel_px, title_px, "bold")
    top = gap
    for row, height in zip(rows, heights, strict=True):
        y = top + line * any(row.titles)
        caption_font = _fitting_font([row.caption], width - 2 * gap, round(0.8 * title_px))
        draw.text((gap, y), row.caption, fill="#56606b", font=caption_font)
        for column, (panel, title) in enumerate(zip(row.panels, row.titles, strict=True)):
            x = gap + column * (panel_px + gap)
            draw.text((x, top), title, fill="#1b1f24", font=titles_font)
            place = (x, y + line * bool(row.caption))
            sheet.paste(PILImage.fromarray(np.ascontiguousarray(panel)), place)
        top += height
    x, font = gap, _fitting_font(["".join(t for _, t in legend)], width, round(0.8 * title_px))
    for swatch, text in legend:
        sheet.paste(PILImage.fromarray(np.ascontiguousarray(swatch)), (x, top))
        x += swatch.shape[1] + gap // 2
        draw.text((x, top), text, fill="#1b1f24", font=font)
        x += round(font.getlength(text)) + 2 * gap
    return np.array(sheet, np.uint8)


def _fitting_font(
    texts: Sequence[str], max_width: float, size_px: int, weight: str = "normal"
) -> ImageFont.FreeTypeFont:
    """The font of ``size_px``, or the largest smaller one in which each of the lines fits."""
    longest = max(_font(size_px, weight).getlength(text) for text in texts)
    return _font(max(1, int(size_px * min(1.0, max_width / max(longest, 1.0)))), weight)


def save_picture(path: Path, image: Image) -> None:
    """Write an RGB picture as PNG or, by its suffix, as JPEG, whole or not at all."""
    kind = "JPEG" if path.suffix.lower() in (".jpg", ".jpeg") else "PNG"
    with replacing(path) as making, making.open("wb") as file:
        PILImage.fromarray(image).save(file, format=kind, quality=90)


def draw_instances(
    image: Image,
    instances: Instances,
    vocabulary: Sequence[str],
    *,
    min_long_side: int = _MIN_LONG_SIDE_PX,
    font_px: float | None = None,
) -> Image:
    """Draw detections with names and scores in percent, a colour per class, the best on top.

    Args:
        image: (H, W, 3), RGB, 0..255.
        instances: ``pred_boxes`` in pixels of ``image``, ``scores``, ``pred_classes``.
        vocabulary: Names that ``pred_classes`` index.
        min_long_side: As for :func:`draw_boxes`, like ``font_px``.
        font_px: Likewise.
    """
    instances = instances[instances.scores.argsort(stable=True)]
    classes = instances.pred_classes.tolist()
    scores = instances.scores.tolist()
    return draw_boxes(
        image,
        instances.pred_boxes.tensor.numpy(),
        [f"{vocabulary[k]} {score:.0%}" for k, score in zip(classes, scores, strict=True)],
        [class_color(k) for k in classes],
        min_long_side=min_long_side,
        font_px=font_px,
    )
