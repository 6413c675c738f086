"""Adaptive training sample selection (ATSS, §3.1): which anchors are positive for which box.

Letters: M ground-truth boxes · R anchors of all levels, one per point.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.structures import Boxes, pairwise_iou
from torch import Tensor

__all__ = ["ATSSMatcher"]


class ATSSMatcher:
    """Assign anchors to ground truth by the statistics of each object's nearest anchors.

    The outputs are those of :class:`detectron2.modeling.matcher.Matcher`.

    For each box: (1) the ``topk`` anchors of every level whose centres are nearest to the box's
    centre are its candidates; (2) the mean plus the standard deviation of the candidates' IoU is
    its threshold; (3) candidates that reach the threshold and whose centre lies inside the box are
    positive. (4) An anchor claimed by several boxes goes to the one of highest IoU.
    Source: Zhang et al., "Bridging the Gap Between Anchor-based and Anchor-free Detection", Alg. 1.
    """

    # A centre on the border is outside; the margin, in pixels, is the one of the ATSS authors.
    _INSIDE_MARGIN = 0.01

    def __init__(self, topk: int = 9) -> None:
        """``topk``: candidates per level and box (9 in ATSS)."""
        if topk < 1:
            raise ValueError(f"ATSS needs at least one candidate per level, got topk={topk}")
        self.topk = topk

    @torch.no_grad()
    def __call__(self, gt_boxes: Boxes, anchors: Sequence[Boxes]) -> tuple[Tensor, Tensor]:
        """Match one image.

        Args:
            gt_boxes: M boxes, XYXY in pixels of the network input; M = 0 is legal.
            anchors: the anchors of each level, same frame; R in all.

        Returns:
            (matches, labels): (R,) int64 index of the matched box, 0 where there is none; (R,) int8
            1 for a positive, 0 for background.
        """
        all_anchors = Boxes.cat(list(anchors))
        device = all_anchors.device
        if len(gt_boxes) == 0:
            none = torch.zeros(len(all_anchors), dtype=torch.int64, device=device)
            return none, none.to(torch.int8)

        claimed = self._claims(gt_boxes, all_anchors, [len(level) for level in anchors])
        # 4. an anchor of several boxes goes to the highest IoU
        best_iou, matches = claimed.max(dim=0)
        is_positive = best_iou >= 0
        return matches.where(is_positive, 0), is_positive.to(torch.int8)

    def _claims(self, gt_boxes: Boxes, all_anchors: Boxes, level_sizes: Sequence[int]) -> Tensor:
        """(M, R) IoU of the anchors that are positive for a box, -1 elsewhere; steps 1 to 3."""
        # 1. candidates: the topk nearest centres of every level
        centers = all_anchors.get_centers()  # (R, 2)
        distances = (gt_boxes.get_centers()[:, None] - centers).square().sum(dim=2)  # (M, R)
        candidates, start = [], 0
        for size in level_sizes:
            of_level = distances[:, start : start + size]
            nearest = of_level.topk(min(self.topk, size), dim=1, largest=False).indices
            candidates.append(nearest + start)
            start += size
        candidate_idxs = torch.cat(candidates, dim=1)  # (M, at most topk * L)

        # 2. the threshold of each box
        ious = pairwise_iou(gt_boxes, all_anchors)  # (M, R)
        candidate_ious = ious.gather(1, candidate_idxs)
        thresholds = candidate_ious.mean(dim=1)
        if candidate_ious.shape[1] > 1:
            thresholds = thresholds + candidate_ious.std(dim=1)

        # 3. positives: candidates over the threshold with their centre inside the box
        candidate_centers = centers[candidate_idxs]  # (M, T, 2)
        to_left_top = candidate_centers - gt_boxes.tensor[:, None, :2]
        to_right_bottom = gt_boxes.tensor[:, None, 2:] - candidate_centers
        inside = torch.cat([to_left_top, to_right_bottom], dim=2).amin(dim=2) > self._INSIDE_MARGIN
        positive = inside & (candidate_ious >= thresholds[:, None])
        claimed = torch.full_like(ious, -1.0)
        return claimed.scatter_(1, candidate_idxs, torch.where(positive, candidate_ious, -1.0))
