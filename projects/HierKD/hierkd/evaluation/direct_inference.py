"""CLIP direct inference (Algorithm 1, Table 6): the detector finds the boxes, CLIP names them.

The detector proposes: its best anchors per level ("fore anchors"), their decoded boxes and their
predicted IoUs. CLIP disposes: it looks at a crop of every box, and its class probabilities take the
place of the detector's own. The rest of inference is the detector's. One forward pass of CLIP per
box makes this far slower than the detector; it shows what is lost in distilling.

The paper's lines, which comments below refer to (C_N: the vocabulary of the test, M: the detector):

    1: T_N <- T(Prompt(C_N)) and normalize
    2: for I in D_T do
    3:   A_I <- M_anchor(I)
    4:   A_I^fore <- argmax_k(M_cls(A_I) x M_IOU(A_I))
    5:   V_I^fore <- V(I, M_loc(A_I^fore)) and normalize
    6:   S_I^fore <- Softmax(tau T_N V_I^fore)
    7:   B <- B u NMS(S_I^fore, box_I^fore)
    8: end

So the classes compete with each other alone, and the detector's scores choose the anchors, but do
not enter the result. A background, the IoU score as a factor, and larger crops are options.

Letters: A fore anchors of an image · K classes · D embedding size.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.data import MetadataCatalog
from detectron2.modeling.postprocessing import detector_postprocess
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from hierkd.evaluation.split_coco_evaluation import SplitCOCOEvaluator
from hierkd.modeling.detector import ForeAnchors, HierKD
from hierkd.modeling.inference import ClassProbabilities
from hierkd.teachers.protocol import Teacher

__all__ = ["DETECTOR", "CLIPScoring", "DirectInference"]

logger = logging.getLogger(__name__)

DETECTOR = "detector"
"""Name of the row of the detector's own probabilities among the results."""


@dataclass(frozen=True)
class CLIPScoring:
    """How CLIP's embedding of a crop becomes class scores (line 6).

    Attributes:
        logit_scale: tau, which multiplies the cosines; None takes the teacher's own, which a
            released CLIP has at 100. [paper §4.2]
        background: What competes with the classes in the softmax: "none"; "learned", the detector's
            background embedding; "text", the prompt that it started from. [Algorithm 1: none]
        fuse_quality: Multiply the probabilities by the predicted IoU. [Algorithm 1: no; the
            release does]
    """

    logit_scale: float | None = None
    background: str = "none"
    fuse_quality: bool = False

    @property
    def name(self) -> str:
        """A short name for tables, e.g. "tau own, background none"."""
        tau = "own" if self.logit_scale is None else f"{self.logit_scale:g}"
        factor = ", times IoU" if self.fuse_quality else ""
        return f"tau {tau}, background {self.background}{factor}"


@dataclass
class DirectInference:
    """Algorithm 1 for batches of images, under any number of scorings at once.

    CLIP's embeddings of the crops are the expensive part and do not depend on the scoring, so they
    are computed once for all of them. The teacher is given all boxes of a batch in one call and
    splits them into parts of bounded size itself.

    Crops come from the network input, the resized raw image without normalisation and padding:
    the boxes are in that frame, it is the one that the distillation crops (§3.2) and the release
    look at, and no box has to be mapped back and forth.

    Attributes:
        model: The detector in eval mode, with its teacher. How many anchors a level keeps, how many
            (box, class) pairs go to NMS, and its threshold, are its own settings (``*_TEST``).
        scorings: The ways to score; their names differ.
        crop_scale: Side of the crop over side of the box. [Algorithm 1: the box itself]
        max_anchors: Fore anchors of an image over all levels, the best ones; 0 sets no limit, as in
            the paper. [ours: a CPU can afford about 100]
        background_prompt: Text of the background "text".
    """

    model: HierKD
    scorings: Sequence[CLIPScoring] = (CLIPScoring(),)
    crop_scale: float = 1.0
    max_anchors: int = 0
    background_prompt: str = "a photo of background."

    @property
    def _teacher(self) -> Teacher:
        return self.model.teacher  # type: ignore[return-value]  # a config always builds one

    @torch.no_grad()
    def __call__(self, batched_inputs: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
        """Detect under every scoring, and with the detector's own probabilities.

        Args:
            batched_inputs: As in inference of the detector.

        Returns:
            Name of the scoring, or :data:`DETECTOR`, to outputs in detectron2's format, one per
            image. :data:`DETECTOR` is what the detector itself gives, but for ``max_anchors``.
        """
        fore = self.model.fore_anchors(batched_inputs)  # lines 3 and 4
        if self.max_anchors:
            fore = [of_image.best(self.max_anchors) for of_image in fore]
        boxes = [of_image.boxes for of_image in fore]
        embeddings = self.model.embed_boxes(batched_inputs, boxes, self.crop_scale)  # line 5
        outputs = {DETECTOR: self._detect(batched_inputs, fore, [f.classes for f in fore])}
        for scoring in self.scorings:
            probs = [self.class_probabilities(v, scoring) for v in embeddings]  # line 6
            outputs[scoring.name] = self._detect(
                batched_inputs, fore, probs, fuse_quality=scoring.fuse_quality
            )
        return outputs

    def class_probabilities(self, region_embeddings: Tensor, scoring: CLIPScoring) -> Tensor:
        """Classify regions by CLIP (line 6).

        Args:
            region_embeddings: (A, D), L2-normalised.
            scoring: How.

        Returns:
            (A, K) probabilities of the model's vocabulary; a background's is left out.
        """
        classifier, teacher = self.model.text_classifier, self._teacher
        texts = [classifier.text_embeddings]  # line 1
        if scoring.background == "learned":
            texts.append(F.normalize(classifier.background_embedding, dim=0)[None])
        elif scoring.background == "text":
            texts.append(teacher.encode_captions([self.background_prompt]).to(texts[0]))
        scale = teacher.logit_scale if scoring.logit_scale is None else scoring.logit_scale
        logits = scale * region_embeddings @ torch.cat(texts).T
        return logits.softmax(dim=1)[:, : classifier.num_classes]

    def _detect(
        self,
        batched_inputs: list[dict[str, Any]],
        fore: Sequence[ForeAnchors],
        probs: Sequence[Tensor | ClassProbabilities],
        *,
        fuse_quality: bool = True,
    ) -> list[dict[str, Any]]:
        """NMS (line 7), within each class, and back to the size of the stored picture."""
        outputs = []
        for given, anchors, of_image in zip(batched_inputs, fore, probs, strict=True):
            size = (given["image"].shape[1], given["image"].shape[2])
            qualities = anchors.qualities if fuse_quality else torch.ones_like(anchors.qualities)
            found = self.model.detect_classes(anchors.boxes, of_image, qualities, size)
            height, width = given.get("height", size[0]), given.get("width", size[1])
            outputs.append({"instances": detector_postprocess(found, height, width)})
        return outputs

    def evaluate(
        self, data_loader: Iterable[list[dict[str, Any]]], dataset_name: str, max_detections: int
    ) -> dict[str, dict[str, float]]:
        """Measure on a registered dataset, with its vocabulary; the model's own comes back.

        Args:
            data_loader: Batches of the dataset, as for testing.
            dataset_name: Its name.
            max_detections: Detections that count per image.

        Returns:
            :data:`DETECTOR` and the name of each scoring to :class:`SplitCOCOEvaluator`'s figures.
        """
        names = (DETECTOR, *(scoring.name for scoring in self.scorings))
        evaluators = {
            name: SplitCOCOEvaluator(
                dataset_name, distributed=False, max_dets_per_image=max_detections
            )
            for name in names
        }
        with self.model.vocabulary(MetadataCatalog.get(dataset_name).thing_classes):
            progress = tqdm(data_loader, desc=f"CLIP on {dataset_name}", unit="batch")
            for batched_inputs in progress:  # line 2
                outputs = self(batched_inputs)
                for name, evaluator in evaluators.items():
                    evaluator.process(batched_inputs, outputs[name])
        figures = {}
        for name, evaluator in evaluators.items():
            logger.info("%s, %s:", dataset_name, name)  # the evaluator logs its table
            figures[name] = dict(evaluator.evaluate()["bbox"])
        return figures
