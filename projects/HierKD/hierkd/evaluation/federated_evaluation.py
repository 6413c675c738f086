"""Evaluation on LVIS, whose images are not annotated with all classes.

LVIS (Gupta et al., CVPR 2019) is federated: for each image only some classes are known to be
present (they have boxes) or absent (``neg_category_ids``), and of some present ones not all objects
are boxed (``not_exhaustive_category_ids``). Detections count so:

- at most 300 per image, over all classes, the best first;
- one of a class that is neither known to be present nor absent in its image does not count;
- one of a class that is not boxed exhaustively counts if it hits a box, and else not at all.

The first is done here, the others by :func:`hierkd.evaluation.coco_eval.match_boxes`.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from hierkd.data.coco_json import get_entries
from hierkd.evaluation.split_coco_evaluation import SplitCOCOEvaluator

__all__ = ["FederatedEvaluator"]

_FREQUENCIES = {"rare": "r", "common": "c", "frequent": "f"}


class FederatedEvaluator(SplitCOCOEvaluator):
    """Box AP on a dataset in LVIS's layout.

    The figures are :class:`SplitCOCOEvaluator`'s, plus the groups ``rare``, ``common`` and
    ``frequent`` (LVIS's APr, APc, APf are ``rare/AP``, ``common/AP``, ``frequent/AP``) of the
    classes whose ``frequency`` is r, c, f. ``AR50`` is of the same detections as the rest.
    """

    federated = True

    def __init__(self, dataset_name: str, *, max_dets_per_image: int = 300, **kwargs: Any) -> None:
        """Read the ground truth of a registered dataset; see :class:`SplitCOCOEvaluator`.

        Args:
            dataset_name: Every image of its JSON also has ``neg_category_ids`` and
                ``not_exhaustive_category_ids``, every category a ``frequency``.
            max_dets_per_image: Detections that count per image, over all classes. [LVIS: 300]
            **kwargs: The parent's.

        Raises:
            ValueError: An image or category lacks these.
        """
        super().__init__(dataset_name, max_dets_per_image=max_dets_per_image, **kwargs)
        for key, fields in (
            ("images", ("neg_category_ids", "not_exhaustive_category_ids")),
            ("categories", ("frequency",)),
        ):
            get_entries(self._truth, key, dict.fromkeys(fields, object), self._json_file)
        frequency = {each["name"]: each["frequency"] for each in self._truth["categories"]}
        for group, letter in _FREQUENCIES.items():
            if names := [name for name in self._category_ids if frequency[name] == letter]:
                self._groups[group] = names

    def _counted(self, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
        of_image: dict[Any, list[dict[str, Any]]] = defaultdict(list)
        for result in sorted(found, key=lambda each: -each["score"]):
            of_image[result["image_id"]].append(result)
        return [result for results in of_image.values() for result in results[: self._max_dets]]
