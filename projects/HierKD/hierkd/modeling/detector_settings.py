"""The numbers of the detector's losses, of instance-level distillation and of inference.

Each is a key of the same name in ``config.py``, which says what it means and where it comes from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, TypeVar

__all__ = ["IKD", "DetectionSettings", "InferenceSettings", "check_choice", "read_settings"]

Settings = TypeVar("Settings")


def check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError, naming the key, unless its value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{key} must be one of {choices}, got {value!r}")


def read_settings(kind: type[Settings], node: Any) -> Settings:
    """Make settings of the keys of a config node that have their fields' names."""
    return kind(**{each.name: node[each.name.upper()] for each in fields(kind)})  # type: ignore[arg-type]


@dataclass(frozen=True)
class DetectionSettings:
    """Numbers of the §3.1 losses."""

    quality: str = "iou"
    focal_gamma: float = 2.0
    focal_alpha: float = 0.25
    cls_loss_weight: float = 1.0
    learn_cls_loss_weight: bool = True
    box_reg_loss_weight: float = 2.0
    quality_loss_weight: float = 1.0
    negative_sampling: str = "fraction"
    negative_amount: float = 0.1
    negative_scope: str = "batch"
    ignore_padding: bool = False

    def __post_init__(self) -> None:
        check_choice("MODEL.ATSS.NEGATIVE_SCOPE", self.negative_scope, ("batch", "level"))
        check_choice("MODEL.ATSS.QUALITY", self.quality, ("iou", "centerness", "none"))


@dataclass(frozen=True)
class IKD:
    """Numbers of instance-level distillation (§3.2)."""

    loss_weight: float = 1.0
    loss_type: str = "l1"
    boxes: str = "predicted"
    crop_scale: float = 1.5
    iou_thresh: float = 0.5
    max_crops_per_image: int = 0
    average_over: str = "points"
    proposals_per_image: int = 0
    proposals_start: int = 0

    def __post_init__(self) -> None:
        check_choice("MODEL.IKD.LOSS_TYPE", self.loss_type, ("l1", "l2", "kl"))
        check_choice("MODEL.IKD.BOXES", self.boxes, ("predicted", "gt"))
        check_choice("MODEL.IKD.AVERAGE_OVER", self.average_over, ("points", "levels"))


@dataclass(frozen=True)
class InferenceSettings:
    """Numbers of inference; see the ``*_TEST`` keys of ``MODEL.ATSS``."""

    score_thresh: float = 0.0
    topk_anchors: int = 1000
    topk_pairs: int = 3000
    nms_thresh: float = 0.4
    max_detections: int = 100
    novel_logit_shift: float = 0.0
    teacher_boxes: int = 0
    teacher_exponents: tuple[float, float] = (0.35, 0.65)
    teacher_crop_scale: float = 1.5

    def __post_init__(self) -> None:
        if not all(0 <= each <= 1 for each in self.teacher_exponents):
            raise ValueError(
                f"TEST.TEACHER.EXPONENTS must be in [0, 1], got {self.teacher_exponents}"
            )
        if not math.isfinite(self.novel_logit_shift):
            raise ValueError(
                f"MODEL.ATSS.NOVEL_LOGIT_SHIFT must be finite, got {self.novel_logit_shift}"
            )
