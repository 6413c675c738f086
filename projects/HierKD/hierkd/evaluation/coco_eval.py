"""What the evaluators share of COCO's evaluation: the ground truth, checked; one run; completeness.

Matching and accumulation are faster-coco-eval's, in compiled code; pycocotools, ten times as slow,
computes the same figures and serves where images have names for numbers. Both read a JSON without
asking what it holds: a missing field is a KeyError somewhere inside, a box that is not a number
matches every detection, and an annotation with the id 0 counts as missed even when it is found.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import faster_coco_eval
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from hierkd.data.coco_json import (
    FieldTypes,
    check_annotation,
    get_box,
    get_entries,
    index_by_id,
    read_coco_json,
    shown,
)

__all__ = ["COCOLibrary", "check_each_image_once", "choose_library", "read_ground_truth"]

logger = logging.getLogger(__name__)

_IMAGE_FIELDS: FieldTypes = {"id": (int, str)}
_BOX_FIELDS: FieldTypes = {
    "id": (int, str), "image_id": (int, str), "category_id": int, "bbox": list,
}  # fmt: skip
_CATEGORY_FIELDS: FieldTypes = {"id": int, "name": str}


def read_ground_truth(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read and check an annotation file for evaluation.

    Args:
        path: JSON in COCO's layout. ``annotations`` may be missing, as in COCO's test files.

    Returns:
        Its ``images``, ``categories`` and ``annotations``. Every annotation has ``iscrowd`` and
        ``area`` (width times height of the box where the file has none), and a new ``id``, from 1
        on. Boxes with a non-finite number or a negative side, which no detection can match, are
        left out, as they are when the images are loaded, and logged; all others stay as they are.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is broken, lacks a key, repeats an id, mixes numbers and strings as image
            ids, repeats the name of a category, or refers to an image or category that it does not
            hold.
    """
    content = read_coco_json(path)
    images = get_entries(content, "images", _IMAGE_FIELDS, path)
    if len({type(image["id"]) for image in images}) > 1:
        raise ValueError(f"{path}: the ids of 'images' must all be numbers or all be strings.")
    categories = get_entries(content, "categories", _CATEGORY_FIELDS, path)
    known = {
        "image_id": index_by_id(images, "images", path),
        "category_id": index_by_id(categories, "categories", path),
    }
    names = Counter(category["name"] for category in categories)
    if repeated := [name for name, count in names.items() if count > 1]:
        raise ValueError(f"{path}: 'categories' has these names more than once: {shown(repeated)}.")
    boxes = get_entries({"annotations": [], **content}, "annotations", _BOX_FIELDS, path)
    index_by_id(boxes, "annotations", path)
    annotations: list[dict[str, Any]] = []
    for box in boxes:
        for key, entries in known.items():
            if box[key] not in entries:
                raise ValueError(
                    f"{path}: annotation {shown(box['id'])} has {key} {shown(box[key])}, which the "
                    "file does not contain."
                )
        check_annotation(box, path)
        _, _, width, height = numbers = get_box(box, path)
        if all(map(math.isfinite, numbers)) and width >= 0 and height >= 0:
            area = box.get("area")
            kept = {"iscrowd": 0, **box, "area": width * height if area is None else area}
            annotations.append({**kept, "id": len(annotations) + 1})
    if len(annotations) < len(boxes):
        logger.warning(
            "%s: %d of %d boxes have a non-finite number or a negative side and do not count.",
            path, len(boxes) - len(annotations), len(boxes),
        )  # fmt: skip
    return {"images": images, "annotations": annotations, "categories": categories}


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

    def index(self, dataset: Mapping[str, Any], annotations: list[dict[str, Any]]) -> Any:
        """Index annotations or detections (``loadRes`` of pycocotools refuses an empty list).

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
        """Match and accumulate boxes, without what the library prints.

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
    """Choose faster-coco-eval if it can number the images.

    Args:
        image_ids: Of the dataset; faster-coco-eval takes integers alone.
        use_fast_impl: False takes pycocotools in any case.
    """
    if use_fast_impl and all(type(image_id) is int for image_id in image_ids):
        name, classes = (
            "faster-coco-eval",
            (faster_coco_eval.COCO, faster_coco_eval.COCOeval_faster),
        )
    else:
        name, classes = "pycocotools", (COCO, COCOeval)
    return COCOLibrary(f"{name} {metadata.version(name)}", *classes)


def check_each_image_once(
    seen: Iterable[int | str],
    expected: Collection[int | str],
    dataset_name: str,
    *,
    complete: bool,
) -> None:
    """Refuse figures from images that were counted twice or not at all.

    Args:
        seen: Ids of the images that the processes had, one for each time.
        expected: Ids of the images of the dataset.
        dataset_name: For the message.
        complete: Whether every image must have been seen.

    Raises:
        ValueError: It says how many are missing or repeated, and names the first few.
    """
    times = Counter(seen)
    repeated = [each for each, number in times.items() if number > 1]
    missing = [each for each in expected if each not in times] if complete else []
    problems = [
        f"{len(ids):,} {what}, such as {sorted(ids, key=str)[:5]}"
        for ids, what in ((missing, "are missing"), (repeated, "came more than once"))
        if ids
    ]
    if problems:
        raise ValueError(
            f"dataset {dataset_name!r} has {len(expected):,} images, each of which must be "
            f"evaluated once: {'; '.join(problems)}"
        )
