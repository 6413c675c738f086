"""Which test pictures a report shows, and which of their detections, and which of these are right.

Pictures are chosen by their ground truth alone, never by what is detected.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances, pairwise_iou
from tqdm import tqdm

from hierkd.data.mapper import read_picture
from hierkd.inference.drawing import Color, Image, draw_boxes, fit

__all__ = [
    "Box",
    "Sample",
    "best_sample_per_class",
    "build_samples",
    "choose_in_turn",
    "choose_test_dataset",
    "draw_sample",
    "judge_detections",
    "judged_classes",
    "keep_best",
    "legend_of",
]

CORRECT, WRONG, UNCOUNTED = "correct", "wrong", "uncounted"
# Told apart with every common colour-blindness (Okabe and Ito's blue and vermilion). [ours]
COLORS: dict[str, Color] = {
    CORRECT: (0.337, 0.706, 0.914),
    WRONG: (0.835, 0.369, 0.0),
    UNCOUNTED: (0.62, 0.62, 0.62),
}
LEGEND: tuple[tuple[Color, str], ...] = (
    (COLORS[CORRECT], "object, or correct detection"),
    (COLORS[WRONG], "wrong detection"),
    (COLORS[UNCOUNTED], "base class, not judged"),
)

_MATCH_IOU = 0.5  # that of AP50


@dataclass(frozen=True)
class Box:
    """A box of the ground truth, or of a detection with a score.

    ``xyxy`` is in pixels of the stored picture; ``verdict`` is "correct", "wrong", or "uncounted"
    for classes that are not judged.
    """

    xyxy: tuple[float, float, float, float]
    class_name: str
    verdict: str
    score: float | None = None

    @property
    def label(self) -> str:
        """Text drawn at the box."""
        return self.class_name if self.score is None else f"{self.class_name} {self.score:.0%}"


@dataclass(frozen=True)
class Sample:
    """A test picture (H, W, 3), BGR, with its objects and, best first, what was detected."""

    image: Image
    file_name: str
    truth: tuple[Box, ...]  # without crowd regions
    detections: tuple[Box, ...]


# ----------------------------------------------------------------------------------- which pictures


def choose_test_dataset(names: Sequence[str]) -> str | None:
    """Choose the registered dataset with the largest vocabulary; None without any name."""
    return max(
        names, key=lambda n: len(MetadataCatalog.get(n).get("thing_classes", ())), default=None
    )


def judged_classes(dataset_name: str) -> list[str]:
    """List the novel classes of a registered dataset, or all of one that has no split."""
    metadata = MetadataCatalog.get(dataset_name)
    novel = set(metadata.get("novel_classes", ()))
    names = list(metadata.thing_classes)
    return [name for name in names if name in novel] or names


def choose_in_turn(
    records: Sequence[dict[str, Any]],
    vocabulary: Sequence[str],
    class_names: Sequence[str],
    count: int,
) -> list[dict[str, Any]]:
    """Choose at most ``count`` records that show classes in turn, by their ground truth alone.

    Goes round the classes; each takes the first picture, in order, that holds it and has not been
    taken.
    """
    held = [
        {vocabulary[a["category_id"]] for a in record["annotations"] if not a.get("iscrowd", 0)}
        for record in records
    ]
    queues = [iter([i for i, names in enumerate(held) if name in names]) for name in class_names]
    chosen: dict[int, None] = {}
    while queues and len(chosen) < count:
        for queue in list(queues):
            index = next((i for i in queue if i not in chosen), None)
            if index is None:
                queues.remove(queue)
            elif len(chosen) < count:
                chosen[index] = None
    return [records[i] for i in chosen]


# --------------------------------------------------------------------------------- which detections


def build_samples(
    records: Sequence[dict[str, Any]],
    detect: Callable[[dict[str, Any], Image], Instances],
    vocabulary: Sequence[str],
    judged: Iterable[str],
) -> list[Sample]:
    """Read pictures, detect in them and judge what is found.

    Args:
        records: detectron2 dataset dicts; ``category_id`` indexes ``vocabulary``.
        detect: Takes a record and its BGR picture, gives detections whose ``pred_classes`` index
            ``vocabulary``.
        vocabulary: Class names.
        judged: Classes whose detections are correct or wrong; the others are uncounted.
    """
    judged = set(judged)
    samples = []
    for record in tqdm(records, unit="picture", disable=len(records) < 2 or None):
        truth = []
        for each in record["annotations"]:
            if not each.get("iscrowd", 0):
                box = BoxMode.convert(list(each["bbox"]), each["bbox_mode"], BoxMode.XYXY_ABS)
                name = vocabulary[each["category_id"]]
                truth.append(Box(tuple(box), name, CORRECT if name in judged else UNCOUNTED))
        image = read_picture(record["file_name"])
        detections = judge_detections(detect(record, image), truth, vocabulary, judged)
        samples.append(Sample(image, record["file_name"], tuple(truth), detections))
    return samples


def judge_detections(
    found: Instances, truth: Sequence[Box], vocabulary: Sequence[str], judged: set[str]
) -> tuple[Box, ...]:
    """Call detections right or wrong as AP50 does: best score first, each object found once."""
    objects = Boxes(torch.tensor([t.xyxy for t in truth], dtype=torch.float32).reshape(-1, 4))
    ious = pairwise_iou(found.pred_boxes, objects).numpy()
    free = np.ones(len(truth), dtype=bool)
    judgements = []
    for row in found.scores.argsort(descending=True, stable=True).tolist():
        name = vocabulary[int(found.pred_classes[row])]
        verdict = UNCOUNTED
        if name in judged:
            same = free & np.array([t.class_name == name for t in truth], dtype=bool)
            overlaps = np.where(same, ious[row], -1.0)
            verdict = WRONG
            if len(truth) and overlaps.max() >= _MATCH_IOU:
                free[overlaps.argmax()] = False
                verdict = CORRECT
        xyxy = tuple(found.pred_boxes.tensor[row].tolist())
        judgements.append(Box(xyxy, name, verdict, float(found.scores[row])))
    return tuple(judgements)


def keep_best(samples: Iterable[Sample]) -> list[Sample]:
    """Leave out detections beyond the number of objects.

    The number is that of the judged and of the other classes each: wrong classes are shown,
    detectors whose scores differ in scale can be compared, and the higher scores of base classes
    do not hide the novel ones.
    """
    kept = []
    for sample in samples:
        room = Counter(box.verdict == UNCOUNTED for box in sample.truth)
        best = []
        for box in sample.detections:
            kind = box.verdict == UNCOUNTED
            room[kind] -= 1
            if room[kind] >= 0:
                best.append(box)
        kept.append(replace(sample, detections=tuple(best)))
    return kept


def best_sample_per_class(
    samples: Sequence[Sample], class_names: Sequence[str]
) -> dict[str, Sample]:
    """Find for each class that was found the picture with its best correct detection."""
    found = {
        name: [
            (box.score or 0.0, -index)
            for index, sample in enumerate(samples)
            for box in sample.detections
            if (box.class_name, box.verdict) == (name, CORRECT)
        ]
        for name in class_names
    }
    return {name: samples[-max(best)[1]] for name, best in found.items() if best}


# -------------------------------------------------------------------------------- how it is shown


def legend_of(samples: Iterable[Sample]) -> tuple[tuple[Color, str], ...]:
    """Explain the colours that are in use: all, or all but that of classes not judged."""
    boxes = (box for sample in samples for box in (*sample.truth, *sample.detections))
    return LEGEND if any(box.verdict == UNCOUNTED for box in boxes) else LEGEND[:2]


def draw_sample(sample: Sample, boxes: Sequence[Box], *, side: int = 480) -> Image:
    """Draw boxes on the picture (RGB) by their verdicts: the best on top, the uncounted below."""
    image, factor = fit(sample.image[:, :, ::-1], side)
    boxes = sorted(boxes, key=lambda box: (box.verdict != UNCOUNTED, box.score or 0.0))
    return draw_boxes(
        image,
        factor * np.array([box.xyxy for box in boxes], dtype=float).reshape(-1, 4),
        [box.label for box in boxes],
        [COLORS[box.verdict] for box in boxes],
        min_long_side=1,
        font_px=21,
    )
