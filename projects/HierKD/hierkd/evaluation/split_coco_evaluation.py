"""COCO evaluation of base, novel and all classes apart (paper §4.1: ZSD and GZSD).

One COCOeval run over the dataset's vocabulary gives a precision and a recall per class; a group's
figure is the plain mean over its classes that have ground truth. So ZSD is this evaluator on a
dataset whose vocabulary holds the novel classes alone, and GZSD is the same evaluator on one whose
vocabulary is the union.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from detectron2.evaluation import COCOEvaluator
from detectron2.utils import comm
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tabulate import tabulate  # type: ignore[import-untyped]

logger = logging.getLogger(__name__)

FloatArray = NDArray[np.float64]

GROUPS = ("base", "novel", "all")
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR50")

# Positions in COCOeval's accumulated arrays: precision is (IoU, recall, class, area, maxDets),
# recall lacks the second axis. IoU thresholds are .50:.05:.95, areas are all, small (< 32^2 px),
# medium, large (>= 96^2 px).
_IOU_50, _IOU_75 = 0, 5
_AREA_ALL, _AREA_SMALL, _AREA_MEDIUM, _AREA_LARGE = range(4)


class SplitCOCOEvaluator(COCOEvaluator):  # type: ignore[misc]
    """Box AP and recall for the base classes, the novel classes and all classes of a dataset.

    Collecting predictions, gathering them over processes and writing them to ``output_dir`` is
    :class:`detectron2.evaluation.COCOEvaluator`'s; this class decides what is averaged.

    ``evaluate()`` returns ``{"bbox": {...}}`` (``{}`` outside the main process) with keys
    ``"<group>/<metric>"``, group one of base, novel, all and metric one of AP, AP50, AP75, APs,
    APm, APl and AR50 (recall at IoU 0.5 with at most ``max_dets_per_image`` detections), and
    ``"AP50-<class name>"``, all in percent. A group without any ground truth is NaN; one with
    ground truth and no detections is 0.

    Which groups: base and novel where the vocabulary holds classes of them; ``all`` (base and novel
    together) only where it holds both, for otherwise it would repeat the one group. A dataset that
    declares neither has ``all`` alone, over its whole vocabulary.
    """

    def __init__(
        self,
        dataset_name: str,
        *,
        distributed: bool = True,
        output_dir: str | None = None,
        max_dets_per_image: int = 100,
    ) -> None:
        """Read the ground truth of a registered dataset.

        Args:
            dataset_name: Registered dataset whose metadata has ``json_file``, ``thing_classes``,
                ``base_classes`` and ``novel_classes``
                (:func:`hierkd.data.datasets.register_ovd_dataset`).
            distributed: Gather the predictions of all processes and evaluate in the main one.
            output_dir: Folder for the raw predictions; none are written without it.
            max_dets_per_image: Detections kept per image and class, highest scores first. 100 is
                COCO's and the paper's.

        Raises:
            ValueError: The dataset lacks one of these metadata, or its JSON lacks a class of the
                vocabulary.
        """
        super().__init__(
            dataset_name,
            tasks=("bbox",),
            distributed=distributed,
            output_dir=output_dir,
            max_dets_per_image=max_dets_per_image,
            use_fast_impl=False,
        )
        self._dataset_name = dataset_name
        self._max_dets = max_dets_per_image
        self._category_ids = self._find_category_ids()
        self._groups = class_groups(
            list(self._category_ids),
            self._metadata.get("base_classes", ()),
            self._metadata.get("novel_classes", ()),
        )
        for annotation in self._coco_api.dataset.get("annotations", []):
            # COCOeval reads both without asking; detectron2's loader demands neither.
            annotation.setdefault("iscrowd", 0)
            annotation.setdefault("area", annotation["bbox"][2] * annotation["bbox"][3])

    def evaluate(self, img_ids: Iterable[int] | None = None) -> dict[str, dict[str, float]]:
        """Compute the figures; no processed image at all counts as no detections."""
        results: dict[str, dict[str, float]] = super().evaluate(img_ids)
        if not results and self._do_evaluation and comm.is_main_process():
            results = OrderedDict(bbox=self._derive_coco_results(None, "bbox"))
        return results

    def _eval_predictions(
        self, predictions: list[dict[str, Any]], img_ids: Iterable[int] | None = None
    ) -> None:
        """Evaluate as the parent does, without what COCOeval prints: the table says it better."""
        with contextlib.redirect_stdout(io.StringIO()):
            super()._eval_predictions(predictions, img_ids=img_ids)

    def _derive_coco_results(
        self, coco_eval: COCOeval | None, iou_type: str, class_names: list[str] | None = None
    ) -> dict[str, float]:
        """Average per-class figures over the groups (``None``: there are no detections)."""
        if coco_eval is None:
            logger.warning("No detections on %s: every class counts as missed.", self._dataset_name)
            coco_eval = self._evaluate_without_detections()
        per_class = per_class_metrics(coco_eval, self._category_ids, self._max_dets)
        positions = {name: k for k, name in enumerate(self._category_ids)}
        results = {
            f"{group}/{metric}": nan_mean(per_class[metric][[positions[name] for name in names]])
            for group, names in self._groups.items()
            for metric in METRICS
        }
        logger.info("%s (percent):\n%s", self._dataset_name, self._format_table(results))
        results.update(  # detectron2's one-line summary leaves keys with a hyphen out
            {
                f"AP50-{name}": float(value)
                for name, value in zip(self._category_ids, per_class["AP50"], strict=True)
            }
        )
        return results

    def _evaluate_without_detections(self) -> COCOeval:
        """Run COCOeval against an empty result set, which COCO's own ``loadRes`` refuses."""
        with contextlib.redirect_stdout(io.StringIO()):
            detections = COCO()
            detections.dataset = {**self._coco_api.dataset, "annotations": []}
            detections.createIndex()
            coco_eval = COCOeval(self._coco_api, detections, "bbox")
            coco_eval.params.maxDets = self._max_dets_per_image
            coco_eval.evaluate()
            coco_eval.accumulate()
        return coco_eval

    def _find_category_ids(self) -> dict[str, int]:
        """Map each class of the vocabulary, in order, to its id in the JSON; both must agree."""
        json_file = self._metadata.json_file
        vocabulary = self._metadata.get("thing_classes")
        if not vocabulary:
            raise ValueError(f"dataset {self._dataset_name!r} has no thing_classes in its metadata")
        ids = {
            category["name"]: category["id"] for category in self._coco_api.dataset["categories"]
        }
        missing = [name for name in vocabulary if name not in ids]
        if missing:
            raise ValueError(
                f"{json_file}: categories {missing} of dataset {self._dataset_name!r} are missing; "
                f"found {sorted(ids)}"
            )
        category_ids = {name: ids[name] for name in vocabulary}
        mapping = {category_id: index for index, category_id in enumerate(category_ids.values())}
        # The loader may not have run yet; the parent needs this to turn indices back into ids.
        known = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if known is None:
            self._metadata.thing_dataset_id_to_contiguous_id = mapping
        elif dict(known) != mapping:
            raise ValueError(
                f"{json_file}: expected the category ids of dataset {self._dataset_name!r}, "
                f"{dict(known)}; found {mapping}"
            )
        return category_ids

    def _format_table(self, results: Mapping[str, float]) -> str:
        rows = [
            [group, len(names), *(results[f"{group}/{metric}"] for metric in METRICS)]
            for group, names in self._groups.items()
        ]
        headers = ["group", "classes", *METRICS]
        return str(tabulate(rows, headers=headers, tablefmt="github", floatfmt=".1f"))


def class_groups(
    vocabulary: Sequence[str], base: Iterable[str], novel: Iterable[str]
) -> dict[str, list[str]]:
    """Group the names of a vocabulary into base, novel and all.

    Args:
        vocabulary: Names in contiguous-id order.
        base: The base names of the split; they may go beyond the vocabulary.
        novel: The novel names, likewise.

    Returns:
        Group to its names in vocabulary order: base and novel where the vocabulary has some; all,
        base and novel together, only where it has both; all names where neither is declared.
    """
    members = {"base": set(base), "novel": set(novel)}
    groups = {
        group: [name for name in vocabulary if name in names] for group, names in members.items()
    }
    groups = {group: names for group, names in groups.items() if names}
    if len(groups) == 1:
        return groups
    declared = members["base"] | members["novel"]
    return groups | {"all": [name for name in vocabulary if not declared or name in declared]}


def per_class_metrics(
    coco_eval: COCOeval, category_ids: Mapping[str, int], max_dets_per_image: int = 100
) -> dict[str, FloatArray]:
    """Every metric of :data:`METRICS` for every class, in percent; NaN without ground truth.

    Args:
        coco_eval: An accumulated ``COCOeval`` with COCO's IoU thresholds and areas.
        category_ids: Class name to COCO id: the K classes wanted, in the order wanted.
        max_dets_per_image: Which of the run's ``maxDets``.

    Returns:
        Metric name to a (K,) array.
    """
    columns = [list(coco_eval.params.catIds).index(i) for i in category_ids.values()]
    # By value: COCOeval sorts maxDets, so the wanted one need not be the last.
    limit = list(coco_eval.params.maxDets).index(max_dets_per_image)
    precision: FloatArray = coco_eval.eval["precision"][..., limit][:, :, columns]
    recall: FloatArray = coco_eval.eval["recall"][..., limit][:, columns]

    def in_percent(fraction: FloatArray) -> FloatArray:
        """Mean over all axes but the last, K; COCOeval marks classes without ground truth by -1."""
        mean = fraction.reshape(-1, len(columns)).mean(axis=0)
        return np.where(mean < 0, np.nan, 100.0 * mean)

    return {
        "AP": in_percent(precision[:, :, :, _AREA_ALL]),
        "AP50": in_percent(precision[_IOU_50, :, :, _AREA_ALL]),
        "AP75": in_percent(precision[_IOU_75, :, :, _AREA_ALL]),
        "APs": in_percent(precision[:, :, :, _AREA_SMALL]),
        "APm": in_percent(precision[:, :, :, _AREA_MEDIUM]),
        "APl": in_percent(precision[:, :, :, _AREA_LARGE]),
        "AR50": in_percent(recall[_IOU_50, :, _AREA_ALL]),
    }


def nan_mean(values: FloatArray) -> float:
    """Mean of the values that are not NaN; NaN, without a warning, where there are none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")
