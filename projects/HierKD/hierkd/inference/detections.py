"""Which detections are kept, and what they look like: as text, as JSON, drawn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from detectron2.structures import Instances

from hierkd.data.coco_json import some
from hierkd.inference.drawing import Image, draw_instances, save_picture
from hierkd.inference.images import ImageInput, as_bgr
from hierkd.teachers.texts import read_text_lines

__all__ = [
    "DetectionFilter",
    "Detections",
    "as_records",
    "parse_class_thresholds",
    "read_class_thresholds",
    "scale_boxes",
]


@dataclass(frozen=True)
class DetectionFilter:
    """Leaves out weak detections.

    Attributes:
        score_threshold: Detections with at least this score, 0..1, are kept.
        top_k: Of those, the best ones of an image, all classes together; None keeps all.
        class_thresholds: Class name to its own threshold, which takes the place of
            ``score_threshold``.

    Raises:
        ValueError: A threshold is not within 0..1, or ``top_k`` is not positive.
    """

    score_threshold: float = 0.0
    top_k: int | None = None
    class_thresholds: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, threshold in {"": self.score_threshold, **self.class_thresholds}.items():
            if not 0 <= threshold <= 1:
                of_class = f" of class {name!r}" if name else ""
                raise ValueError(f"the score threshold{of_class} must be 0 to 1, got {threshold}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top-k must be at least 1, got {self.top_k}")

    def check_vocabulary(self, vocabulary: Sequence[str]) -> None:
        """Raise ValueError if a class with a threshold of its own is not in the vocabulary."""
        if unknown := [name for name in self.class_thresholds if name not in vocabulary]:
            raise ValueError(
                f"thresholds for classes that are not in the vocabulary: {unknown}; it has "
                f"{len(vocabulary)} classes: {some(vocabulary)}"
            )

    def __call__(self, instances: Instances, vocabulary: Sequence[str]) -> Instances:
        """Filter the detections of one image, which are on the CPU and come best first."""
        self.check_vocabulary(vocabulary)
        thresholds = torch.tensor(
            [self.class_thresholds.get(name, self.score_threshold) for name in vocabulary],
            dtype=torch.float64,  # 0.3 is not to become 0.30000001
        )
        kept = instances[instances.scores.double() >= thresholds[instances.pred_classes]]
        return kept if self.top_k is None else kept[: self.top_k]


class Detections(Instances):  # type: ignore[misc]  # detectron2 is untyped
    """detectron2's Instances of one picture, with their class names and the picture.

    Args:
        found: ``pred_boxes`` (XYXY, pixels of the picture), ``scores`` and ``pred_classes``.
        vocabulary: Names that ``pred_classes`` index.
        picture: What was detected in; a path is read again when it is drawn.
        channels: Of an array or tensor, "BGR" or "RGB".
    """

    def __init__(
        self, found: Instances, vocabulary: Sequence[str], picture: ImageInput, channels: str
    ) -> None:
        super().__init__(found.image_size, **found.get_fields())
        self._source = vocabulary, picture, channels

    def __getitem__(self, item: Any) -> Detections:
        return Detections(super().__getitem__(item), *self._source)

    def __repr__(self) -> str:
        vocabulary, picture, _ = self._source
        rows = as_records(self, vocabulary)
        found = [f"{r['class']} {r['score']:.0%} {[round(x) for x in r['box_xyxy']]}" for r in rows]
        path = f"{str(picture)!r}, " if isinstance(picture, str | PathLike) else ""
        height, width = self.image_size
        more = f", and {len(rows) - 5} more" if len(rows) > 5 else ""
        listed = ", ".join(found[:5]) or "none"
        return f"Detections({path}{width} x {height} pixels: {listed}{more})"

    __str__ = __repr__

    @property
    def names(self) -> list[str]:
        """Class name of each detection."""
        return [self._source[0][index] for index in self.pred_classes.tolist()]

    def draw(self) -> Image:
        """Draw them on their picture: (H, W, 3), RGB, 0..255; a small picture is enlarged."""
        vocabulary, picture, channels = self._source
        return draw_instances(as_bgr(picture, channels)[:, :, ::-1], self, vocabulary)

    def save(self, path: str | PathLike[str]) -> None:
        """Draw them on their picture and write that as JPEG (.jpg, .jpeg) or PNG."""
        save_picture(Path(path), self.draw())


def scale_boxes(instances: Instances, factor: float, size: tuple[int, int]) -> Instances:
    """Copy detections to a picture of ``size`` (height, width), ``factor`` times as large."""
    scaled = Instances(size, **instances.get_fields())
    scaled.pred_boxes = instances.pred_boxes.clone()
    scaled.pred_boxes.scale(factor, factor)
    return scaled


def as_records(instances: Instances, vocabulary: Sequence[str]) -> list[dict[str, Any]]:
    """Write detections as ``class`` (name), ``score`` (0..1) and ``box_xyxy`` (pixels) each."""
    rows = (instances.pred_classes, instances.scores, instances.pred_boxes.tensor)
    return [
        {
            "class": vocabulary[index],
            "score": round(score, 4),
            "box_xyxy": [round(coordinate, 2) for coordinate in box],
        }
        for index, score, box in zip(*(each.tolist() for each in rows), strict=True)
    ]


def parse_class_thresholds(text: str) -> dict[str, float]:
    """Read NAME=SCORE,... as a user types it, or a text file with one NAME=SCORE a line."""
    if text.endswith(".txt") or Path(text).is_file():
        return read_class_thresholds(read_text_lines(text))
    return read_class_thresholds(text.split(","))


def read_class_thresholds(entries: Iterable[str]) -> dict[str, float]:
    """Read ``NAME=SCORE`` texts, blank ones aside; opens no file.

    Raises:
        ValueError: An entry is no ``NAME=SCORE``, or a class is named twice.
    """
    thresholds: dict[str, float] = {}
    for entry in filter(str.strip, entries):
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
