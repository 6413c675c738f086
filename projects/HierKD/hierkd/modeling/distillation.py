"""Between detector and teacher (§3.2): which points are distilled, from which regions, and Eq. 2.

Letters: N images · L feature levels · R points of an image · A candidates of an image · M boxes of
an image · D embedding size · p positive points of the batch · q proposals of the batch · P = p + q
distilled points.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from detectron2.layers import batched_nms
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor

from hierkd.modeling.atss import ATSSMatcher
from hierkd.modeling.detector_settings import IKD
from hierkd.modeling.losses import embedding_l1_loss, embedding_l2_loss, similarity_kl_loss
from hierkd.teachers.protocol import Teacher

__all__ = [
    "PositivePoints",
    "Proposals",
    "RegionPairs",
    "choose_points",
    "choose_proposals",
    "encode_crops",
    "look_up_regions",
    "match_proposals",
    "region_loss",
]


class PositivePoints(NamedTuple):
    """The p positive points of the batch, image by image."""

    image_idxs: Tensor  # (p,)
    point_idxs: Tensor  # (p,) in [0, R)
    pred_boxes: Tensor  # (p, 4), decoded, with gradient
    gt_boxes: Tensor  # (p, 4)
    gt_idxs: Tensor  # (p,) positions among the M boxes of the image
    ious: Tensor  # (p,) IoU of the two, no gradient


class Proposals(NamedTuple):
    """The q points of the batch that seem to show objects without a label, image by image."""

    image_idxs: Tensor  # (q,)
    point_idxs: Tensor  # (q,) in [0, R)
    boxes: Tensor  # (q, 4), inside the image, no gradient
    embeddings: Tensor | None = None  # (q, D), the teacher's, where they came with the batch


class RegionPairs(NamedTuple):
    """What Eq. 2 compares at the P distilled points, and the level of each."""

    student: Tensor  # (P, D), L2-normalised, with gradient
    teacher: Tensor  # (P, D), L2-normalised, without
    levels: Tensor  # (P,) in [0, L)
    texts: Tensor | None = None  # (B, D) of the loss "kl"
    scale: float = 1.0  # the teacher's factor on cosines


def choose_points(ikd: IKD, positives: PositivePoints, num_images: int) -> PositivePoints:
    """The P positives that are localised well enough; a random part of them over the limit."""
    chosen = (positives.ious >= ikd.iou_thresh).nonzero().squeeze(1)
    limit = ikd.max_crops_per_image * num_images
    if 0 < limit < len(chosen):
        drawn = torch.randperm(len(chosen), device=chosen.device)[:limit]
        chosen = chosen[drawn.sort().values]
    return PositivePoints(*(each[chosen] for each in positives))


@torch.no_grad()
def choose_proposals(
    candidates: Proposals,
    scores: Tensor,
    gt_instances: Sequence[Instances],
    per_image: int,
    *,
    min_side: float = 12.0,
    labelled_iou: float = 0.3,
    nms_thresh: float = 0.5,
) -> Proposals:
    """The best boxes of each image that overlap no labelled box.

    Args:
        candidates: q of them, image by image.
        scores: (q,) how much each is taken for an object of any kind.
        gt_instances: N, with ``gt_boxes``.
        per_image: proposals of an image, at most.
        min_side: least width and height, in pixels of the network input.
        labelled_iou: a box of this IoU with a labelled one shows the labelled object.
        nms_thresh: of two boxes with a greater IoU the better stays.

    Returns:
        At most ``per_image`` of each image, image by image, best first.
    """
    image_idxs, boxes = candidates.image_idxs, candidates.boxes
    counts = torch.tensor([len(each) for each in gt_instances], device=boxes.device)
    owners = torch.arange(len(counts), device=boxes.device).repeat_interleave(counts)
    ious = pairwise_iou(Boxes(boxes), Boxes.cat([each.gt_boxes for each in gt_instances]))
    labelled = (ious >= labelled_iou) & (image_idxs[:, None] == owners)
    usable = (boxes[:, 2:] - boxes[:, :2] >= min_side).all(dim=1) & ~labelled.any(dim=1)
    rows = usable.nonzero().squeeze(1)
    rows = rows[batched_nms(boxes[rows], scores[rows], image_idxs[rows], nms_thresh)]
    rows = rows[image_idxs[rows].argsort(stable=True)]
    sizes = image_idxs[rows].bincount(minlength=len(counts))
    rank = torch.arange(len(rows), device=rows.device) - _starts(sizes)[image_idxs[rows]]
    rows = rows[rank < per_image]
    return Proposals(image_idxs[rows], candidates.point_idxs[rows], boxes[rows])


@torch.no_grad()
def match_proposals(
    given: Sequence[Instances],
    anchors: Sequence[Boxes],
    matcher: ATSSMatcher,
    positives: PositivePoints,
) -> Proposals:
    """The points of proposals that came with the batch, found as those of labelled boxes are.

    Args:
        given: N, with ``proposal_boxes`` and ``region_embeddings``, a row per box.
        anchors: of each level, R in all.
        matcher: of boxes and points.
        positives: points of labelled boxes, which keep them.
    """
    matched = [matcher(each.proposal_boxes, anchors) for each in given]
    matches, labels = (torch.stack(each) for each in zip(*matched, strict=True))  # (N, R)
    labels[positives.image_idxs, positives.point_idxs] = 0
    places = image_idxs, point_idxs = (labels == 1).nonzero(as_tuple=True)
    sizes = torch.tensor([len(each) for each in given], device=matches.device)
    rows = _starts(sizes)[image_idxs] + matches[places]
    boxes = torch.cat([each.proposal_boxes.tensor for each in given])
    embeddings = torch.cat([each.region_embeddings for each in given])
    return Proposals(image_idxs, point_idxs, boxes[rows], embeddings[rows])


@torch.no_grad()
def encode_crops(
    teacher: Teacher,
    ikd: IKD,
    images: Sequence[Tensor],
    points: PositivePoints,
    proposals: Proposals | None = None,
) -> Tensor:
    """(P, D) what the teacher sees in the regions of the points, and then of the proposals.

    The region of a point is its predicted box, or the ground truth's, which the points of an object
    share and which is looked at once. The teacher is asked once for all regions.

    Args:
        teacher: CLIP.
        ikd: the settings.
        images: N raw images (3, H, W).
        points: p points.
        proposals: q of them, or none.
    """
    image_idxs, boxes = points.image_idxs, points.pred_boxes.detach()
    own = torch.arange(len(boxes), device=boxes.device)
    if ikd.boxes == "gt":
        objects = torch.stack([points.image_idxs, points.gt_idxs], dim=1)
        distinct, own = objects.unique(dim=0, return_inverse=True)
        image_idxs, boxes = distinct[:, 0], points.gt_boxes.new_zeros(len(distinct), 4)
        boxes[own] = points.gt_boxes
    if proposals is not None:
        own = torch.cat([own, len(boxes) + torch.arange(len(proposals.boxes), device=own.device)])
        boxes = torch.cat([boxes, proposals.boxes])
        image_idxs, order = torch.cat([image_idxs, proposals.image_idxs]).sort(stable=True)
        boxes, own = boxes[order], order.argsort()[own]
    counts = image_idxs.cpu().bincount(minlength=len(images)).tolist()
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
    sizes = torch.tensor([len(each) for each in instances], device=known.device)
    return known[_starts(sizes)[points.image_idxs] + points.gt_idxs]


def _starts(sizes: Tensor) -> Tensor:
    """Where each of some groups of these sizes begins when they lie end to end."""
    return sizes.cumsum(0) - sizes


def region_loss(loss_type: str, pairs: RegionPairs, num_regions: list[Tensor]) -> Tensor:
    """Eq. 2: a mean over all points, or over the points of each level and then over the levels.

    Args:
        loss_type: "l1", "l2" or "kl".
        pairs: what is compared.
        num_regions: the normaliser of all points, or of each of the L levels.
    """

    def total(student: Tensor, teacher: Tensor) -> Tensor:
        if pairs.texts is not None:
            of_texts, of_regions = (
                similarity_kl_loss(student, teacher, bank, pairs.scale)
                for bank in (pairs.texts, pairs.teacher)
            )
            return of_texts + of_regions
        return (embedding_l2_loss if loss_type == "l2" else embedding_l1_loss)(student, teacher)

    if len(num_regions) == 1:
        return total(pairs.student, pairs.teacher) / num_regions[0]
    of_levels = [
        total(pairs.student[pairs.levels == i], pairs.teacher[pairs.levels == i]) / number
        for i, number in enumerate(num_regions)
    ]
    return torch.stack(of_levels).mean()
