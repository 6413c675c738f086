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
not enter the result. The IoU score as a factor and larger crops are options.

Letters: A fore anchors of an image · K classes · D embedding size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.data import MetadataCatalog
from detectron2.modeling.postprocessing import detector_postprocess
from torch import Tensor
from tqdm import tqdm

from hierkd.evaluation.split_coco_evaluation import SplitCOCOEvaluator
from hierkd.modeling.detector import HierKD

__all__ = ["DirectInference"]


@dataclass
class DirectInference:
    """Algorithm 1 for batches of images.

    Crops come from the network input, the resized raw image without normalisation and padding:
    the boxes are in that frame, it is the one that the distillation crops (§3.2) and the release
    look at, and no box has to be mapped back and forth.

    Attributes:
        model: The detector in eval mode, with its teacher. How many anchors a level keeps, how many
            (box, class) pairs go to NMS, and its threshold, are its own settings (``*_TEST``).
        crop_scale: Side of the crop over side of the box. [Algorithm 1: the box itself]
        max_anchors: Fore anchors of an image over all levels, the best ones; 0 sets no limit, as in
            the paper. [ours: a CPU can afford about 100]
        fuse_quality: Multiply the probabilities by the predicted IoU. [Algorithm 1: no; the
            release does]
    """

    model: HierKD
    crop_scale: float = 1.0
    max_anchors: int = 0
    fuse_quality: bool = False

    @torch.no_grad()
    def __call__(self, batched_inputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Detect; inputs and outputs are those of the detector's inference."""
        fore = self.model.fore_anchors(batched_inputs)  # lines 3 and 4
        if self.max_anchors:
            fore = [of_image.best(self.max_anchors) for of_image in fore]
        boxes = [of_image.boxes for of_image in fore]
        embeddings = self.model.embed_boxes(batched_inputs, boxes, self.crop_scale)  # line 5
        outputs = []
        for given, anchors, seen in zip(batched_inputs, fore, embeddings, strict=True):
            size = (given["image"].shape[1], given["image"].shape[2])
            one = torch.ones_like(anchors.qualities)
            qualities = anchors.qualities if self.fuse_quality else one
            probs = self.class_probabilities(seen)  # line 6
            found = self.model.detect_classes(anchors.boxes, probs, qualities, size)  # line 7
            height, width = given.get("height", size[0]), given.get("width", size[1])
            outputs.append({"instances": detector_postprocess(found, height, width)})
        return outputs

    def class_probabilities(self, region_embeddings: Tensor) -> Tensor:
        """Classify regions by CLIP (line 6), whose own logit scale is the paper's tau, 100.

        Args:
            region_embeddings: (A, D), L2-normalised.

        Returns:
            (A, K) probabilities of the model's vocabulary.
        """
        texts = self.model.text_classifier.text_embeddings  # line 1
        scale = self.model.teacher.logit_scale  # type: ignore[union-attr]  # a config builds one
        return (scale * region_embeddings @ texts.T).softmax(dim=1)

    def evaluate(
        self, data_loader: Iterable[list[dict[str, Any]]], dataset_name: str, max_detections: int
    ) -> dict[str, float]:
        """Measure on a registered dataset, with its vocabulary; the model's own comes back.

        Args:
            data_loader: Batches of the dataset, as for testing.
            dataset_name: Its name.
            max_detections: Detections that count per image.

        Returns:
            :class:`SplitCOCOEvaluator`'s figures.
        """
        evaluator = SplitCOCOEvaluator(
            dataset_name, distributed=False, max_dets_per_image=max_detections
        )
        with self.model.vocabulary(MetadataCatalog.get(dataset_name).thing_classes):
            progress = tqdm(data_loader, desc=f"CLIP on {dataset_name}", unit="batch")
            for batched_inputs in progress:  # line 2
                evaluator.process(batched_inputs, self(batched_inputs))
        return dict(evaluator.evaluate()["bbox"])
