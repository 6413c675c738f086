"""The ground truth that the evaluators compare with, checked before COCO's own code sees it.

``pycocotools`` reads a JSON without asking what it holds: a missing field is a KeyError somewhere
inside, a box that is not a number matches every detection, and an annotation with the id 0 counts
as missed even when it is found.
"""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from typing import Any

from hierkd.data.coco_json import (
    FieldTypes,
    check_annotation,
    get_box,
    get_entries,
    index_by_id,
    read_coco_json,
    shown,
)

__all__ = ["read_ground_truth"]

_LOGGER = logging.getLogger(__name__)

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
    known = {
        "image_id": index_by_id(images, "images", path),
        "category_id": index_by_id(
            get_entries(content, "categories", _CATEGORY_FIELDS, path), "categories", path
        ),
    }
    names = Counter(category["name"] for category in content["categories"])
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
        _LOGGER.warning(
            "%s: %d of %d boxes have a non-finite number or a negative side and do not count.",
            path, len(boxes) - len(annotations), len(boxes),
        )  # fmt: skip
    return {
        "images": images,
        "annotations": annotations,
        "categories": content["categories"],
    }
