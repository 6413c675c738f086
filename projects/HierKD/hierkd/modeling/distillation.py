"""Between detector and teacher (§3.2): which points are distilled, from which regions, and Eq. 2.

Letters: N images · L feature levels · R points of an image · M boxes of an image · D embedding size
· p positive points of the batch · P distilled points.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from detectron2.structures import Instances
from torch import Tensor

from hierkd.modeling.detector_settings import IKD
from hierkd.modeling.losses import embedding_l1_loss, embedding_l2_loss
from hierkd.teachers.protocol import Teacher

__all__ = [
    "PositivePoints",
    "RegionPairs",
    "choose_points",
    "encode_crops",
    "look_up_regions",
    "region_loss",
]

_EMBEDDING_LOSSES = {"l1": embedding_l1_loss, "l2": embedding_l2_loss}


class PositivePoints(NamedTuple):
    """The p positive points of the batch, image by image."""

    image_idxs: Tensor  # (p,)
    point_idxs: Tensor  # (p,) in [0, R)
    pred_boxes: Tensor  # (p, 4), decoded, with gradient
    gt_boxes: Tensor  # (p, 4)
    gt_idxs: Tensor  # (p,) positions among the M boxes of the image
    ious: Tensor  # (p,) IoU of the two, no gradient


class RegionPairs(NamedTuple):
    """What Eq. 2 compares at the P distilled points, and the level of each."""

    student: Tensor  # (P, D), L2-normalised, with gradient
    teacher: Tensor  # (P, D), L2-normalised, without
    levels: Tensor  # (P,) in [0, L)


def choose_points(ikd: IKD, positives: PositivePoints, num_images: int) -> PositivePoints:
    """The P positives that are localised well enough; a random part of them over the limit."""
    chosen = (positives.ious >= ikd.iou_thresh).nonzero().squeeze(1)
    limit = ikd.max_crops_per_image * num_images
    if 0 < limit < len(chosen):
        drawn = torch.randperm(len(chosen), device=chosen.device)[:limit]
        chosen = chosen[drawn.sort().values]
    return PositivePoints(*(each[chosen] for each in positives))


@torch.no_grad()
def encode_crops(
    teacher: Teacher, ikd: IKD, images: Sequence[Tensor], points: PositivePoints
) -> Tensor:
    """(P, D) what the teacher sees in the region of each point.

    The region is the predicted box, or the ground truth's, which the points of an object share and
    which is looked at once.

    Args:
        teacher: CLIP.
        ikd: the settings.
        images: N raw images (3, H, W).
        points: P points.
    """
    image_idxs, boxes = points.image_idxs, points.pred_boxes.detach()
    own = torch.arange(len(boxes), device=boxes.device)
    if ikd.boxes == "gt":
        objects = torch.stack([points.image_idxs, points.gt_idxs], dim=1)
        distinct, own = objects.unique(dim=0, return_inverse=True)
        image_idxs, boxes = distinct[:, 0], points.gt_boxes.new_zeros(len(distinct), 4)
        boxes[own] = points.gt_boxes
    counts = image_idxs.bincount(minlength=len(images)).tolist()
    return teacher.encode_regions(images, boxes.split(counts), ikd.crop_scale)[own]


def look_up_regions(instances: Sequence[Instances], points: PositivePoints) -> Tensor | None:
    """(P, D) embeddings of the points' objects that came with the batch; None if none came.

    Args:
        instances: N, maybe with ``gt_region_embeddings`` (M, D), a row per box.
        points: P points.
    """
    if not all(each.has("gt_region_embeddings") for each in instances):
        return None
    known = torch.cat([each.gt_region_embeddings for each in instances]).to(points.ious.device)
    ends = torch.tensor([len(each) for each in instances], device=known.device).cumsum(0)
    starts = ends.roll(1).index_fill(0, ends.new_zeros(1), 0)
    return known[starts[points.image_idxs] + points.gt_idxs]


def region_loss(loss_type: str, pairs: RegionPairs, num_regions: list[Tensor]) -> Tensor:
    """Eq. 2: a mean over all points, or over the points of each level and then over the levels.

    Args:
        loss_type: "l1" or "l2".
        pairs: what is compared.
        num_regions: the normaliser of all points, or of each of the L levels.
    """
    total = _EMBEDDING_LOSSES[loss_type]
    if len(num_regions) == 1:
        return total(pairs.student, pairs.teacher) / num_regions[0]
    of_levels = [
        total(pairs.student[pairs.levels == i], pairs.teacher[pairs.levels == i]) / number
        for i, number in enumerate(num_regions)
    ]
    return torch.stack(of_levels).mean()
