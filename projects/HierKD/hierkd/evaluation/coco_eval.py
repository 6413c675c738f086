"""The COCO evaluation that the evaluators call: faster-coco-eval, or pycocotools without it.

Both compute the same figures; faster-coco-eval matches and accumulates in compiled code, about ten
times as fast. What the evaluators share is here: which of the two it is, its index of a dataset
that is in memory (``loadRes`` of pycocotools refuses an empty list, and both write into what they
are given), and a run without what it prints.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

__all__ = ["COCOLibrary", "choose_library"]

BoxList = list[dict[str, Any]]


@dataclass(frozen=True)
class COCOLibrary:
    """One of the two libraries.

    Attributes:
        name: Distribution and version, for logs.
        index_class: Its ``COCO``.
        run_class: Its ``COCOeval``.
    """

    name: str
    index_class: type[Any]
    run_class: type[Any]

    def index(self, dataset: Mapping[str, Any], annotations: BoxList) -> Any:
        """Index annotations or detections, of which there may be none.

        Args:
            dataset: COCO's, of which ``images`` and ``categories`` count.
            annotations: What COCOeval reads: ``id`` from 1 on, ``image_id``, ``category_id``,
                ``bbox`` (XYWH, px), ``area``, ``iscrowd``; detections also ``score``. They are kept
                and get the key ``ignore``.

        Returns:
            A ``COCO``.
        """
        with contextlib.redirect_stdout(io.StringIO()):
            coco = self.index_class()
            coco.dataset = {
                "images": dataset["images"],
                "annotations": annotations,
                "categories": dataset["categories"],
            }
            coco.createIndex()
        return coco

    def run(self, truth: Any, detections: Any, **parameters: Any) -> Any:
        """Match and accumulate boxes.

        Args:
            truth: The ground truth, from :meth:`index`.
            detections: The detections, likewise.
            parameters: Of COCOeval's ``params``, where they differ from COCO's.

        Returns:
            A ``COCOeval`` with ``params`` and ``eval``.
        """
        with contextlib.redirect_stdout(io.StringIO()):
            run = self.run_class(truth, detections, "bbox")
            for name, value in parameters.items():
                setattr(run.params, name, value)
            run.evaluate()
            run.accumulate()
        return run


def choose_library(image_ids: Iterable[Any], *, use_fast_impl: bool = True) -> COCOLibrary:
    """Choose faster-coco-eval if it can be imported and can number the images.

    Args:
        image_ids: Of the dataset; faster-coco-eval takes integers alone.
        use_fast_impl: False takes pycocotools in any case.
    """
    if use_fast_impl and all(type(image_id) is int for image_id in image_ids):
        with contextlib.suppress(ImportError):
            import faster_coco_eval

            return COCOLibrary(
                _name("faster-coco-eval"), faster_coco_eval.COCO, faster_coco_eval.COCOeval_faster
            )
    return COCOLibrary(_name("pycocotools"), COCO, COCOeval)


def _name(distribution: str) -> str:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return f"{distribution} {metadata.version(distribution)}"
    return distribution
