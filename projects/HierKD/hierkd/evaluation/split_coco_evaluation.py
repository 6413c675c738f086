"""COCO evaluation of base, novel and all classes apart (paper §4.1: ZSD and GZSD).

One COCOeval run over the dataset's vocabulary gives a precision and a recall per class; a group's
figure is the plain mean over its classes that have ground truth. So ZSD is this evaluator on a
dataset whose vocabulary holds the novel classes alone, and GZSD is the same evaluator on one whose
vocabulary is the union.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata as distributions
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from numpy.typing import NDArray
from tabulate import tabulate  # type: ignore[import-untyped]

from hierkd.data.coco_json import shown
from hierkd.evaluation.coco_eval import match_boxes, read_ground_truth
from hierkd.files import replacing

__all__ = ["METRICS", "SplitCOCOEvaluator"]

logger = logging.getLogger(__name__)

# Positions in COCOeval's accumulated arrays, of IoU thresholds (.50:.05:.95) and of areas: all,
# small (< 32^2 px), medium, large (>= 96^2 px).
_EACH = slice(None)
_PRECISIONS: dict[str, tuple[int | slice, int]] = {
    "AP": (_EACH, 0),
    "AP50": (0, 0),
    "AP75": (5, 0),
    "APs": (_EACH, 1),
    "APm": (_EACH, 2),
    "APl": (_EACH, 3),
}
METRICS = (*_PRECISIONS, "AR50")


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

    federated = False  # whether it knows what a federated dataset leaves unsaid

    def __init__(
        self,
        dataset_name: str,
        *,
        distributed: bool = True,
        output_dir: str | None = None,
        max_dets_per_image: int = 100,
        complete: bool = False,
        split: tuple[Iterable[str], Iterable[str]] | None = None,
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
            complete: Whether ``evaluate()`` refuses to leave out images that were not processed.
            split: The base and the novel names, in place of the metadata's.

        Raises:
            FileNotFoundError: There is no such JSON.
            ValueError: Its JSON is broken (:func:`hierkd.evaluation.coco_eval.read_ground_truth`)
                or lacks a class of the vocabulary, or is federated and this evaluator is not.
        """
        metadata = MetadataCatalog.get(dataset_name)
        if metadata.get("federated", False) and not self.federated:
            raise ValueError(
                f"dataset {dataset_name!r} is annotated in LVIS's federated way, which this "
                "evaluation does not know: evaluate it with train_net.py --eval-only"
            )
        # Before COCO's own code meets a broken file.
        self._truth = read_ground_truth(metadata.json_file)
        super().__init__(
            dataset_name,
            tasks=("bbox",),
            distributed=distributed,
            output_dir=output_dir,
            use_fast_impl=False,
        )
        self._dataset_name, self._json_file = dataset_name, metadata.json_file
        self._max_dets = max_dets_per_image
        self._complete = complete
        self._image_ids = {image["id"] for image in self._truth["images"]}
        ids = {category["name"]: category["id"] for category in self._truth["categories"]}
        if missing := [name for name in metadata.thing_classes if name not in ids]:
            raise ValueError(
                f"{metadata.json_file}: categories {missing} of dataset {dataset_name!r} are "
                f"missing; found {shown(sorted(ids))}"
            )
        self._category_ids: dict[str, int] = {name: ids[name] for name in metadata.thing_classes}
        base, novel = split or (metadata.get("base_classes", ()), metadata.get("novel_classes", ()))
        self._groups = _class_groups(list(self._category_ids), {*base}, {*novel})
        self.reset()

    def _eval_predictions(self, predictions: list[dict[str, Any]], img_ids: None = None) -> None:
        """Write the detections, if wanted, and evaluate them; called by the parent.

        Raises:
            ValueError: An image is not the dataset's, was processed twice, be it by two processes,
                or, if ``complete``, not at all.
        """
        self._check_images(predictions)
        ids = list(self._category_ids.values())
        found = [
            {**result, "category_id": ids[result["category_id"]]}
            for each in predictions
            for result in each["instances"]
        ]
        if self._output_dir:
            path = Path(self._output_dir) / "coco_instances_results.json"
            with replacing(path) as temporary:
                temporary.write_text(json.dumps(found), encoding="utf-8")
        self._results["bbox"] = self._figures(found)

    def _check_images(self, predictions: list[dict[str, Any]]) -> None:
        """ValueError unless each image was processed once."""
        times = Counter(each["image_id"] for each in predictions)
        problems = {
            "do not belong to it": times.keys() - self._image_ids,
            "came more than once": [each for each, count in times.items() if count > 1],
            "are missing": self._image_ids - times.keys() if self._complete else (),
        }
        for problem, ids in problems.items():
            if ids:
                raise ValueError(
                    f"dataset {self._dataset_name!r} has {len(self._image_ids):,} images, each of "
                    f"which must be evaluated once: {len(ids):,} {problem}, such as "
                    f"{sorted(ids, key=str)[:5]}"
                )

    def _figures(self, found: list[dict[str, Any]]) -> dict[str, float]:
        """Average the figures of the classes over the groups, and log them.

        Args:
            found: In COCO's result format, with the ids of the JSON.
        """
        run = match_boxes(
            self._truth,
            self._truth["annotations"],
            self._counted(found),
            federated=self.federated,
            catIds=list(self._category_ids.values()),
            maxDets=[self._max_dets],
        )
        columns = [list(run.params.catIds).index(i) for i in self._category_ids.values()]
        # (IoU, recall, class, area, maxDets); recall lacks the second axis.
        precision = run.eval["precision"][..., 0][:, :, columns]
        per_class = {
            metric: _in_percent(precision[ious, ..., area])
            for metric, (ious, area) in _PRECISIONS.items()
        }
        per_class["AR50"] = _in_percent(run.eval["recall"][0, columns, 0, 0][None])
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

    def _counted(self, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The detections that count, beside the limit per image and class."""
        return found

    def _log(self, results: Mapping[str, float], unit: str, sizes: Mapping[str, int]) -> None:
        """Log a table, a line a group of so many classes or boxes."""
        metrics = list(dict.fromkeys(key.split("/")[1] for key in results))
        rows = [
            [group, size, *(results[f"{group}/{metric}"] for metric in metrics)]
            for group, size in sizes.items()
        ]
        table = tabulate(rows, ["group", unit, *metrics], tablefmt="github", floatfmt=".1f")
        library = f"faster-coco-eval {distributions.version('faster-coco-eval')}"
        logger.info("%s (percent; %s):\n%s", self._dataset_name, library, table)


def _class_groups(
    vocabulary: Sequence[str], base: set[str], novel: set[str]
) -> dict[str, list[str]]:
    """Group the names of a vocabulary, as :class:`SplitCOCOEvaluator` says; in its order."""
    groups = {
        group: [name for name in vocabulary if name in names]
        for group, names in (("base", base), ("novel", novel))
    }
    groups = {group: names for group, names in groups.items() if names}
    if len(groups) != 1:
        declared = (base | novel) or set(vocabulary)
        groups["all"] = [name for name in vocabulary if name in declared]
    return groups


def _in_percent(fractions: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over all axes but the last, the classes; NaN without ground truth, COCOeval's -1."""
    mean = fractions.reshape(-1, fractions.shape[-1]).mean(axis=0)
    return np.where(mean < 0, np.nan, 100.0 * mean)


def _nan_mean(values: NDArray[np.float64]) -> float:
    """Mean of the values that are not NaN; NaN, without a warning, where there are none."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")
