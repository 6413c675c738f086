"""Class probabilities of many points under a vocabulary of any size, a block of rows at a time.

Letters: R points of an image · D embedding size · K classes, the background left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from detectron2.layers import batched_nms
from torch import Tensor
from torchvision.ops import nms

__all__ = ["ClassProbabilities", "best_pairs", "nms_of_classes"]

# Elements of one block of (points, classes), 8 MiB of float32: larger ones leave the processor's
# cache, and 1203 classes take 1.5 times as long with 32 MiB. 1333 x 800 pixels and 80 classes are
# one block, so that what is computed for COCO does not depend on it. [ours]
_BLOCK_ELEMENTS = 2**21
# A block has no fewer rows, below which matrix products slow down: 20 MiB with 20,000 classes.
_MIN_BLOCK_ROWS = 256
# From so many different classes on, NMS of all of them at once is cheaper than class by class.
_MANY_CLASSES = 128
# Relative difference of a probability that is computed twice, in blocks of other sizes.
_ROUNDING = 1e-4


class ClassProbabilities:
    """(R, K) probabilities that are held as one array only where that is small.

    A vocabulary of 20,000 names makes 1.8 GB of the 22,000 points of a picture, of which inference
    needs the maximum of each row and then the rows of the best points. Where the array has more
    rows than a block, they are therefore computed when they are asked for, a block at a time, and
    thrown away after use. The numbers are the same.
    """

    def __init__(
        self,
        classify: Callable[[Tensor], Tensor],
        points: Tensor,
        num_classes: int,
        *,
        block_rows: int | None = None,
        best: Tensor | None = None,
    ) -> None:
        """Hold what is needed to classify.

        Args:
            classify: (n, D) to (n, K) probabilities, each row by itself.
            points: (R, D) what it is applied to.
            num_classes: K.
            block_rows: rows of a block; by default as many as suit the processor's cache.
            best: (R,) the maximum of each row, where it is known already.
        """
        self.num_classes = num_classes
        self.block_rows = block_rows or max(_MIN_BLOCK_ROWS, _BLOCK_ELEMENTS // num_classes)
        self._classify = classify
        self._points = points
        self._best = best
        self._whole = classify(points) if len(points) <= self.block_rows else None

    @classmethod
    def of(cls, probs: Tensor) -> ClassProbabilities:
        """Wrap probabilities (R, K) that are there already."""
        return cls(_given, probs, probs.shape[1])

    def __len__(self) -> int:
        """R."""
        return len(self._points)

    @property
    def best(self) -> Tensor:
        """(R,) probability of each point's best class."""
        if self._best is None:
            blocks = [probs.amax(dim=1) for _, probs in self.blocks()]
            self._best = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
        return self._best

    @property
    def whole(self) -> Tensor:
        """(R, K) all of them, however large that is."""
        if self._whole is not None:
            return self._whole
        return torch.cat([probs for _, probs in self.blocks()])

    def select(self, idxs: Tensor) -> ClassProbabilities:
        """The probabilities of some points.

        Args:
            idxs: (n,) int64 in [0, R).
        """
        best = None if self._best is None else self._best[idxs]
        if self._whole is None:
            classify, points = self._classify, self._points[idxs]
        else:
            classify, points = _given, self._whole[idxs]
        return ClassProbabilities(
            classify, points, self.num_classes, block_rows=self.block_rows, best=best
        )

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the first row of each block and its (n, K) probabilities, in the order of rows."""
        if self._whole is not None:
            yield 0, self._whole
            return
        for start in range(0, len(self), self.block_rows):
            yield start, self._classify(self._points[start : start + self.block_rows])


def _given(probs: Tensor) -> Tensor:
    return probs


def best_pairs(
    probs: ClassProbabilities, qualities: Tensor, *, limit: int = 0, score_thresh: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """The best pairs of a point and a class, scored by probability times quality.

    Points are looked at best first, and no further than where the best class of the next one scores
    no more than all pairs that were found: the result is that of looking at all R x K pairs. The
    best pairs of the points themselves say beforehand what a pair must score at least.

    Args:
        probs: of R points.
        qualities: (R,) factors of the scores, 0..1.
        limit: of the number of pairs; 0 = no limit.
        score_thresh: probabilities at or below it make no pair.

    Returns:
        scores, best first; rows in [0, R); classes in [0, K).
    """
    num_pairs = len(probs) * probs.num_classes
    limit = min(limit or num_pairs, num_pairs)
    if len(probs) <= probs.block_rows:
        return _pairs_of_block(probs.whole, qualities, limit, score_thresh)
    best = (probs.best * qualities).masked_fill(probs.best <= score_thresh, -1.0)
    best, order = best.sort(descending=True)
    probs, qualities = probs.select(order), qualities[order]
    ceilings = best[:: probs.block_rows].tolist()  # of each block
    found: tuple[Tensor, ...] = ()
    # A score that ``limit`` pairs reach; what is classified again may differ by rounding.
    floor = float(best[limit - 1]) * (1 - _ROUNDING) if limit <= len(best) else -1.0
    for number, (start, block) in enumerate(probs.blocks()):
        if found and ceilings[number] <= floor:
            break
        part = qualities[start : start + len(block)]
        scores, rows, classes = _pairs_of_block(block, part, limit, score_thresh, floor)
        new = (scores, order[start + rows], classes)
        found = tuple(torch.cat(both) for both in zip(found, new, strict=True)) if found else new
        top = found[0].topk(min(limit, len(found[0]))).indices
        found = tuple(each[top] for each in found)
        if len(top) == limit:
            floor = float(found[0][-1])
    scores, rows, classes = found
    return scores, rows, classes


def _pairs_of_block(
    probs: Tensor, qualities: Tensor, limit: int, score_thresh: float, floor: float = -1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """The pairs of (n, K) probabilities with a score over ``floor``; see :func:`best_pairs`."""
    scores = probs * qualities[:, None]
    scores = scores.masked_fill(probs <= score_thresh, -1.0)
    if floor < 0:
        pair_scores, pairs = scores.flatten().topk(min(limit, scores.numel()))
        pairs, pair_scores = pairs[pair_scores >= 0], pair_scores[pair_scores >= 0]
    else:  # few are left
        pairs = (scores.flatten() > floor).nonzero().squeeze(1)
        pair_scores = scores.flatten()[pairs]
    return pair_scores, pairs // probs.shape[1], pairs % probs.shape[1]


def nms_of_classes(boxes: Tensor, scores: Tensor, classes: Tensor, iou_thresh: float) -> Tensor:
    """detectron2's class-wise NMS, also for pairs of thousands of different classes.

    On a CPU that goes class by class, which takes longer than the network where nearly every box
    has a class of its own; for few boxes, and on a GPU, it moves the boxes of class k by k times
    the picture, which is pixels beside the truth in float32 when k is large. Classes are therefore
    counted by rank among those that occur, and the boxes of many are moved in float64.

    Args:
        boxes: (n, 4) XYXY, pixels.
        scores: (n,).
        classes: (n,) int64.
        iou_thresh: boxes of one class with an IoU over it exclude each other.

    Returns:
        Indices of what is kept, best first.
    """
    names, ranks = classes.unique(return_inverse=True)
    keep: Tensor
    if len(names) < _MANY_CLASSES:
        keep = batched_nms(boxes, scores, ranks, iou_thresh)
    else:
        boxes = boxes.double()
        extent = boxes.max() - boxes.min() + 1
        keep = nms(boxes + (ranks * extent)[:, None], scores.double(), iou_thresh)
    return keep
