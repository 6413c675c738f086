"""The losses of HierKD as pure functions of tensors.

Every function returns an un-normalised sum (or, for Eq. 5, a mean over the batch): weights and
normalisers belong to the one caller, :meth:`hierkd.modeling.detector.HierKD.losses`. Zero rows are
legal everywhere and give a zero that is still attached to the graph, so that under DDP every
parameter receives a gradient on every process.

Letters: n sampled points · K classes, index K = background · P distilled points · D embedding size
· N images · C captions (= N).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from detectron2.structures import Boxes
from detectron2.structures.boxes import matched_pairwise_iou
from torch import Tensor

__all__ = [
    "box_iou_targets",
    "centerness_targets",
    "embedding_l1_loss",
    "embedding_l2_loss",
    "image_caption_contrastive_loss",
    "positive_pairs_loss",
    "quality_loss",
    "similarity_kl_loss",
    "softmax_focal_loss",
    "weighted_giou_loss",
]


def softmax_focal_loss(
    logits: Tensor, labels: Tensor, *, gamma: float = 2.0, alpha: float = 0.25
) -> Tensor:
    """Focal loss over a softmax with background (Eq. 1 with the focal loss of §4.2).

    ``sum_i alpha * (1 - p_i)^gamma * (-log p_i)`` with ``p_i = softmax(logits_i)[labels_i]``.
    ``alpha`` is one factor for foreground and background alike, as in the released code: a softmax
    has no negative half for ``1 - alpha`` to weigh. With ``gamma = 0`` and ``alpha = 1`` this is
    the cross-entropy.

    Args:
        logits: (n, K+1), background last.
        labels: (n,) integers in [0, K].
        gamma: focusing exponent, >= 0.
        alpha: constant factor.

    Returns:
        Scalar: the sum over the n points.
    """
    log_p = -F.cross_entropy(logits, labels, reduction="none")
    # Below the smallest step from 1 the slope of the power is infinite for gamma < 1.
    return -(alpha * (1.0 - log_p.exp()).clamp(min=1e-9) ** gamma * log_p).sum()


def weighted_giou_loss(pred_boxes: Tensor, gt_boxes: Tensor, weights: Tensor) -> Tensor:
    """Sum over points of ``weight * (1 - GIoU)``.

    Args:
        pred_boxes: (n, 4) XYXY, the decoded predictions.
        gt_boxes: (n, 4) XYXY, the boxes they are matched to, same frame.
        weights: (n,), the IoU (or centre-ness) target of each point; no gradient expected.

    Returns:
        Scalar sum; not finite if a prediction is not.
    """
    # fvcore's and torchvision's select by masks and assert: a GPU waits a dozen times for that.
    larger, smaller = torch.max(pred_boxes, gt_boxes), torch.min(pred_boxes, gt_boxes)
    sides = smaller[:, 2:] - larger[:, :2]
    overlap = torch.where((sides > 0).all(dim=1), sides[:, 0] * sides[:, 1], 0.0)
    union = _areas(pred_boxes) + _areas(gt_boxes) - overlap
    enclosing = _areas(torch.cat([smaller[:, :2], larger[:, 2:]], dim=1))
    giou = overlap / (union + 1e-7) - (enclosing - union) / (enclosing + 1e-7)
    return ((1 - giou) * weights).sum()


def _areas(boxes: Tensor) -> Tensor:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def quality_loss(pred_quality: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy of the IoU (or centre-ness) branch against its soft target.

    Args:
        pred_quality: (n,) logits.
        targets: (n,) in [0, 1].

    Returns:
        Scalar sum.
    """
    return F.binary_cross_entropy_with_logits(pred_quality, targets, reduction="sum")


@torch.no_grad()
def box_iou_targets(pred_boxes: Tensor, gt_boxes: Tensor) -> Tensor:
    """IoU of each predicted box with its ground truth: the target of the IoU branch (§3.1).

    Args:
        pred_boxes: (n, 4) XYXY.
        gt_boxes: (n, 4) XYXY, row i belongs to prediction i.

    Returns:
        (n,) in [0, 1], without gradient; 0 where neither box has an area.
    """
    pred, gt = Boxes(pred_boxes), Boxes(gt_boxes)
    iou: Tensor = matched_pairwise_iou(pred, gt)
    return iou.masked_fill(pred.area() + gt.area() == 0, 0.0)  # detectron2 gives 0 / 0


@torch.no_grad()
def centerness_targets(centers: Tensor, gt_boxes: Tensor) -> Tensor:
    """Centre-ness of FCOS (Eq. 3 there), the target of the paper's baseline branch.

    ``sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b))``.

    Args:
        centers: (n, 2) anchor centres (x, y) in pixels, inside their box.
        gt_boxes: (n, 4) XYXY.

    Returns:
        (n,) in [0, 1].
    """
    left_top = centers - gt_boxes[:, :2]
    right_bottom = gt_boxes[:, 2:] - centers
    ratio = torch.minimum(left_top, right_bottom) / torch.maximum(left_top, right_bottom)
    return ratio.clamp(min=0.0).prod(dim=1).sqrt()


def embedding_l1_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """IKD (Eq. 2): ``sum_i sum_d |f_id - v_id|``; the caller divides by the number of points.

    Args:
        student: (P, D) embeddings of the distilled points, L2-normalised.
        teacher: (P, D) CLIP embeddings of their regions, L2-normalised, no gradient.

    Returns:
        Scalar sum.
    """
    return (student - teacher).abs().sum()


def embedding_l2_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The L2 variant of IKD (Table 2): ``sum_i ||f_i - v_i||_2``, the norm not squared.

    Args:
        student: (P, D) as in :func:`embedding_l1_loss`.
        teacher: (P, D).

    Returns:
        Scalar sum. The gradient at equal inputs is zero.
    """
    distances: Tensor = torch.linalg.vector_norm(student - teacher, dim=1)
    return distances.sum()


def similarity_kl_loss(student: Tensor, teacher: Tensor, bank: Tensor, scale: float) -> Tensor:
    """IKD by similarities: ``sum_i KL(softmax(s B v_i) || softmax(s B f_i))``.

    Eq. 2 pulls an embedding to the place of CLIP's image embeddings, which lies apart from that of
    its texts, where the classifier wants it. This asks only that it be as similar to a bank of
    CLIP's embeddings as CLIP's own is. [ours]

    Args:
        student: (P, D) as in :func:`embedding_l1_loss`.
        teacher: (P, D).
        bank: (B, D) what both are compared with, L2-normalised, no gradient.
        scale: s, the teacher's own factor on cosines.

    Returns:
        Scalar sum. The gradient at equal inputs is zero.
    """
    found, expected = (scale * each @ bank.T for each in (student, teacher))
    return F.kl_div(
        found.log_softmax(dim=1), expected.log_softmax(dim=1), reduction="sum", log_target=True
    )


def image_caption_contrastive_loss(match_scores: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric contrastive loss between images and captions (Eq. 5).

    Args:
        match_scores: (N, C) scores <I, C> already multiplied by tau_m; image i belongs to
            caption i. Square.

    Returns:
        (image term, caption term): the mean over images of the cross-entropy among captions, and
        the mean over captions of the cross-entropy among images. Transposing the scores swaps
        them; equal scores give log(N) each.
    """
    own = torch.arange(len(match_scores), device=match_scores.device)
    return F.cross_entropy(match_scores, own), F.cross_entropy(match_scores.T, own)


def positive_pairs_loss(match_scores: Tensor) -> Tensor:
    """GKD without negatives (Table 3, "PL"): the mean of ``1 - <I_i, C_i>`` over true pairs.

    The paper does not print the formula; a linear loss on the cosine is ours.

    Args:
        match_scores: (N, C) plain cosines, square.

    Returns:
        Scalar mean.
    """
    return (1.0 - match_scores.diagonal()).mean()
