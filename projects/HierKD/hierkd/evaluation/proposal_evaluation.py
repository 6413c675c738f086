"""How many base and novel objects class-agnostic proposals cover (Table 1).

The paper's question is whether a region proposal network that saw base boxes alone proposes novel
objects, too. The answer is a recall per group of boxes; proposals have no class, so a group's
figure pools its boxes, whereas :mod:`hierkd.evaluation.split_coco_evaluation` averages classes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from detectron2.structures import BoxMode

from hierkd.evaluation.split_coco_evaluation import SplitCOCOEvaluator

__all__ = ["ProposalEvaluator"]

_IOU_THRESHOLDS = (0.5, 0.75)  # [Table 1]
_ANY_CLASS = 1  # category id of all boxes where classes do not matter


class ProposalEvaluator(SplitCOCOEvaluator):
    """Recall of an image's best proposals, for base, novel and all boxes of a dataset.

    Reads what detectron2's ``ProposalNetwork`` returns: ``proposals`` with ``proposal_boxes``
    (XYXY, absolute px of the stored image) and ``objectness_logits``.

    ``evaluate()`` returns ``{"box_proposals": {...}}`` (``{}`` outside the main process) with keys
    ``"<group>/AR<IoU>@<number>"``, for example ``"novel/AR50@100"``: the percentage of the group's
    boxes that one of the ``number`` best proposals of their image matches at that IoU, one box per
    proposal, as ``COCOeval`` counts where all boxes are of one class. Crowd regions are no boxes.
    A group without boxes is NaN; boxes of images without proposals count as missed (detectron2's
    own proposal evaluation leaves them out). Groups are those of
    :func:`~hierkd.evaluation.split_coco_evaluation.class_groups`.
    """

    federated = True  # recall asks what is boxed alone
    task = "box_proposals"

    def __init__(
        self, dataset_name: str, *, limits: Sequence[int] = (100, 300, 1000), **kwargs: Any
    ) -> None:
        """Read the ground truth of a registered dataset.

        Args:
            dataset_name: See :class:`SplitCOCOEvaluator`.
            limits: Numbers of proposals per image to report. [Table 1]
            **kwargs: See :class:`SplitCOCOEvaluator`.

        Raises:
            FileNotFoundError: See :class:`SplitCOCOEvaluator`.
            ValueError: Likewise; or a limit is not positive.
        """
        if not limits or min(limits) < 1:
            raise ValueError(f"limits must be positive numbers of proposals, got {list(limits)}")
        super().__init__(dataset_name, **kwargs)
        self._limits = sorted(limits)

    def _eval_box_proposals(self, predictions: list[dict[str, Any]]) -> None:
        """Evaluate the proposals; called by the parent."""
        self._check_images(predictions, None)
        found = []
        for each in predictions:
            proposals = each["proposals"]
            boxes = proposals.proposal_boxes.tensor
            boxes = BoxMode.convert(boxes, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS).tolist()
            for box, score in zip(boxes, proposals.objectness_logits.tolist(), strict=True):
                found.append({"image_id": each["image_id"], "bbox": box, "score": score})
        self._results[self.task] = self._figures(found, None)

    def _figures(
        self, found: list[dict[str, Any]], img_ids: Iterable[int] | None
    ) -> dict[str, float]:
        """Recall of the boxes of each group, in percent, and log it."""
        one_class = {"images": self._coco_api.dataset["images"], "categories": [{"id": _ANY_CLASS}]}
        for number, result in enumerate(found, start=1):
            area = result["bbox"][2] * result["bbox"][3]
            result.update(id=number, category_id=_ANY_CLASS, area=area, iscrowd=0)
        proposals = self._library.index(one_class, found)
        results: dict[str, float] = {}
        sizes = {}
        for group, names in self._groups.items():
            wanted = {self._category_ids[name] for name in names}
            boxes = [box for box in self._truth() if box["category_id"] in wanted]
            sizes[group] = sum(not box["iscrowd"] for box in boxes)
            run = self._library.run(
                self._library.index(
                    one_class, [{**box, "category_id": _ANY_CLASS} for box in boxes]
                ),
                proposals,
                iouThrs=np.array(_IOU_THRESHOLDS),
                areaRng=[[0, 1e10]],
                areaRngLbl=["all"],
                maxDets=self._limits,
            )
            recall = run.eval["recall"][:, 0, 0, :]  # (IoU, class, area, maxDets); -1: no box
            for (t, threshold), (m, limit) in itertools.product(
                enumerate(_IOU_THRESHOLDS), enumerate(self._limits)
            ):
                value = 100.0 * float(recall[t, m]) if recall[t, m] >= 0 else float("nan")
                results[f"{group}/AR{round(100 * threshold)}@{limit}"] = value
        self._log(results, "boxes", sizes)
        return results
