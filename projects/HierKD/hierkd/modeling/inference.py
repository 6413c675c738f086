"""Inference on tensors: rank the points, classify them, keep the best pairs, suppress the rest.

Every step has a fixed control flow, so that :mod:`hierkd.inference.exportable` records the same
steps as a graph. Only vocabularies whose probabilities would not fit into a block of bounded size
are looked at block by block, and those a graph holds as a whole.

Letters: N images · L levels · R points of an image · A ranked points · D embedding size ·
K classes, the background left out. Boxes are XYXY in pixels of the network input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from detectron2.layers import batched_nms
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from torch import Tensor
from torchvision.ops import nms

from hierkd.modeling.detector_settings import InferenceSettings

__all__ = [
    "ClassProbabilities",
    "DensePredictions",
    "ForeAnchors",
    "PredictedMaps",
    "best_detections",
    "best_pairs",
    "blocks_of",
    "class_probabilities",
    "flatten_maps",
    "nms_of_classes",
    "rank_points",
]

PredictedMaps = tuple[list[Tensor], list[Tensor], list[Tensor] | None]  # what ATSSHead returns
Classify = Callable[[Tensor], Tensor]  # (n, D) embeddings to (n, K) probabilities, row by row

# Elements of one block of (points, classes), 8 MiB of float32: larger ones leave the processor's
# cache, and 1203 classes take 1.5 times as long with 32 MiB. 1333 x 800 pixels and 80 classes are
# one block, so that what is computed for COCO does not depend on it. A GPU has no such cache, and
# launches of small kernels cost: 256 MiB there. [ours]
_BLOCK_ELEMENTS = 2**21
_BLOCK_ELEMENTS_ON_GPU = 2**26
# A block has no fewer rows, below which matrix products slow down: 20 MiB with 20,000 classes.
_MIN_BLOCK_ROWS = 256
# From so many different classes on, NMS of all of them at once is cheaper than class by class.
_MANY_CLASSES = 128
_NO_CANDIDATE = -1.0  # a score: real ones are products of probabilities


class DensePredictions(NamedTuple):
    """The head's outputs with the levels and the map dimensions flattened to R points."""

    embeddings: Tensor  # (N, R, D), L2-normalised
    anchor_deltas: Tensor  # (N, R, 4)
    qualities: Tensor | None  # (N, R) logits

    def of_image(self, index: int) -> DensePredictions:
        """The same of one image, without N."""
        qualities = None if self.qualities is None else self.qualities[index]
        return DensePredictions(self.embeddings[index], self.anchor_deltas[index], qualities)


def flatten_maps(pred_maps: PredictedMaps) -> DensePredictions:
    """Lay the L maps of each output end to end as R points."""

    def flatten(maps: list[Tensor]) -> Tensor:
        return torch.cat([permute_to_N_HWA_K(x, x.shape[1]) for x in maps], dim=1)

    embeddings, deltas, qualities = pred_maps
    return DensePredictions(
        flatten(embeddings),
        flatten(deltas),
        None if qualities is None else flatten(qualities).squeeze(2),
    )


def class_probabilities(logits: Tensor, novel_shift: Tensor | None) -> Tensor:
    """Probabilities of the classes, the background left out.

    Base and novel classes compete for the probability that there is an object at all, which a
    shift of the novel logits leaves as it is.

    Args:
        logits: (..., K+1), background last.
        novel_shift: (K,) what is added to the logits of the classes; None = nothing.

    Returns:
        (..., K).
    """
    probs = logits.softmax(dim=-1)[..., :-1]
    if novel_shift is None:
        return probs
    shifted = logits[..., :-1] + novel_shift
    return probs.sum(dim=-1, keepdim=True) * shifted.softmax(dim=-1)


def blocks_of(points: Tensor, num_classes: int) -> Sequence[Tensor]:
    """Split rows such that a block's rows times K stay small."""
    elements = _BLOCK_ELEMENTS_ON_GPU if points.is_cuda else _BLOCK_ELEMENTS
    blocks: Sequence[Tensor] = points.split(max(_MIN_BLOCK_ROWS, elements // num_classes))
    return blocks


class ClassProbabilities(NamedTuple):
    """(R, K) probabilities that are held as one array only where that is small.

    A vocabulary of 20,000 names makes 1.8 GB of the 22,000 points of a picture, of which inference
    needs the maximum of each row and then the rows of the best points. Where the array has more
    rows than a block, they are therefore computed a block at a time and thrown away after use.
    """

    best: Tensor  # (R,) probability of each point's best class
    rows: Tensor  # (R, K) all probabilities; or the (R, D) embeddings that `classify` makes them of
    classify: Classify | None = None
    num_classes: int = 0  # K, where there is `classify`

    @classmethod
    def of(cls, probs: Tensor) -> ClassProbabilities:
        """Wrap probabilities (R, K) that are there already."""
        return cls(probs.amax(dim=1), probs)

    @classmethod
    def of_embeddings(
        cls, classify: Classify, embeddings: Tensor, num_classes: int
    ) -> ClassProbabilities:
        """Classify (R, D) embeddings, now or, where K is large, whenever rows are asked for."""
        blocks = blocks_of(embeddings, num_classes)
        if len(blocks) == 1:
            return cls.of(classify(embeddings))
        best = torch.cat([classify(each).amax(dim=1) for each in blocks])
        return cls(best, embeddings, classify, num_classes)

    @property
    def whole(self) -> Tensor:
        """(R, K) all of them, however large that is."""
        return self.rows if self.classify is None else self.classify(self.rows)

    def select(self, idxs: Tensor) -> ClassProbabilities:
        """Those of the points ``idxs`` (n,), each in [0, R)."""
        return self._replace(best=self.best[idxs], rows=self.rows[idxs])


class ForeAnchors(NamedTuple):
    """The A anchors of an image that inference ranks: the best of each level, finest first."""

    boxes: Tensor  # (A, 4) decoded, clipped to the image
    classes: ClassProbabilities  # (A, K)
    qualities: Tensor  # (A,) 0..1; ones without a quality branch

    @property
    def probs(self) -> Tensor:
        """(A, K) all class probabilities as one array, however large that is."""
        return self.classes.whole

    @property
    def scores(self) -> Tensor:
        """(A,) score of each anchor's best class."""
        return self.classes.best * self.qualities

    def best(self, count: int) -> ForeAnchors:
        """The ``count`` best over all levels; all of them where there are no more."""
        if count >= len(self.boxes):
            return self
        top = self.scores.topk(count).indices
        return ForeAnchors(self.boxes[top], self.classes.select(top), self.qualities[top])


def rank_points(
    predictions: DensePredictions,
    classes: ClassProbabilities,
    anchors: Sequence[Tensor],
    box2box_transform: Box2BoxTransform,
    image_size: tuple[int, int],
    topk: int,
) -> ForeAnchors:
    """Keep the points of each level whose best class scores highest, and decode their boxes.

    Args:
        predictions: of one image, R points.
        classes: (R, K).
        anchors: per level; R x 4 in all.
        box2box_transform: detectron2's delta transform.
        image_size: height and width that boxes are clipped to, in pixels.
        topk: points of a level, at most.
    """
    logits = predictions.qualities
    qualities = torch.ones_like(classes.best) if logits is None else logits.sigmoid()
    scores, kept, start = classes.best * qualities, [], 0
    for level in anchors:
        end = start + level.shape[0]
        top = scores[start:end].topk(torch.sym_min(topk, level.shape[0]))
        kept.append(top.indices + start)
        start = end
    idxs = torch.cat(kept)
    boxes = box2box_transform.apply_deltas(
        predictions.anchor_deltas[idxs], torch.cat(list(anchors))[idxs]
    )
    height, width = image_size
    limits = torch.stack([boxes.new_full((), side) for side in (width, height)]).repeat(2)
    boxes = torch.minimum(boxes.clamp(min=0), limits)
    return ForeAnchors(boxes, classes.select(idxs), qualities[idxs])


def best_detections(
    boxes: Tensor,
    classes: ClassProbabilities,
    qualities: Tensor,
    settings: InferenceSettings,
    suppress: Callable[[Tensor, Tensor, Tensor, float, int], Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Make detections of one image's boxes: best (box, class) pairs, then class-wise NMS.

    Args:
        boxes: (A, 4), inside the image.
        classes: (A, K).
        qualities: (A,) factors of the scores, 0..1: the predicted IoU.
        settings: the numbers.
        suppress: a graph's own :func:`nms_of_classes`.

    Returns:
        boxes (n, 4), scores (n,) best first, classes (n,) int64; n <= ``max_detections``.
    """
    scores, rows, labels = best_pairs(
        classes, qualities, limit=settings.topk_pairs, score_thresh=settings.score_thresh
    )
    suppress = suppress or nms_of_classes
    keep = suppress(boxes[rows], scores, labels, settings.nms_thresh, settings.max_detections)
    return boxes[rows[keep]], scores[keep], labels[keep]


def best_pairs(
    classes: ClassProbabilities, qualities: Tensor, *, limit: int = 0, score_thresh: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """The best pairs of a point and a class, scored by probability times quality.

    Where the array of all pairs is large, points are looked at best first, and no further than
    where the best class of the next one scores no more than all pairs found: the result is the
    same.

    Args:
        classes: (A, K).
        qualities: (A,) factors of the scores, 0..1.
        limit: of the number of pairs; 0 = no limit.
        score_thresh: probabilities at or below it make no pair.

    Returns:
        scores (n,), best first; rows in [0, A); classes in [0, K).
    """
    if classes.classify is None:
        return _pairs_of(classes.rows, qualities, limit, score_thresh)
    scores = classes.best * qualities
    found: list[Tensor] = []
    for points in blocks_of(scores.argsort(descending=True), classes.num_classes):
        if found and 0 < limit == len(found[0]) and scores[points[0]] <= found[0][-1]:
            break
        probs = classes.select(points).whole
        pair_scores, rows, labels = _pairs_of(probs, qualities[points], limit, score_thresh)
        new = pair_scores, points[rows], labels
        found = [torch.cat(both) for both in zip(found, new, strict=True)] if found else [*new]
        order = found[0].topk(min(limit or len(found[0]), len(found[0]))).indices
        found = [each[order] for each in found]
    return found[0], found[1], found[2]


def _pairs_of(
    probs: Tensor, qualities: Tensor, limit: int, score_thresh: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The pairs of (n, K) probabilities that are there as one array; see :func:`best_pairs`."""
    scores = probs * qualities[:, None]
    scores = scores.masked_fill(probs <= score_thresh, _NO_CANDIDATE).flatten()
    best, pairs = scores.topk(torch.sym_min(limit or scores.numel(), scores.numel()))
    (found,) = (best >= 0).nonzero(as_tuple=True)
    rows = pairs[found] // probs.shape[1]
    return best[found], rows, pairs[found] - rows * probs.shape[1]  # a graph cannot divide twice


def nms_of_classes(
    boxes: Tensor, scores: Tensor, classes: Tensor, iou_thresh: float, limit: int
) -> Tensor:
    """detectron2's class-wise NMS, also for pairs of thousands of different classes.

    On a CPU that goes class by class, which takes longer than the network where nearly every box
    has a class of its own; for few boxes, and on a GPU, it moves the boxes of class k by k times
    the picture, which is pixels beside the truth in float32 when k is large. Classes are therefore
    counted by rank among those that occur, and the boxes of many are moved in float64.

    Args:
        boxes: (n, 4).
        scores: (n,).
        classes: (n,) int64.
        iou_thresh: boxes of one class with an IoU over it exclude each other.
        limit: of the number of boxes.

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
    return keep[:limit]
