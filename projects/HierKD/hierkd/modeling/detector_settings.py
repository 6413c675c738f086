"""The numbers of the detector's losses, of instance-level distillation and of inference.

Each is a key of the same name in ``config.py``, which says what it means and where it comes from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from hierkd.teachers.region_cache import check_cached_boxes

__all__ = [
    "IKD",
    "DetectionSettings",
    "InferenceSettings",
    "build_detection_settings",
    "build_ikd",
    "build_inference_settings",
    "check_choice",
]


def check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ValueError, naming the key, unless its value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{key} must be one of {choices}, got {value!r}")


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


def build_detection_settings(cfg: Any) -> DetectionSettings:
    """Read ``MODEL.ATSS``."""
    atss = cfg.MODEL.ATSS
    return DetectionSettings(
        quality=atss.QUALITY,
        focal_gamma=atss.FOCAL_GAMMA,
        focal_alpha=atss.FOCAL_ALPHA,
        cls_loss_weight=atss.CLS_LOSS_WEIGHT,
        learn_cls_loss_weight=atss.LEARN_CLS_LOSS_WEIGHT,
        box_reg_loss_weight=atss.BOX_REG_LOSS_WEIGHT,
        quality_loss_weight=atss.QUALITY_LOSS_WEIGHT,
        negative_sampling=atss.NEGATIVE_SAMPLING,
        negative_amount=atss.NEGATIVE_AMOUNT,
        negative_scope=atss.NEGATIVE_SCOPE,
        ignore_padding=atss.IGNORE_PADDING,
    )


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

    def __post_init__(self) -> None:
        check_choice("MODEL.IKD.LOSS_TYPE", self.loss_type, ("l1", "l2"))
        check_choice("MODEL.IKD.BOXES", self.boxes, ("predicted", "gt"))
        check_choice("MODEL.IKD.AVERAGE_OVER", self.average_over, ("points", "levels"))


def build_ikd(cfg: Any) -> IKD | None:
    """Read ``MODEL.IKD``; None if it is off.

    Raises:
        ValueError: embeddings are looked up (``MODEL.TEACHER.CACHE``), but not of these boxes.
    """
    ikd = cfg.MODEL.IKD
    if ikd.LOSS_WEIGHT <= 0:
        return None
    if cfg.MODEL.TEACHER.CACHE:
        check_cached_boxes(ikd.BOXES)
    return IKD(
        loss_weight=ikd.LOSS_WEIGHT,
        loss_type=ikd.LOSS_TYPE,
        boxes=ikd.BOXES,
        crop_scale=ikd.CROP_SCALE,
        iou_thresh=ikd.IOU_THRESH,
        max_crops_per_image=ikd.MAX_CROPS_PER_IMAGE,
        average_over=ikd.AVERAGE_OVER,
    )


@dataclass(frozen=True)
class InferenceSettings:
    """Numbers of inference; see the ``*_TEST`` keys of ``MODEL.ATSS``."""

    score_thresh: float = 0.0
    topk_anchors: int = 1000
    topk_pairs: int = 3000
    nms_thresh: float = 0.4
    max_detections: int = 100
    class_agnostic_nms: bool = False
    novel_logit_shift: float = 0.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.novel_logit_shift):
            raise ValueError(
                f"MODEL.ATSS.NOVEL_LOGIT_SHIFT must be finite, got {self.novel_logit_shift}"
            )


def build_inference_settings(cfg: Any) -> InferenceSettings:
    """Read the ``*_TEST`` keys of ``MODEL.ATSS`` and detectron2's number of detections."""
    atss = cfg.MODEL.ATSS
    return InferenceSettings(
        score_thresh=atss.SCORE_THRESH_TEST,
        topk_anchors=atss.TOPK_ANCHORS_TEST,
        topk_pairs=atss.TOPK_PAIRS_TEST,
        nms_thresh=atss.NMS_THRESH_TEST,
        max_detections=cfg.TEST.DETECTIONS_PER_IMAGE,
        class_agnostic_nms=atss.CLASS_AGNOSTIC_NMS,
        novel_logit_shift=atss.NOVEL_LOGIT_SHIFT,
    )
