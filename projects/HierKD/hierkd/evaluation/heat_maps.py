"""Score heat maps over a picture, per level and class (in the manner of the paper's Fig. 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["HeatMap", "overlay_heat_map", "score_heat_maps"]

Image = NDArray[np.uint8]
Map = NDArray[np.float32]

_COLORMAP = "inferno"  # dark to bright at even steps, also in grey and for the colour-blind [ours]
_MAX_OPACITY = 0.8


@dataclass(frozen=True)
class HeatMap:
    """Scores of one class at one level, sampled at every pixel of the network input.

    Attributes:
        class_name: The class.
        level: Name of the feature level, "p3" and so on.
        stride: Pixels of the network input between two points of the level.
        scores: (h, w), class probability times predicted IoU, 0..1.
    """

    class_name: str
    level: str
    stride: int
    scores: Map


@torch.no_grad()
def score_heat_maps(
    model: Any, batched_input: dict[str, Any], class_names: Sequence[str]
) -> list[list[HeatMap]]:
    """Compute the heat maps of some classes of a model's vocabulary for one picture.

    Args:
        model: A :class:`hierkd.modeling.detector.HierKD` in eval mode.
        batched_input: One of the model's inputs, with ``image`` (3, h, w).
        class_names: Which classes.

    Returns:
        A list per class of one :class:`HeatMap` per level, finest first.
    """
    shapes, offset = model.backbone.output_shape(), model.anchor_generator.offset
    height, width = batched_input["image"].shape[1:]
    grid = np.mgrid[:height, :width].astype(np.float32)
    classes = [model.vocabulary_names.index(name) for name in class_names]
    by_class: list[list[HeatMap]] = [[] for _ in class_names]
    score_maps = model.score_maps([batched_input], classes)
    for level, maps in zip(model.head_in_features, score_maps, strict=True):
        stride = shapes[level].stride
        ys, xs = grid / stride - offset  # a point (y, x) lies at pixel ((x + offset) stride, ...)
        for name, scores, found in zip(
            class_names, maps[0].float().cpu().contiguous().numpy(), by_class, strict=True
        ):
            # Outside the outermost points, the nearest one's.
            sampled = cv2.remap(scores, xs, ys, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
            found.append(HeatMap(name, level, stride, np.asarray(sampled, np.float32)))
    return by_class


def overlay_heat_map(image: Image, scores: Map, max_score: float) -> Image:
    """Lay a heat map over a picture: the higher the score, the brighter and the more opaque.

    Args:
        image: (H, W, 3), RGB, 0..255.
        scores: (h, w) scores of the same view in any resolution.
        max_score: Score at the bright end of the colours. Give all maps that are compared the same.

    Returns:
        RGB picture of ``image``'s size.
    """
    height, width = image.shape[:2]
    resized = cv2.resize(scores, (width, height), interpolation=cv2.INTER_LINEAR)
    level = np.clip(resized / max_score, 0.0, 1.0)
    heat = matplotlib.colormaps[_COLORMAP](level)[..., :3] * 255.0
    # A grey picture beneath keeps its own colours from being read as scores.
    grey = image.astype(np.float64).mean(axis=2, keepdims=True).repeat(3, axis=2)
    opacity = (0.35 + (_MAX_OPACITY - 0.35) * level)[..., None]
    return np.asarray(np.rint(opacity * heat + (1 - opacity) * grey), np.uint8)
