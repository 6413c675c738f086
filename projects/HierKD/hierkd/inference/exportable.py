"""Inference of one picture as one graph: what :mod:`hierkd.inference.export` writes to a file.

The eager code of ``HierKD`` stops early, works in blocks and asks tensors for their values, which a
graph cannot. Here the same layers are followed by the same steps in operations of fixed control
flow. The sizes of what is sorted are fixed too: short levels are filled up with candidates that
score -1, which is below every real one, and those are dropped at the end.

Letters: H, W size of the picture · L levels · R points of all levels · A = L x ``topk_anchors``
ranked points · D embedding size · K classes, the background left out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.structures import Boxes
from torch import Tensor, nn
from torchvision.ops import nms

from hierkd.modeling.detector import HierKD
from hierkd.modeling.detector_settings import InferenceSettings

__all__ = ["ExportableDetector", "nms_per_class"]

_NO_CANDIDATE = -1.0  # a score: real ones are products of probabilities


class ExportableDetector(nn.Module):
    """A detector's inference, from a resized picture to its detections, without Python decisions.

    It shares the layers of the detector it is made of, which stays as it is.
    """

    pixel_mean: Tensor
    pixel_std: Tensor
    novel_shift: Tensor | None  # (K,), if the logits of novel classes are shifted

    def __init__(
        self,
        detector: HierKD,
        *,
        image_format: str = "BGR",
        vocabulary_as_input: bool = False,
        nms_operator: bool = False,
    ) -> None:
        """Wrap a detector, whose current vocabulary becomes part of the graph.

        Args:
            detector: in eval mode, float32.
            image_format: channel order that the detector was trained with, "RGB" or "BGR"; the
                graph itself takes RGB.
            vocabulary_as_input: take the class embeddings with every picture instead.
            nms_operator: leave non-maximum suppression as one operator, :func:`nms_per_class`, for
                which an exporter has an operator of its own.

        Raises:
            ValueError: the vocabulary is an input, but inference depends on its names; there is no
                vocabulary; or the backbone wants square pictures.
        """
        super().__init__()
        self.settings: InferenceSettings = detector.inference_settings
        self.image_format = image_format
        self.nms_operator = nms_operator
        self.vocabulary_as_input = vocabulary_as_input
        self.backbone, self.head = detector.backbone, detector.head
        self.head_in_features = list(detector.head_in_features)
        self.text_classifier = detector.text_classifier
        self.anchor_generator = detector.anchor_generator
        self.box2box_transform = detector.box2box_transform
        self.register_buffer("pixel_mean", detector.pixel_mean.detach().clone())
        self.register_buffer("pixel_std", detector.pixel_std.detach().clone())
        if (detector.backbone.padding_constraints or {}).get("square_size", 0):
            raise ValueError("backbones that pad pictures to a square cannot be exported")
        names = () if vocabulary_as_input else detector.vocabulary_names
        if vocabulary_as_input and self.settings.novel_logit_shift:
            raise ValueError(
                "MODEL.ATSS.NOVEL_LOGIT_SHIFT depends on the class names, so that the vocabulary "
                "has to be part of the exported graph, or the shift 0"
            )
        if not vocabulary_as_input and not names:
            raise ValueError("the vocabulary is empty: set one before exporting")
        # Buffers that are not used are none at all: torch.export cannot save empty ones.
        self.register_buffer("novel_shift", detector.novel_logit_shifts())

    def forward(
        self, image: Tensor, text_embeddings: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Detect.

        Args:
            image: (H, W, 3) uint8, RGB, resized as for testing.
            text_embeddings: (K, D) class embeddings, of any length; only if the vocabulary is an
                input.

        Returns:
            boxes (n, 4) XYXY in pixels of ``image``, scores (n,) best first, classes (n,) int64.
        """
        height, width = image.shape[:2]
        boxes, probs, qualities, is_point = self._ranked_points(image, text_embeddings)
        limits = torch.stack([boxes.new_full((), side) for side in (width, height)]).repeat(2)
        boxes = torch.minimum(boxes.clamp(min=0), limits)
        scores = probs * qualities[:, None]
        is_pair = is_point[:, None] & (probs > self.settings.score_thresh)
        pair_scores = torch.where(is_pair, scores, _NO_CANDIDATE)
        by_class = self._best_pairs(pair_scores).T  # (K, A)
        labels = None
        if self.settings.class_agnostic_nms:  # of two classes of one box, the better one wins
            best, labels = by_class.max(dim=0)
            by_class = best[None]
        kept = self._nms(boxes, by_class, width + height)
        scores, order = _topk_filled(by_class[kept[:, 0], kept[:, 1]], self.settings.max_detections)
        order = torch.where(scores >= 0, order, 0)
        kept = F.pad(kept, (0, 0, 0, 1))[order]  # row 0 exists, even where nothing was found
        classes, boxes = kept[:, 0], boxes[kept[:, 1]]
        if labels is not None:
            classes = labels[kept[:, 1]]
        nonempty = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        (found,) = ((scores >= 0) & nonempty).nonzero(as_tuple=True)
        return boxes[found], scores[found], classes[found]

    def _ranked_points(
        self, image: Tensor, text_embeddings: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The best points of each level.

        Returns:
            boxes (A, 4), not clipped; probs (A, K); qualities (A,) 0..1; is_point (A,), False for
            the filling of short levels.
        """
        features, maps = self._maps(image)
        embeddings, deltas, qualities = (
            torch.cat([permute_to_N_HWA_K(x, x.shape[1])[0] for x in each]) for each in maps
        )
        qualities = qualities[:, 0].sigmoid()
        anchors = Boxes.cat(self.anchor_generator(features)).tensor
        sizes = [x.shape[-2] * x.shape[-1] for x in maps[0]]
        weight = self._weight(text_embeddings)
        probs = self._probabilities(embeddings, weight, self.novel_shift)
        scores = probs.amax(dim=1) * qualities
        points, is_point = _best_of_levels(scores, sizes, self.settings.topk_anchors)
        boxes = self.box2box_transform.apply_deltas(deltas[points], anchors[points])
        return boxes, probs[points], qualities[points], is_point

    def _maps(self, image: Tensor) -> tuple[list[Tensor], tuple[list[Tensor], ...]]:
        """The L feature maps; embeddings, deltas and qualities of each level."""
        pixels = image.permute(2, 0, 1).float()
        if self.image_format == "BGR":
            pixels = pixels.flip(0)
        pixels = (pixels - self.pixel_mean) / self.pixel_std
        stride = self.backbone.size_divisibility
        if stride > 1:
            # Written so that a tracer sees multiples of the stride come out, h + (s * n - h).
            bottom, right = (
                stride * ((side + stride - 1) // stride) - side for side in pixels.shape[1:]
            )
            pixels = F.pad(pixels, (0, right, 0, bottom))
        by_name = self.backbone(pixels[None])
        features = [by_name[name] for name in self.head_in_features]
        embeddings, deltas, qualities = self.head(features)
        if qualities is None:  # a logit whose sigmoid is 1
            qualities = [torch.full_like(x[:, :1], torch.inf) for x in deltas]
        return features, (embeddings, deltas, qualities)

    def _weight(self, text_embeddings: Tensor | None) -> Tensor:
        """(K+1, D) what embeddings are compared with."""
        if not self.vocabulary_as_input:
            return self.text_classifier.weight()
        if text_embeddings is None:
            raise ValueError("the vocabulary is an input of this graph: give text_embeddings")
        rows = F.normalize(text_embeddings, dim=1)
        return torch.cat([rows, self.text_classifier.background()[None]])

    def _probabilities(self, embeddings: Tensor, weight: Tensor, shift: Tensor | None) -> Tensor:
        """(R, K) class probabilities; see ``HierKD._class_probabilities``."""
        logits = self.text_classifier.logit_scale * F.linear(embeddings, weight)
        probs = logits.softmax(dim=-1)[:, :-1]
        if shift is None:
            return probs
        return probs.sum(dim=1, keepdim=True) * (logits[:, :-1] + shift).softmax(dim=-1)

    def _best_pairs(self, scores: Tensor) -> Tensor:
        """(A, K) scores with all but the best ``topk_pairs`` replaced by -1."""
        limit = self.settings.topk_pairs
        if not limit:
            return scores
        flat = scores.flatten()
        if len(scores) < limit:
            flat = F.pad(flat, (0, limit), value=_NO_CANDIDATE)
        best, pairs = flat.topk(limit)
        kept = torch.full_like(flat, _NO_CANDIDATE).scatter(0, pairs, best)
        return kept[: scores.shape[0] * scores.shape[1]].view_as(scores)

    def _nms(self, boxes: Tensor, scores: Tensor, extent: int) -> Tensor:
        """(n, 2) class and box of what is kept; boxes lie within ``extent`` pixels."""
        settings = self.settings
        if self.nms_operator:
            kept: Tensor = nms_per_class(
                boxes, scores, settings.nms_thresh, settings.max_detections
            )
            return kept
        return _nms_of_moved_boxes(boxes, scores, settings.nms_thresh, extent)


def _nms_of_moved_boxes(boxes: Tensor, scores: Tensor, iou_thresh: float, extent: int) -> Tensor:
    """Class-wise NMS in one: in float64, where moved boxes stay what they are."""
    classes, rows = (scores >= 0).nonzero(as_tuple=True)
    moved = boxes[rows].double() + (classes * (extent + 1.0))[:, None]
    keep = nms(moved, scores[classes, rows].double(), iou_thresh)
    return torch.stack([classes[keep], rows[keep]], dim=1)


@torch.library.custom_op("hierkd::nms_per_class", mutates_args=())
def nms_per_class(boxes: Tensor, scores: Tensor, iou_thresh: float, limit: int) -> Tensor:
    """Non-maximum suppression of each class by itself, as ONNX's ``NonMaxSuppression`` does it.

    Args:
        boxes: (A, 4) XYXY, not negative.
        scores: (K, A) of each class; what is negative is no candidate.
        iou_thresh: boxes of one class with an IoU over it exclude each other.
        limit: of the detections of a class; more than that never matter.

    Returns:
        (n, 2) class and box of what is kept.
    """
    kept = _nms_of_moved_boxes(boxes, scores, iou_thresh, int(boxes.max().ceil()))
    rank_in_class = torch.zeros_like(kept[:, 0])
    by_class = kept[:, 0].argsort(stable=True)
    classes = kept[by_class, 0]
    first = torch.searchsorted(classes, classes)
    rank_in_class[by_class] = torch.arange(len(kept), device=kept.device) - first
    return kept[rank_in_class < limit]


@nms_per_class.register_fake
def _(boxes: Tensor, scores: Tensor, iou_thresh: float, limit: int) -> Tensor:
    number = torch.library.get_ctx().new_dynamic_size()
    return boxes.new_empty(number, 2, dtype=torch.int64)


def _topk_filled(scores: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """``topk`` of a vector that may be shorter; the filling scores -1."""
    best, order = F.pad(scores, (0, number), value=_NO_CANDIDATE).topk(number)
    return best, order


def _best_of_levels(scores: Tensor, sizes: list[int], number: int) -> tuple[Tensor, Tensor]:
    """The best points of each level.

    Returns:
        (L x number,) positions in [0, R), and whether each is one or filling.
    """
    points, valid, start = [], [], 0
    for size in sizes:
        best, order = _topk_filled(scores[start : start + size], number)
        valid.append(best >= 0)
        points.append(torch.where(best >= 0, order + start, 0))
        start = start + size
    return torch.cat(points), torch.cat(valid)
