"""How many base and novel objects class-agnostic proposals cover (Table 1).

The paper's question is whether a region proposal network that saw base boxes alone proposes novel
objects, too. The answer is a recall per group of boxes; proposals have no class, so a group's
figure pools its boxes, whereas :mod:`hierkd.evaluation.split_coco_evaluation` averages classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from detectron2.structures import BoxMode

from hierkd.evaluation.coco_eval import match_boxes
from hierkd.evaluation.split_coco_evaluation import SplitCOCOEvaluator

__all__ = ["ProposalEvaluator"]

_IOU_THRESHOLDS = (0.5, 0.75)  # [Table 1]
_LIMITS = (100, 300, 1000)  # proposals per image [Table 1]


class ProposalEvaluator(SplitCOCOEvaluator):
    """Recall of an image's best proposals, for base, novel and all boxes of a dataset.

    Reads what detectron2's ``ProposalNetwork`` returns: ``proposals`` with ``proposal_boxes``
    (XYXY, absolute px of the stored image) and ``objectness_logits``.

    ``evaluate()`` returns ``{"box_proposals": {...}}`` (``{}`` outside the main process) with keys
    ``"<group>/AR<IoU>@<number>"``, for example ``"novel/AR50@100"``: the percentage of the group's
    boxes that one of the ``number`` best proposals of their image matches at that IoU, one box per
    proposal, as ``COCOeval`` counts where all boxes are of one class. Crowd regions are no boxes.
    A group without boxes is NaN; boxes of images without proposals count as missed (detectron2's
    own proposal evaluation leaves them out). Groups are those of the parent.
    """

    federated = True  # recall asks what is boxed alone

    def _eval_box_proposals(self, predictions: list[dict[str, Any]]) -> None:
        """Evaluate the proposals; called by the parent."""
        self._check_images(predictions)
        found = []
        for each in predictions:
            proposals = each["proposals"]
            boxes = proposals.proposal_boxes.tensor
            boxes = BoxMode.convert(boxes, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS).tolist()
            for box, score in zip(boxes, proposals.objectness_logits.tolist(), strict=True):
                found.append(
                    {"image_id": each["image_id"], "category_id": 1, "bbox": box, "score": score}
                )
        one_class = {**self._truth, "categories": [{"id": 1}]}
        results, sizes = {}, {}
        for group, names in self._groups.items():
            wanted = {self._category_ids[name] for name in names}
            boxes = [b for b in self._truth["annotations"] if b["category_id"] in wanted]
            sizes[group] = sum(not box.get("iscrowd", 0) for box in boxes)
            run = match_boxes(
                one_class,
                [{**box, "category_id": 1} for box in boxes],
                found,
                iouThrs=np.array(_IOU_THRESHOLDS),
                areaRng=[[0, 1e10]],
                areaRngLbl=["all"],
                maxDets=list(_LIMITS),
            )
            recall = run.eval["recall"][:, 0, 0, :]  # (IoU, class, area, maxDets); -1: no box
            for t, threshold in enumerate(_IOU_THRESHOLDS):
                for value, limit in zip(recall[t].tolist(), _LIMITS, strict=True):
                    key = f"{group}/AR{round(100 * threshold)}@{limit}"
                    results[key] = 100.0 * value if value >= 0 else float("nan")
        self._log(results, "boxes", sizes)
        self._results["box_proposals"] = results
