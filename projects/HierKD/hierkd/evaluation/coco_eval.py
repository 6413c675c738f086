"""What the evaluators share of COCO's evaluation: the ground truth, and one run.

Matching and accumulation are faster-coco-eval's, in compiled code: pycocotools' figures in a tenth
of the time.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

from faster_coco_eval import COCO, COCOeval_faster

from hierkd.data.coco_json import get_box, read_annotations

__all__ = ["match_boxes", "read_ground_truth"]

logger = logging.getLogger(__name__)


def read_ground_truth(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read and check an annotation file for evaluation.

    Returns:
        Its ``images``, ``categories`` and ``annotations``. Boxes with a non-finite number or a
        negative side, which no detection can match, are left out and logged.

    Raises:
        FileNotFoundError, ValueError: See :func:`hierkd.data.coco_json.read_annotations`.
    """
    content = read_annotations(path)
    boxes = content["annotations"]
    annotations = []
    for box in boxes:
        numbers = get_box(box, path)
        if all(map(math.isfinite, numbers)) and min(numbers[2:]) >= 0:
            annotations.append(box)
    if len(annotations) < len(boxes):
        logger.warning(
            "%s: %d of %d boxes have a non-finite number or a negative side and do not count.",
            path, len(boxes) - len(annotations), len(boxes),
        )  # fmt: skip
    return {**content, "annotations": annotations}


def match_boxes(
    dataset: Mapping[str, Any],
    truth: Iterable[Mapping[str, Any]],
    found: Iterable[Mapping[str, Any]],
    *,
    federated: bool = False,
    **parameters: Any,
) -> COCOeval_faster:
    """Match detections with boxes, and accumulate.

    Args:
        dataset: COCO's or LVIS's, of which ``images`` and ``categories`` count.
        truth: Boxes: ``image_id``, ``category_id``, ``bbox`` (XYWH, px), perhaps ``area`` and
            ``iscrowd``.
        found: Detections, likewise, with ``score``.
        federated: Leave out detections that LVIS's images say nothing about.
        parameters: Of COCOeval's ``params``, where they differ from COCO's.

    Returns:
        A ``COCOeval`` with ``params`` and ``eval``.
    """
    # The library wants whole numbers as ids, of boxes from 1 on: it takes 0 for "not found".
    names = sorted(image["id"] for image in dataset["images"])
    numbers = {image_id: number for number, image_id in enumerate(names)}

    def index(boxes: Iterable[Mapping[str, Any]]) -> COCO:
        coco = COCO()
        coco.dataset = {
            "images": [{**image, "id": numbers[image["id"]]} for image in dataset["images"]],
            "categories": dataset["categories"],
            "annotations": [
                {
                    "iscrowd": 0,
                    **box,
                    "id": serial,
                    "image_id": numbers[box["image_id"]],
                    "area": _area(box),
                }
                for serial, box in enumerate(boxes, start=1)
            ],
        }
        coco.createIndex()
        return coco

    run = COCOeval_faster(index(truth), index(found), "bbox", lvis_style=federated)
    for name, value in parameters.items():
        setattr(run.params, name, value)
    run.evaluate()
    run.accumulate()
    return run


def _area(box: Mapping[str, Any]) -> float:
    area = box.get("area")
    return float(box["bbox"][2] * box["bbox"][3] if area is None else area)
