"""COCO evaluation of base, novel and all classes apart (paper §4.1: ZSD and GZSD).

One COCOeval run over the dataset's vocabulary gives a precision and a recall per class; a group's
figure is the plain mean over its classes that have ground truth. So ZSD is this evaluator on a
dataset whose vocabulary holds the novel classes alone, and GZSD is the same evaluator on one whose
vocabulary is the union.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.utils import comm
from numpy.typing import NDArray
from tabulate import tabulate  # type: ignore[import-untyped]

from hierkd.data.coco_json import shown
from hierkd.evaluation.coco_eval import check_each_image_once, choose_library, read_ground_truth
from hierkd.files import replacing

__all__ = ["METRICS", "SplitCOCOEvaluator", "class_groups"]

logger = logging.getLogger(__name__)

FloatArray = NDArray[np.float64]

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR50")

# Positions in COCOeval's accumulated arrays: precision is (IoU, recall, class, area, maxDets),
# recall lacks the second axis. IoU thresholds are .50:.05:.95, areas are all, small (< 32^2 px),
# medium, large (>= 96^2 px).
_IOU_50, _IOU_75 = 0, 5
_AREA_ALL, _AREA_SMALL, _AREA_MEDIUM, _AREA_LARGE = range(4)


class SplitCOCOEvaluator(COCOEvaluator):  # type: ignore[misc]
    """Box AP and recall for the base classes, the novel classes and all classes of a dataset.

    Collecting predictions, gathering them over processes and writing them to ``output_dir`` is
    :class:`detectron2.evaluation.COCOEvaluator`'s; this class decides what is averaged. Matching is
    done by one of two libraries (:func:`hierkd.evaluation.coco_eval.choose_library`); the log says
    by which.

    ``evaluate()`` returns ``{"bbox": {...}}`` (``{}`` outside the main process) with keys
    ``"<group>/<metric>"``, group one of base, novel, all and metric one of AP, AP50, AP75, APs,
    APm, APl and AR50 (recall at IoU 0.5 with at most ``max_dets_per_image`` detections), and
    ``"AP50-<class name>"``, all in percent. A group without any ground truth is NaN; one with
    ground truth and no detections is 0.

    Which groups: base and novel where the vocabulary holds classes of them; ``all`` (base and novel
    together) only where it holds both, for otherwise it would repeat the one group. A dataset that
    declares neither has ``all`` alone, over its whole vocabulary.
    """

    federated = False  # whether it knows what a federated dataset leaves unsaid
    task = "bbox"

    def __init__(
        self,
        dataset_name: str,
        *,
        distributed: bool = True,
        output_dir: str | None = None,
        max_dets_per_image: int = 100,
        use_fast_impl: bool = True,
        complete: bool = False,
        split: tuple[Sequence[str], Sequence[str]] | None = None,
    ) -> None:
        """Read the ground truth of a registered dataset.

        Args:
            dataset_name: Registered dataset whose metadata has ``json_file``, ``thing_classes``,
                ``base_classes`` and ``novel_classes``
                (:func:`hierkd.data.coco.register_ovd_dataset`).
            distributed: Gather the predictions of all processes and evaluate in the main one.
            output_dir: Folder for the raw predictions; none are written without it.
            max_dets_per_image: Detections kept per image and class, highest scores first. 100 is
                COCO's and the paper's.
            use_fast_impl: False evaluates with pycocotools: the same figures, later.
            complete: Whether ``evaluate()`` refuses to leave out images that were not processed.
            split: The base and the novel names, in place of the metadata's.

        Raises:
            FileNotFoundError: There is no such JSON.
            ValueError: The dataset lacks one of these metadata, its JSON is broken
                (:func:`hierkd.evaluation.coco_eval.read_ground_truth`) or lacks a class of the
                vocabulary, or is federated and this evaluator is not.
        """
        metadata = MetadataCatalog.get(dataset_name)
        if not metadata.get("thing_classes") or not metadata.get("json_file"):
            raise ValueError(
                f"dataset {dataset_name!r} needs thing_classes and json_file in its metadata"
            )
        truth = read_ground_truth(metadata.json_file)  # before COCO's own code meets a broken file
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
        self._complete = complete
        self._coco_api.dataset = truth
        if metadata.get("federated", False) and not self.federated:
            raise ValueError(
                f"dataset {dataset_name!r} is annotated in LVIS's federated way, which this "
                "evaluation does not know: evaluate it with train_net.py --eval-only"
            )
        self._category_ids = self._find_category_ids()
        base, novel = split or (metadata.get("base_classes", ()), metadata.get("novel_classes", ()))
        self._groups = class_groups(list(self._category_ids), base, novel)
        image_ids = [image["id"] for image in truth["images"]]
        self._image_ids = frozenset(image_ids)
        self._library = choose_library(image_ids, use_fast_impl=use_fast_impl)
        self.reset()

    def evaluate(self, img_ids: Iterable[int] | None = None) -> dict[str, dict[str, float]]:
        """Compute the figures; no processed image at all counts as no detections.

        Args:
            img_ids: Images that count; None: all of the dataset.

        Raises:
            ValueError: A detection is of an image that the dataset does not have, or of a class
                beyond the vocabulary; an image was processed twice, be it by two processes; or, if
                ``complete``, one was not processed.
        """
        results: dict[str, dict[str, float]] = super().evaluate(img_ids)
        if not results and self._do_evaluation and comm.is_main_process():
            self._check_images([], img_ids)
            results = OrderedDict({self.task: self._figures([], img_ids)})
        return results

    def _eval_predictions(
        self, predictions: list[dict[str, Any]], img_ids: Iterable[int] | None = None
    ) -> None:
        """Write the detections, if wanted, and evaluate them; called by the parent."""
        self._check_images(predictions, img_ids)
        found = self._as_coco_results(predictions)
        if self._output_dir:
            path = Path(self._output_dir) / "coco_instances_results.json"
            with replacing(path) as temporary:
                temporary.write_text(json.dumps(found), encoding="utf-8")
        if self._do_evaluation:
            self._results[self.task] = self._figures(found, img_ids)

    def _check_images(
        self, predictions: list[dict[str, Any]], img_ids: Iterable[int] | None
    ) -> None:
        """ValueError unless each image was processed once."""
        check_each_image_once(
            (each["image_id"] for each in predictions),
            self._image_ids if img_ids is None else list(img_ids),
            self._dataset_name,
            complete=self._complete,
        )

    def _as_coco_results(self, predictions: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Detections in COCO's result format; the given ones stay as they are."""
        ids = list(self._category_ids.values())
        found = []
        for result in itertools.chain.from_iterable(each["instances"] for each in predictions):
            index = result["category_id"]
            if not 0 <= index < len(ids):
                raise ValueError(
                    f"dataset {self._dataset_name!r} has {len(ids)} classes, got a detection of "
                    f"class {index}"
                )
            found.append({**result, "category_id": ids[index]})
        return found

    def _figures(
        self, found: list[dict[str, Any]], img_ids: Iterable[int] | None
    ) -> dict[str, float]:
        """Average per-class figures over the groups, and log them.

        Args:
            found: In COCO's result format, with the ids of the JSON; changed here.
            img_ids: Images that count; None: all.
        """
        if not found:
            logger.warning("No detections on %s: every class counts as missed.", self._dataset_name)
        unknown = {result["image_id"] for result in found} - self._image_ids
        if unknown:
            raise ValueError(
                f"{self._metadata.json_file}: detections of {len(unknown)} images that are not in "
                f"dataset {self._dataset_name!r}, such as {sorted(unknown, key=str)[:5]}"
            )
        found = self._counted(found)
        for number, result in enumerate(found, start=1):
            width, height = result["bbox"][2:]
            result.update(id=number, area=width * height, iscrowd=0)
        dataset = self._coco_api.dataset
        coco_eval = self._library.run(
            self._library.index(dataset, self._truth()),
            self._library.index(dataset, found),
            catIds=list(self._category_ids.values()),
            imgIds=sorted(self._image_ids) if img_ids is None else list(img_ids),
            maxDets=self._max_dets_per_image,
        )
        per_class = _per_class_metrics(coco_eval, self._category_ids.values(), self._max_dets)
        positions = {name: k for k, name in enumerate(self._category_ids)}
        results = {
            f"{group}/{metric}": _nan_mean(per_class[metric][[positions[name] for name in names]])
            for group, names in self._groups.items()
            for metric in METRICS
        }
        self._log(results, "classes", {group: len(each) for group, each in self._groups.items()})
        return results | {  # detectron2's one-line summary leaves keys with a hyphen out
            f"AP50-{name}": float(value)
            for name, value in zip(self._category_ids, per_class["AP50"], strict=True)
        }

    def _truth(self) -> list[dict[str, Any]]:
        """The annotations that detections are matched with."""
        annotations: list[dict[str, Any]] = self._coco_api.dataset["annotations"]
        return annotations

    def _counted(self, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The detections that count, of all in COCO's result format."""
        return found

    def _find_category_ids(self) -> dict[str, int]:
        """Map each class of the vocabulary, in order, to its id in the JSON; both must agree."""
        json_file = self._metadata.json_file
        ids = {
            category["name"]: category["id"] for category in self._coco_api.dataset["categories"]
        }
        missing = [name for name in self._metadata.thing_classes if name not in ids]
        if missing:
            raise ValueError(
                f"{json_file}: categories {missing} of dataset {self._dataset_name!r} are missing; "
                f"found {shown(sorted(ids))}"
            )
        category_ids = {name: ids[name] for name in self._metadata.thing_classes}
        mapping = {category_id: index for index, category_id in enumerate(category_ids.values())}
        known = self._metadata.get("thing_dataset_id_to_contiguous_id", mapping)
        if dict(known) != mapping:  # of the loader, whose class indices the detections have
            raise ValueError(
                f"{json_file}: expected the category ids of dataset {self._dataset_name!r}, "
                f"{dict(known)}; found {shown(mapping)}"
            )
        return category_ids

    def _log(self, results: Mapping[str, float], unit: str, sizes: Mapping[str, int]) -> None:
        """Log a table, a line a group of so many classes or boxes."""
        metrics = list(dict.fromkeys(key.split("/")[1] for key in results))
        rows = [
            [group, size, *(results[f"{group}/{metric}"] for metric in metrics)]
            for group, size in sizes.items()
        ]
        table = tabulate(rows, ["group", unit, *metrics], tablefmt="github", floatfmt=".1f")
        logger.info("%s (percent; %s):\n%s", self._dataset_name, self._library.name, table)


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


def _per_class_metrics(
    coco_eval: Any, category_ids: Iterable[int], max_dets_per_image: int
) -> dict[str, FloatArray]:
    """Every metric of :data:`METRICS` for every class, in percent; NaN without ground truth.

    Args:
        coco_eval: An accumulated ``COCOeval`` of either library, with COCO's IoU thresholds and
            areas.
        category_ids: COCO ids of the K classes wanted, in the order wanted.
        max_dets_per_image: Which of the run's ``maxDets``.

    Returns:
        Metric name to a (K,) array.
    """
    columns = [list(coco_eval.params.catIds).index(i) for i in category_ids]
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


def _nan_mean(values: FloatArray) -> float:
    """Mean of the values that are not NaN; NaN, without a warning, where there are none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")
