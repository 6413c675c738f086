"""Evaluation on LVIS, whose images are not annotated with all classes.

LVIS (Gupta et al., CVPR 2019) is federated: for each image only some classes are known to be
present (they have boxes) or absent (``neg_category_ids``), and of some present ones not all objects
are boxed (``not_exhaustive_category_ids``). Detections count so:

- at most 300 per image, over all classes, the best first;
- one of a class that is neither known to be present nor absent in its image does not count;
- one of a class that is not boxed exhaustively counts if it hits a box, and else not at all.

The first two are filters. The third is what COCO's crowd regions do: a crowd region that covers the
plane absorbs whatever hits no box. So COCO's own evaluation computes LVIS's figures.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from hierkd.evaluation.split_coco_evaluation import SplitCOCOEvaluator

__all__ = ["FederatedEvaluator"]

_FREQUENCIES = {"rare": "r", "common": "c", "frequent": "f"}
_EVERYWHERE = [-1e6, -1e6, 2e6, 2e6]  # XYWH, px: every detection lies in it whole


class FederatedEvaluator(SplitCOCOEvaluator):
    """Box AP on a dataset in LVIS's layout.

    The figures are :class:`SplitCOCOEvaluator`'s, plus the groups ``rare``, ``common`` and
    ``frequent`` (LVIS's APr, APc, APf are ``rare/AP``, ``common/AP``, ``frequent/AP``) of the
    classes whose ``frequency`` is r, c, f. ``AR50`` is of the same detections as the rest.
    """

    federated = True

    def __init__(self, dataset_name: str, *, max_dets_per_image: int = 300, **kwargs: Any) -> None:
        """Read the ground truth of a registered dataset.

        Args:
            dataset_name: See :class:`SplitCOCOEvaluator`; every image of its JSON also has
                ``neg_category_ids`` and ``not_exhaustive_category_ids``, every category a
                ``frequency``.
            max_dets_per_image: Detections that count per image, over all classes. [LVIS: 300]
            **kwargs: See :class:`SplitCOCOEvaluator`.

        Raises:
            ValueError: An image or category lacks these.
        """
        super().__init__(dataset_name, max_dets_per_image=max_dets_per_image, **kwargs)
        dataset = self._coco_api.dataset
        try:
            self._absent = {i["id"]: frozenset(i["neg_category_ids"]) for i in dataset["images"]}
            self._inexhaustive = {
                i["id"]: frozenset(i["not_exhaustive_category_ids"]) for i in dataset["images"]
            }
            frequency = {c["name"]: c["frequency"] for c in dataset["categories"]}
        except KeyError as error:
            raise ValueError(
                f"{self._metadata.json_file}: an image or category has no {error}, as LVIS's have"
            ) from error
        present = defaultdict(set)
        for annotation in dataset["annotations"]:
            present[annotation["image_id"]].add(annotation["category_id"])
        self._present: Mapping[Any, set[int]] = present
        for group, letter in _FREQUENCIES.items():
            names = [name for name in self._category_ids if frequency[name] == letter]
            if names:
                self._groups[group] = names

    def _truth(self) -> list[dict[str, Any]]:
        """The boxes, and a region that absorbs the rest where not all objects are boxed."""
        boxes = super()._truth()
        known = set(self._category_ids.values())
        pairs = [
            (image_id, category_id)
            for image_id, category_ids in self._inexhaustive.items()
            for category_id in sorted(category_ids & known)
        ]
        first = max((int(box["id"]) for box in boxes), default=0) + 1
        area = _EVERYWHERE[2] * _EVERYWHERE[3]
        return boxes + [
            {"id": number, "image_id": image_id, "category_id": category_id, "iscrowd": 1}
            | {"bbox": list(_EVERYWHERE), "area": area}
            for number, (image_id, category_id) in enumerate(pairs, start=first)
        ]

    def _counted(self, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The best detections of each image, of the classes it is annotated with."""
        of_image: dict[Any, list[dict[str, Any]]] = defaultdict(list)
        for result in found:
            of_image[result["image_id"]].append(result)
        kept = []
        for image_id, results in of_image.items():
            best = sorted(results, key=lambda each: -float(each["score"]))[: self._max_dets]
            known = self._present.get(image_id, set()) | self._absent[image_id]
            kept += [result for result in best if result["category_id"] in known]
        return kept
