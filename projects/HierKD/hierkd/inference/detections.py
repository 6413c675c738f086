"""Which detections are kept, and what they look like as JSON."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from detectron2.structures import Instances

from hierkd.teachers.texts import read_text_lines

__all__ = [
    "DetectionFilter",
    "as_coco_results",
    "as_records",
    "parse_class_thresholds",
    "read_class_thresholds",
    "scale_boxes",
]


@dataclass(frozen=True)
class DetectionFilter:
    """Leaves out weak detections; made of plain values, checked when it is made.

    Attributes:
        score_threshold: Detections with at least this score, 0..1, are kept.
        top_k: Of those, the best ones of an image, all classes together; None keeps all.
        class_thresholds: Class name to its own threshold, which takes the place of
            ``score_threshold``.

    Raises:
        ValueError: A threshold is not within 0..1, or ``top_k`` is not a positive number.
    """

    score_threshold: float = 0.0
    top_k: int | None = None
    class_thresholds: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_threshold("the score threshold", self.score_threshold)
        for name, threshold in self.class_thresholds.items():
            _check_threshold(f"the score threshold of class {name!r}", threshold)
        if self.top_k is not None and (
            isinstance(self.top_k, bool)
            or not isinstance(self.top_k, numbers.Integral)
            or self.top_k < 1
        ):
            raise ValueError(f"top-k must be a whole number of at least 1, got {self.top_k!r}")

    def check_vocabulary(self, vocabulary: Sequence[str]) -> None:
        """Raise ValueError if a class with a threshold of its own is not in the vocabulary."""
        unknown = [name for name in self.class_thresholds if name not in vocabulary]
        if unknown:
            listed = ", ".join(vocabulary[:10]) + (", ..." if len(vocabulary) > 10 else "")
            raise ValueError(
                f"thresholds for classes that are not in the vocabulary: {unknown}; it has "
                f"{len(vocabulary)} classes: {listed}"
            )

    def __call__(self, instances: Instances, vocabulary: Sequence[str]) -> Instances:
        """Filter the detections of one image.

        Args:
            instances: Best first, with ``scores`` and ``pred_classes``.
            vocabulary: Names that ``pred_classes`` index.

        Returns:
            Those kept, in the same order.

        Raises:
            ValueError: As :meth:`check_vocabulary`.
        """
        self.check_vocabulary(vocabulary)
        # In double precision: 0.3 is not to become 0.30000001.
        scores = instances.scores.double()
        if self.class_thresholds:
            of_class = torch.tensor(
                [self.class_thresholds.get(name, self.score_threshold) for name in vocabulary],
                dtype=torch.float64,
            )
            keep = scores >= of_class.to(scores.device)[instances.pred_classes]
        else:
            keep = scores >= self.score_threshold
        kept = instances[keep]
        return kept if self.top_k is None else kept[: self.top_k]


def _check_threshold(what: str, value: float) -> None:
    # Real: numpy's numbers are as good as Python's.
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not 0 <= value <= 1:
        raise ValueError(f"{what} must be 0 to 1, got {value!r}")


def scale_boxes(instances: Instances, factor: float, size: tuple[int, int]) -> Instances:
    """Bring detections to a picture that was resized after the detection.

    Args:
        instances: With ``pred_boxes``, XYXY in pixels of the original picture.
        factor: By which the sides of the picture have grown.
        size: Height and width of the resized picture, in pixels.

    Returns:
        Copies, with all other fields as they were.
    """
    scaled = Instances(size, **instances.get_fields())
    scaled.pred_boxes = instances.pred_boxes.clone()
    scaled.pred_boxes.scale(factor, factor)
    return scaled


def as_records(instances: Instances, vocabulary: Sequence[str]) -> list[dict[str, Any]]:
    """Write detections as plain values.

    Args:
        instances: ``pred_boxes``, ``scores``, ``pred_classes``.
        vocabulary: Names that ``pred_classes`` index.

    Returns:
        Per detection ``class`` (name), ``score`` (0..1) and ``box_xyxy`` (pixels of the image).
    """
    rows = zip(
        instances.pred_classes.tolist(),
        instances.scores.tolist(),
        instances.pred_boxes.tensor.tolist(),
        strict=True,
    )
    return [
        {
            "class": vocabulary[index],
            "score": round(score, 4),
            "box_xyxy": [round(coordinate, 2) for coordinate in box],
        }
        for index, score, box in rows
    ]


def as_coco_results(
    records: Sequence[Mapping[str, Any]], image_id: int | str, category_ids: Mapping[str, int]
) -> list[dict[str, Any]]:
    """Turn what :func:`as_records` gives into entries of a COCO results file.

    Args:
        records: Detections of one image.
        image_id: Of the image.
        category_ids: Class name to category id.

    Returns:
        Per detection ``image_id``, ``category_id``, ``bbox`` (XYWH, pixels) and ``score``.
    """
    results = []
    for record in records:
        x0, y0, x1, y1 = record["box_xyxy"]
        results.append(
            {
                "image_id": image_id,
                "category_id": category_ids[record["class"]],
                "bbox": [x0, y0, round(x1 - x0, 2), round(y1 - y0, 2)],
                "score": record["score"],
            }
        )
    return results


def parse_class_thresholds(text: str) -> dict[str, float]:
    """Read thresholds of single classes as a user types them.

    Args:
        text: ``NAME=SCORE`` separated by commas, or the path of a text file with one a line; ""
            gives none.

    Returns:
        Class name to threshold, not yet checked for its range.

    Raises:
        ValueError: An entry is no ``NAME=SCORE``, or a class is named twice.
        FileNotFoundError: A .txt is named that does not exist.
    """
    if not text.strip():
        return {}
    from_file = Path(text).is_file() or text.endswith(".txt")
    return read_class_thresholds(read_text_lines(text) if from_file else text.split(","))


def read_class_thresholds(entries: Iterable[str]) -> dict[str, float]:
    """Read thresholds of single classes; opens no file, whatever the texts are.

    Args:
        entries: ``NAME=SCORE`` each.

    Returns:
        Class name to threshold, not yet checked for its range.

    Raises:
        ValueError: An entry is no ``NAME=SCORE``, or a class is named twice.
    """
    thresholds: dict[str, float] = {}
    for entry in entries:
        name, _, score = (part.strip() for part in entry.rpartition("="))
        try:
            value = float(score)
        except ValueError:
            name = ""
        if not name:
            raise ValueError(f"thresholds of classes: expected NAME=SCORE, got {entry!r}")
        if name in thresholds:
            raise ValueError(f"thresholds of classes: {name!r} is named more than once")
        thresholds[name] = value
    return thresholds
