"""Between detector and teacher (§3.2): which points are distilled, from which crops, to what loss.

Letters: L feature levels · R points of an image · M boxes of an image · D embedding size ·
p positive points of the batch · P distilled points · U crops that the teacher looks at.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hierkd.modeling.detector_settings import IKD
from hierkd.modeling.losses import embedding_l1_loss, embedding_l2_loss

__all__ = ["PositivePoints", "RegionPairs", "choose_crops", "region_loss"]

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


@torch.no_grad()
def choose_crops(
    ikd: IKD, positives: PositivePoints, num_images: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the points to distil, and the boxes that the teacher looks at for them.

    The points of an object share its ground-truth box, which is looked at once.

    Args:
        ikd: the settings.
        positives: p points.
        num_images: N, for the limit of crops.

    Returns:
        points (P,) and crops (U,), indices of positives; crop_of_point (P,), the position in
        ``crops`` of each point's.
    """
    points = (positives.ious >= ikd.iou_thresh).nonzero().squeeze(1)
    limit = ikd.max_crops_per_image * num_images
    if 0 < limit < len(points):
        drawn = torch.randperm(len(points), device=points.device)[:limit]
        points = points[drawn.sort().values]
    if ikd.boxes == "predicted":
        return points, points, torch.arange(len(points), device=points.device)
    objects = torch.stack([positives.image_idxs[points], positives.gt_idxs[points]], dim=1)
    distinct, crop_of_point = objects.unique(dim=0, return_inverse=True)
    crops = torch.zeros(len(distinct), dtype=torch.int64, device=points.device)
    crops[crop_of_point] = points
    return points, crops, crop_of_point


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
