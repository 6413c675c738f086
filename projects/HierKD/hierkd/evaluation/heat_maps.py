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
from torch import Tensor

__all__ = ["HeatMap", "overlay_heat_map", "sample_score_map", "score_heat_maps"]

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
    """Compute the heat maps of some classes for one picture, under the current vocabulary.

    Args:
        model: A :class:`hierkd.modeling.detector.HierKD` in eval mode.
        batched_input: One of the model's inputs, with ``image`` (3, h, w).
        class_names: Which classes of the model's vocabulary.

    Returns:
        A list per class of one :class:`HeatMap` per level, finest first.

    Raises:
        ValueError: A class is not in the model's vocabulary.
    """
    vocabulary = list(model.vocabulary_names)
    unknown = [name for name in class_names if name not in vocabulary]
    if unknown:
        raise ValueError(f"classes {unknown} are not in the vocabulary {vocabulary}")
    size = (batched_input["image"].shape[1], batched_input["image"].shape[2])
    shapes = model.backbone.output_shape()
    levels = [(name, shapes[name].stride) for name in model.head_in_features]
    offset = model.anchor_generator.offset
    classes = [vocabulary.index(name) for name in class_names]
    maps: list[Tensor] = [m[0].float().cpu() for m in model.score_maps([batched_input], classes)]
    return [
        [
            HeatMap(
                name,
                level,
                stride,
                sample_score_map(scores[index].numpy(), stride, offset, size),
            )
            for (level, stride), scores in zip(levels, maps, strict=True)
        ]
        for index, name in enumerate(class_names)
    ]


def sample_score_map(scores: Map, stride: int, offset: float, size: tuple[int, int]) -> Map:
    """Interpolate a level's scores bilinearly at the pixels of the network input.

    Args:
        scores: (H_l, W_l); point (y, x) lies at pixel ((x + offset) stride, (y + offset) stride).
        stride: Pixels between two points.
        offset: Offset of the points in strides, the anchor generator's (0 in ATSS).
        size: (h, w) of the input without the batch's padding, in pixels.

    Returns:
        (h, w) scores; outside the outermost points, the nearest one's.
    """
    ys, xs = np.meshgrid(*(np.arange(n, dtype=np.float32) for n in size), indexing="ij")
    sampled = cv2.remap(
        np.ascontiguousarray(scores, dtype=np.float32),
        xs / stride - offset,
        ys / stride - offset,
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REPLICATE,
    )
    return np.asarray(sampled, np.float32)


def overlay_heat_map(image: Image, scores: Map, max_score: float) -> Image:
    """Lay a heat map over a picture: the higher the score, the brighter and the more opaque.

    Args:
        image: (H, W, 3), RGB, 0..255.
        scores: (h, w) scores of the same view in any resolution.
        max_score: Score at the bright end of the colours. Give all maps that are compared the same.

    Returns:
        RGB picture of ``image``'s size.

    Raises:
        ValueError: ``max_score`` is not positive.
    """
    if max_score <= 0:
        raise ValueError(f"max_score must be positive, got {max_score}")
    height, width = image.shape[:2]
    resized = cv2.resize(scores, (width, height), interpolation=cv2.INTER_LINEAR)
    level = np.clip(resized / max_score, 0.0, 1.0)
    heat = matplotlib.colormaps[_COLORMAP](level)[..., :3] * 255.0
    # A grey picture beneath keeps its own colours from being read as scores.
    grey = image.astype(np.float64).mean(axis=2, keepdims=True).repeat(3, axis=2)
    opacity = (0.35 + (_MAX_OPACITY - 0.35) * level)[..., None]
    return np.asarray(np.rint(opacity * heat + (1 - opacity) * grey), np.uint8)
