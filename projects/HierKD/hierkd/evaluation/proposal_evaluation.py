"""How many base and novel objects class-agnostic proposals cover (Table 1).

The paper's question is whether a region proposal network that saw base boxes alone proposes novel
objects, too. The answer is a recall per group of boxes; proposals have no class, so a group's
figure pools its boxes, whereas :mod:`hierkd.evaluation.split_coco_evaluation` averages classes.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Boxes, BoxMode
from detectron2.utils import comm
from numpy.typing import NDArray
from tabulate import tabulate  # type: ignore[import-untyped]

from hierkd.data.coco_json import shown
from hierkd.evaluation.coco_eval import COCOLibrary, choose_library
from hierkd.evaluation.completeness import check_each_image_once
from hierkd.evaluation.ground_truth import read_ground_truth
from hierkd.evaluation.split_coco_evaluation import class_groups

__all__ = ["ProposalEvaluator"]

logger = logging.getLogger(__name__)

FloatArray = NDArray[np.float64]

_IOU_THRESHOLDS = (0.5, 0.75)  # [Table 1]
_ANY_CLASS = 1  # category id of all boxes where classes do not matter


class ProposalEvaluator(DatasetEvaluator):  # type: ignore[misc]  # detectron2 is untyped
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

    def __init__(
        self,
        dataset_name: str,
        *,
        distributed: bool = True,
        limits: Sequence[int] = (100, 300, 1000),
        use_fast_impl: bool = True,
        complete: bool = False,
    ) -> None:
        """Read the ground truth of a registered dataset.

        Args:
            dataset_name: Registered dataset whose metadata has ``json_file``, ``thing_classes``,
                ``base_classes`` and ``novel_classes``.
            distributed: Gather the proposals of all processes and evaluate in the main one.
            limits: Numbers of proposals per image to report. [Table 1]
            use_fast_impl: Evaluate with faster-coco-eval where it can be imported. The figures are
                those of pycocotools, which serves otherwise.
            complete: Whether ``evaluate()`` refuses to leave out images that were not processed.

        Raises:
            FileNotFoundError: There is no such JSON.
            ValueError: The dataset lacks one of these metadata, or its JSON is broken or lacks a
                class of the vocabulary; or a limit is not positive.
        """
        if not limits or min(limits) < 1:
            raise ValueError(f"limits must be positive numbers of proposals, got {list(limits)}")
        self._dataset_name = dataset_name
        self._distributed = distributed
        self._complete = complete
        self._limits = sorted(limits)
        metadata = MetadataCatalog.get(dataset_name)
        vocabulary = metadata.get("thing_classes")
        json_file = metadata.get("json_file")
        if not vocabulary or not json_file:
            raise ValueError(
                f"dataset {dataset_name!r} needs thing_classes and json_file in its metadata, "
                f"found {vocabulary!r} and {json_file!r}"
            )
        self._dataset = read_ground_truth(json_file)
        self._groups = self._find_groups(
            class_groups(
                vocabulary, metadata.get("base_classes", ()), metadata.get("novel_classes", ())
            ),
            json_file,
        )
        image_ids = [image["id"] for image in self._dataset["images"]]
        self._image_ids = frozenset(image_ids)
        self._library = choose_library(image_ids, use_fast_impl=use_fast_impl)
        self.reset()

    def reset(self) -> None:
        """Forget all proposals."""
        self._proposals: list[tuple[int | str, FloatArray, FloatArray]] = []

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Keep each image's best proposals, as XYWH boxes and logits."""
        for given, output in zip(inputs, outputs, strict=True):
            proposals = output["proposals"].to("cpu")
            best = proposals.objectness_logits.argsort(descending=True, stable=True)
            proposals = proposals[best[: self._limits[-1]]]
            boxes: Boxes = proposals.proposal_boxes
            as_xywh = BoxMode.convert(boxes.tensor, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
            self._proposals.append(
                (given["image_id"], as_xywh.numpy(), proposals.objectness_logits.numpy())
            )

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Compute the recalls; see the class.

        Raises:
            ValueError: An image was processed twice, be it by two processes; or, if ``complete``,
                one was not processed.
        """
        proposals = self._proposals
        if self._distributed:
            comm.synchronize()
            proposals = list(itertools.chain(*comm.gather(proposals, dst=0)))
            if not comm.is_main_process():
                return {}
        check_each_image_once(
            (image_id for image_id, _, _ in proposals),
            self._image_ids,
            self._dataset_name,
            complete=self._complete,
        )
        one_class = {"images": self._dataset["images"], "categories": [{"id": _ANY_CLASS}]}
        found = self._library.index(one_class, _as_annotations(proposals))
        results: dict[str, float] = {}
        for group, boxes in self._groups.items():
            of_group = [{**box, "category_id": _ANY_CLASS} for box in boxes]
            wanted = self._library.index(one_class, of_group)
            recalls = _recalls(self._library, wanted, found, self._limits)
            for (threshold, limit), recall in recalls.items():
                results[f"{group}/AR{round(100 * threshold)}@{limit}"] = recall
        logger.info(
            "%s (percent; %s):\n%s",
            self._dataset_name,
            self._library.name,
            self._format_table(results),
        )
        return {"box_proposals": results}

    def _find_groups(
        self, groups: Mapping[str, Sequence[str]], json_file: str
    ) -> dict[str, list[dict[str, Any]]]:
        """The annotations of each group of classes."""
        ids = {category["name"]: category["id"] for category in self._dataset["categories"]}
        missing = sorted({name for names in groups.values() for name in names} - set(ids))
        if missing:
            raise ValueError(
                f"{json_file}: categories {missing} of dataset {self._dataset_name!r} are missing; "
                f"found {shown(sorted(ids))}"
            )
        boxes: list[dict[str, Any]] = self._dataset["annotations"]
        members = {group: {ids[name] for name in names} for group, names in groups.items()}
        return {
            group: [box for box in boxes if box["category_id"] in wanted]
            for group, wanted in members.items()
        }

    def _format_table(self, results: Mapping[str, float]) -> str:
        metrics = list(dict.fromkeys(key.partition("/")[2] for key in results))
        rows = [
            [
                group,
                sum(not box["iscrowd"] for box in boxes),
                *(results[f"{group}/{metric}"] for metric in metrics),
            ]
            for group, boxes in self._groups.items()
        ]
        headers = ["group", "boxes", *metrics]
        return str(tabulate(rows, headers=headers, tablefmt="github", floatfmt=".1f"))


def _as_annotations(
    proposals: Sequence[tuple[int | str, FloatArray, FloatArray]],
) -> list[dict[str, Any]]:
    """Proposals as COCO's detections."""
    numbers = itertools.count(1)
    return [
        {
            "id": next(numbers),
            "image_id": image_id,
            "category_id": _ANY_CLASS,
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": 0,
            "score": score,
        }
        for image_id, boxes, logits in proposals
        for box, score in zip(boxes.tolist(), logits.tolist(), strict=True)
    ]


def _recalls(
    library: COCOLibrary, wanted: Any, found: Any, limits: Sequence[int]
) -> dict[tuple[float, int], float]:
    """Recall, in percent, per IoU threshold and number of proposals.

    Args:
        library: Whose indices the next two are.
        wanted: The boxes to be found, of one class.
        found: The proposals, likewise.
        limits: Numbers of proposals per image, ascending.

    Returns:
        (IoU threshold, limit) -> percent; NaN if there is no box to be found.
    """
    run = library.run(
        wanted,
        found,
        iouThrs=np.array(_IOU_THRESHOLDS),
        areaRng=[[0, 1e10]],
        areaRngLbl=["all"],
        maxDets=list(limits),
    )
    recall = run.eval["recall"][:, 0, 0, :]  # (IoU, class, area, maxDets); -1: no box
    return {
        (threshold, limit): 100.0 * float(recall[t, m]) if recall[t, m] >= 0 else float("nan")
        for t, threshold in enumerate(_IOU_THRESHOLDS)
        for m, limit in enumerate(limits)
    }
