"""COCO evaluation of base, novel and all classes: pycocotools against faster-coco-eval.

A dataset of random boxes with imperfect detections of them, as large as COCO's validation split on
a GPU machine, smaller elsewhere (``--images``). Timed is ``SplitCOCOEvaluator.evaluate()``, from
collected detections to the table: everything that happens once the last picture has been seen.
Both must give the same figures; the report says by how much they differ.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from numpy.typing import NDArray

from hierkd.benchmarks.timing import Report, measure, peak_memory, ratio
from hierkd.evaluation.split_coco_evaluation import SplitCOCOEvaluator

__all__ = ["add_arguments", "random_detections", "random_ground_truth", "run"]

_SIZE = (480, 640)  # height and width of every picture, in pixels
_OBJECTS_PER_IMAGE = 7  # on average; COCO has 7.3
_CROWD_RATE = 0.01
_HIT_RATE = 0.6  # share of objects that have a detection near them
_CPU = torch.device("cpu")
_NAMES = itertools.count()

FloatArray = NDArray[np.float64]


def add_arguments(parser: ArgumentParser) -> None:
    """Add the size of the problem."""
    parser.add_argument(
        "--images", type=int, help="default: 5000 where there is a GPU, 500 on a CPU"
    )
    parser.add_argument("--classes", type=int, default=65, help="default: %(default)s")
    parser.add_argument("--detections", type=int, default=100, help="per picture: %(default)s")


def run(args: Namespace, device: torch.device) -> Report:
    """Time the evaluation of the same detections by both libraries.

    Args:
        args: of :func:`add_arguments`, and ``rounds``.
        device: says how large the problem is; evaluation runs on the CPU.

    Raises:
        ImportError: faster-coco-eval is missing.
        ValueError: there are no images, too few classes, or no detections.
    """
    images = args.images or (5000 if device.type == "cuda" else 500)
    if find_spec("faster_coco_eval") is None:
        raise ImportError("nothing to compare: `pip install faster-coco-eval` first")
    if images < 1 or args.classes < 2 or args.detections < 1:
        raise ValueError(
            "at least 1 image, 2 classes and 1 detection are needed, got "
            f"{images}, {args.classes} and {args.detections}"
        )
    rng = np.random.default_rng(0)
    truth = random_ground_truth(rng, images, args.classes)
    found = random_detections(rng, truth, args.detections)
    with tempfile.TemporaryDirectory() as folder, _registered(truth, Path(folder)) as name:
        evaluators = {
            library: _filled(SplitCOCOEvaluator(name, distributed=False, use_fast_impl=fast), found)
            for library, fast in (("pycocotools", False), ("faster-coco-eval", True))
        }
        calls = {library: each.evaluate for library, each in evaluators.items()}
        with _without_tables():
            figures = {library: call()["bbox"] for library, call in calls.items()}
            times = measure(calls, device=_CPU, rounds=args.rounds or 3, warmup=0)
            memory = {library: peak_memory(call, _CPU) for library, call in calls.items()}
    reference = times["pycocotools"]
    rows = [
        {
            "library": library,
            "seconds": times[library].median,
            "over pycocotools": ratio(times[library], reference),
            "peak MiB": memory[library],
            "largest difference (points)": _difference(figures[library], figures["pycocotools"]),
        }
        for library in evaluators
    ]
    return Report(
        "COCO evaluation per class and group",
        _CPU,
        {
            "images": images,
            "classes": args.classes,
            "detections per image": args.detections,
            "ground truth": len(truth["annotations"]),
            "rounds": len(reference.seconds),
        },
        rows,
        [f"The difference is over {len(figures['pycocotools'])} figures, in percent points."],
    )


def random_ground_truth(rng: np.random.Generator, images: int, classes: int) -> dict[str, Any]:
    """Random boxes as COCO's JSON; the first classes are base, the last quarter is novel.

    Args:
        rng: Draws them.
        images: How many.
        classes: How many, with ids 1, 3, 5, ...
    """
    annotations: list[dict[str, Any]] = []
    for image_id in range(1, images + 1):
        for box in _random_boxes(rng, int(rng.poisson(_OBJECTS_PER_IMAGE))).tolist():
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": 2 * int(rng.integers(classes)) + 1,
                    "bbox": box,
                    "area": 0.7 * box[2] * box[3],
                    "iscrowd": int(rng.random() < _CROWD_RATE),
                }
            )
    return {
        "images": [
            {"id": i, "file_name": f"{i}.jpg", "height": _SIZE[0], "width": _SIZE[1]}
            for i in range(1, images + 1)
        ],
        "annotations": annotations,
        "categories": [{"id": 2 * k + 1, "name": f"class {k}"} for k in range(classes)],
    }


def random_detections(
    rng: np.random.Generator, truth: dict[str, Any], per_image: int
) -> dict[int, Instances]:
    """Detections of some of the objects, shifted, and boxes anywhere else.

    Args:
        rng: Draws them.
        truth: From :func:`random_ground_truth`.
        per_image: How many of each image.

    Returns:
        Image id to a detector's output.
    """
    objects: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in truth["images"]}
    for annotation in truth["annotations"]:
        objects[annotation["image_id"]].append(annotation)
    found = {}
    for image_id, of_image in objects.items():
        boxes = _random_boxes(rng, per_image)
        classes = rng.integers(len(truth["categories"]), size=per_image)
        hit = [each for each in of_image if rng.random() < _HIT_RATE][:per_image]
        for row, each in enumerate(hit):
            boxes[row] = each["bbox"]
            boxes[row] += rng.normal(scale=0.05, size=4) * boxes[row, 2:].min()
            classes[row] = each["category_id"] // 2
        boxes[:, 2:] = boxes[:, :2] + boxes[:, 2:].clip(min=1)
        instances = Instances(_SIZE)
        instances.pred_boxes = Boxes(torch.from_numpy(boxes).float())
        instances.scores = torch.from_numpy(rng.random(per_image)).float()
        instances.pred_classes = torch.from_numpy(classes)
        found[image_id] = instances
    return found


def _random_boxes(rng: np.random.Generator, number: int) -> FloatArray:
    """Boxes of 10 to 300 px, as XYWH inside the picture."""
    sides = np.exp(rng.uniform(np.log(10), np.log(300), size=(number, 2)))
    corners = rng.uniform(size=(number, 2)) * (np.array(_SIZE[::-1]) - sides)
    return np.concatenate([corners, sides], axis=1)


def _filled(evaluator: SplitCOCOEvaluator, found: dict[int, Instances]) -> SplitCOCOEvaluator:
    evaluator.reset()
    for image_id, instances in found.items():
        evaluator.process([{"image_id": image_id}], [{"instances": instances}])
    return evaluator


def _difference(figures: dict[str, float], reference: dict[str, float]) -> float:
    """The largest; infinite where one knows a figure that the other does not."""
    if figures.keys() != reference.keys():
        return math.inf
    differences = [
        0.0 if math.isnan(value) and math.isnan(reference[key]) else abs(value - reference[key])
        for key, value in figures.items()
    ]
    return max(math.inf if math.isnan(each) else each for each in differences)


@contextlib.contextmanager
def _registered(truth: dict[str, Any], folder: Path) -> Iterator[str]:
    """Register the dataset while the block runs."""
    path = folder / "truth.json"
    path.write_text(json.dumps(truth), encoding="utf-8")
    names = [category["name"] for category in truth["categories"]]
    number_of_base = max(1, 3 * len(names) // 4)
    name = f"benchmark_eval_{next(_NAMES)}"
    DatasetCatalog.register(name, list)
    MetadataCatalog.get(name).set(
        json_file=str(path),
        thing_classes=names,
        base_classes=names[:number_of_base],
        novel_classes=names[number_of_base:],
    )
    try:
        yield name
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@contextlib.contextmanager
def _without_tables() -> Iterator[None]:
    """Silence the tables that the evaluators log."""
    logger = logging.getLogger("hierkd.evaluation")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
