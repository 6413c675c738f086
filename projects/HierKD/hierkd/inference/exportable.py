"""Inference of one picture as one graph: what :mod:`hierkd.inference.export` writes to a file.

The layers of a detector are followed by the functions of :mod:`hierkd.modeling.inference`, on the
probabilities of all points and classes as one array. Only what precedes and follows them is a
graph's own: pixels, padding, and an NMS that asks no tensor for its values.

Letters: H, W size of the picture · R points of all levels · D embedding size · K classes.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import nms

from hierkd.modeling.detector import HierKD
from hierkd.modeling.inference import (
    ClassProbabilities,
    best_detections,
    class_probabilities,
    flatten_maps,
    nms_of_classes,
    rank_points,
)

__all__ = ["ExportableDetector", "nms_operator"]


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
        with_nms_operator: bool = False,
    ) -> None:
        """Wrap a detector, whose current vocabulary becomes part of the graph.

        Args:
            detector: In eval mode, float32.
            image_format: Channel order that the detector was trained with, "RGB" or "BGR"; the
                graph itself takes RGB.
            vocabulary_as_input: Take the class embeddings with every picture instead.
            with_nms_operator: Leave non-maximum suppression as one operator, :func:`nms_operator`,
                for which an exporter has operators of its own.

        Raises:
            ValueError: The vocabulary is an input, but inference depends on its names; there is no
                vocabulary; or the backbone wants square pictures.
        """
        super().__init__()
        if (detector.backbone.padding_constraints or {}).get("square_size", 0):
            raise ValueError("backbones that pad pictures to a square cannot be exported")
        if vocabulary_as_input and detector.inference_settings.novel_logit_shift:
            raise ValueError(
                "MODEL.ATSS.NOVEL_LOGIT_SHIFT depends on the class names, so that the vocabulary "
                "has to be part of the exported graph, or the shift 0"
            )
        if not vocabulary_as_input and not detector.vocabulary_names:
            raise ValueError("the vocabulary is empty: set one before exporting")
        self.settings = detector.inference_settings
        self.is_bgr = image_format == "BGR"
        self.vocabulary_as_input = vocabulary_as_input
        self.with_nms_operator = with_nms_operator
        self.backbone, self.head = detector.backbone, detector.head
        self.head_in_features = list(detector.head_in_features)
        self.text_classifier = detector.text_classifier
        self.anchor_generator = detector.anchor_generator
        self.box2box_transform = detector.box2box_transform
        self.register_buffer("pixel_mean", detector.pixel_mean.detach().clone())
        self.register_buffer("pixel_std", detector.pixel_std.detach().clone())
        self.register_buffer("novel_shift", detector.novel_logit_shifts())

    def forward(
        self, image: Tensor, text_embeddings: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Detect.

        Args:
            image: (H, W, 3) uint8, RGB, resized as for testing.
            text_embeddings: (K, D) class embeddings, of any length, if they are an input.

        Returns:
            boxes (n, 4) XYXY in pixels of ``image``, scores (n,) best first, classes (n,) int64.
        """
        height, width = image.shape[:2]
        by_name = self.backbone(self._pixels(image))
        features = [by_name[name] for name in self.head_in_features]
        predictions = flatten_maps(self.head(features)).of_image(0)
        weight = self.text_classifier.weight()
        if text_embeddings is not None:
            rows = F.normalize(text_embeddings, dim=1)
            weight = torch.cat([rows, self.text_classifier.background()[None]])
        logits = self.text_classifier(predictions.embeddings, weight)
        fore = rank_points(
            predictions,
            ClassProbabilities.of(class_probabilities(logits, self.novel_shift)),
            [level.tensor for level in self.anchor_generator(features)],
            self.box2box_transform,
            (height, width),
            self.settings.topk_anchors,
        )
        moving = partial(_nms_of_moved_boxes, width + height)
        suppress = nms_operator if self.with_nms_operator else moving
        boxes, scores, classes = best_detections(*fore, self.settings, suppress)
        nonempty = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        (found,) = nonempty.nonzero(as_tuple=True)
        return boxes[found], scores[found], classes[found]

    def _pixels(self, image: Tensor) -> Tensor:
        """(1, 3, H', W') normalised and padded to what the backbone divides by."""
        pixels = image.permute(2, 0, 1).float()
        if self.is_bgr:
            pixels = pixels.flip(0)
        pixels = (pixels - self.pixel_mean) / self.pixel_std
        stride = self.backbone.size_divisibility
        if stride > 1:
            # Written so that a tracer sees multiples of the stride come out, h + (s * n - h).
            bottom, right = (
                stride * ((side + stride - 1) // stride) - side for side in pixels.shape[1:]
            )
            pixels = F.pad(pixels, (0, right, 0, bottom))
        return pixels[None]


def _nms_of_moved_boxes(
    extent: int, boxes: Tensor, scores: Tensor, classes: Tensor, iou_thresh: float, limit: int
) -> Tensor:
    """:func:`nms_of_classes` of boxes within ``extent`` pixels, in one: moved apart in float64."""
    moved = boxes.double() + (classes * (extent + 1.0))[:, None]
    keep: Tensor = nms(moved, scores.double(), iou_thresh)
    (first,) = (torch.ones_like(keep).cumsum(0) <= limit).nonzero(as_tuple=True)
    return keep[first]


@torch.library.custom_op("hierkd::nms_of_classes", mutates_args=())
def nms_operator(
    boxes: Tensor, scores: Tensor, classes: Tensor, iou_thresh: float, limit: int
) -> Tensor:
    """:func:`hierkd.modeling.inference.nms_of_classes` as an operator of its own."""
    return nms_of_classes(boxes, scores, classes, iou_thresh, limit).clone()


@nms_operator.register_fake
def _(boxes: Tensor, scores: Tensor, classes: Tensor, iou_thresh: float, limit: int) -> Tensor:
    return boxes.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)
