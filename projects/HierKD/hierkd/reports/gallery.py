"""Which test pictures a report shows, and how ground truth and detections are drawn on them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances, pairwise_iou
from detectron2.utils.logger import log_every_n_seconds
from numpy.typing import NDArray

from hierkd.data.mapper import read_picture
from hierkd.reports.drawing import Color, Image, SheetRow, draw_boxes, draw_sheet

__all__ = [
    "CORRECT",
    "CORRECT_COLOR",
    "UNCOUNTED_COLOR",
    "WRONG_COLOR",
    "Box",
    "Sample",
    "best_sample_per_class",
    "build_samples",
    "choose_by_ground_truth",
    "choose_in_turn",
    "choose_samples",
    "choose_test_dataset",
    "draw_overview",
    "draw_sample",
    "judge_detections",
    "judged_classes",
    "keep_as_many_as_objects",
    "keep_as_many_as_objects_in_picture",
    "read_truth",
    "with_detections",
]

# Told apart with every common colour-blindness (Okabe and Ito's blue and vermilion). [ours]
CORRECT_COLOR: Color = (0.337, 0.706, 0.914)
WRONG_COLOR: Color = (0.835, 0.369, 0.0)
UNCOUNTED_COLOR: Color = (0.62, 0.62, 0.62)

CORRECT, WRONG, UNCOUNTED = "correct", "wrong", "uncounted"
_COLORS = {CORRECT: CORRECT_COLOR, WRONG: WRONG_COLOR, UNCOUNTED: UNCOUNTED_COLOR}

_MATCH_IOU = 0.5  # that of AP50

# Of an overview.
_HEADINGS = ("ground truth", "detected")
_LEGEND = (
    (CORRECT_COLOR, "novel class, correct"),
    (WRONG_COLOR, "novel class, wrong"),
    (UNCOUNTED_COLOR, "base class"),
)


@dataclass(frozen=True)
class Box:
    """A box of the ground truth or of a detection.

    Attributes:
        xyxy: Corners in pixels of the stored picture.
        class_name: What it holds.
        verdict: "correct", "wrong", or "uncounted" for classes that are not judged.
        score: Of a detection; None for ground truth.
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
    """A test picture with its objects and what was detected.

    Attributes:
        image: (H, W, 3), BGR, 0..255.
        file_name: Where it was read from.
        truth: Its objects, crowd regions left out.
        detections: Best first.
    """

    image: Image
    file_name: str
    truth: tuple[Box, ...]
    detections: tuple[Box, ...]


def build_samples(
    records: Sequence[dict[str, Any]],
    detect: Callable[[Image], Instances],
    vocabulary: Sequence[str],
    judged_classes: Iterable[str],
) -> list[Sample]:
    """Run a detector over a dataset and judge what it finds.

    Args:
        records: detectron2 dataset dicts; ``category_id`` indexes ``vocabulary``.
        detect: Takes a BGR picture, gives detections whose ``pred_classes`` index ``vocabulary``.
        vocabulary: Class names.
        judged_classes: Classes whose detections are correct or wrong; the others are uncounted.

    Returns:
        One sample per record, in order.
    """
    judged = set(judged_classes)
    samples = []
    for record in records:
        image = read_picture(record["file_name"])
        truth = tuple(read_truth(record, vocabulary, judged))
        detections = judge_detections(detect(image), truth, vocabulary, judged)
        samples.append(Sample(image, record["file_name"], truth, tuple(detections)))
        log_every_n_seconds(
            logging.INFO, f"Pictures of the report: {len(samples)} of {len(records)}", n=5
        )
    return samples


def read_truth(
    record: dict[str, Any], vocabulary: Sequence[str], judged: set[str]
) -> Iterable[Box]:
    """Yield the objects of a detectron2 dataset dict, crowd regions left out."""
    for annotation in record["annotations"]:
        if annotation.get("iscrowd", 0):
            continue
        x0, y0, x1, y1 = BoxMode.convert(
            list(annotation["bbox"]), annotation["bbox_mode"], BoxMode.XYXY_ABS
        )
        name = vocabulary[annotation["category_id"]]
        yield Box((x0, y0, x1, y1), name, CORRECT if name in judged else UNCOUNTED)


def judge_detections(
    found: Instances, truth: Sequence[Box], vocabulary: Sequence[str], judged: set[str]
) -> list[Box]:
    """Call detections right or wrong as AP50 does: best score first, each object found once.

    Args:
        found: ``pred_boxes``, ``scores``, ``pred_classes``.
        truth: The objects.
        vocabulary: Names that ``pred_classes`` index.
        judged: Classes to judge.

    Returns:
        The detections, best first.
    """
    ious = pairwise_iou(
        found.pred_boxes,
        Boxes(torch.tensor([t.xyxy for t in truth], dtype=torch.float32).reshape(-1, 4)),
    ).numpy()
    free = np.ones(len(truth), dtype=bool)
    judgements = []
    for row in found.scores.argsort(descending=True, stable=True).tolist():
        name = vocabulary[int(found.pred_classes[row])]
        verdict = UNCOUNTED
        if name in judged:
            same = free & np.array([t.class_name == name for t in truth], dtype=bool)
            overlaps: NDArray[np.float32] = np.where(same, ious[row], -1.0)
            verdict = WRONG
            if len(truth) and overlaps.max() >= _MATCH_IOU:
                free[overlaps.argmax()] = False
                verdict = CORRECT
        x0, y0, x1, y1 = found.pred_boxes.tensor[row].tolist()
        judgements.append(Box((x0, y0, x1, y1), name, verdict, float(found.scores[row])))
    return judgements


def with_detections(
    sample: Sample,
    image: Image,
    found: Instances,
    vocabulary: Sequence[str],
    judged_classes: Sequence[str],
) -> Sample:
    """Fill in a chosen picture and, of each kind, as many of its detections as it has objects.

    Args:
        sample: From :func:`choose_samples`.
        image: Its picture.
        found: As for :func:`judge_detections`.
        vocabulary: Likewise.
        judged_classes: Likewise.
    """
    detections = judge_detections(found, sample.truth, vocabulary, set(judged_classes))
    filled = replace(sample, image=image, detections=tuple(detections))
    return keep_as_many_as_objects_in_picture(filled)


def keep_as_many_as_objects_in_picture(sample: Sample) -> Sample:
    """Keep, of the judged and of the other classes each, as many detections as it has objects.

    The best ones of each kind. Needs no threshold and no other picture, shows wrong classes, and
    keeps the higher scores of base classes from hiding the novel ones.

    Args:
        sample: A picture; its detections best first.

    Returns:
        The sample with fewer detections.
    """
    free = Counter(box.verdict == UNCOUNTED for box in sample.truth)
    kept = []
    for box in sample.detections:
        kind = box.verdict == UNCOUNTED
        if free[kind] > 0:
            free[kind] -= 1
            kept.append(box)
    return replace(sample, detections=tuple(kept))


def keep_as_many_as_objects(samples: Sequence[Sample]) -> list[Sample]:
    """Keep, of each class, as many detections as there are objects: the best over all pictures.

    Average precision ranks within a class, and the scores of two classes, all the more of a base
    and a novel one, are not on one scale. This rule shows each class at its balance of misses and
    false alarms, without a threshold to choose.

    Args:
        samples: All pictures of a test.

    Returns:
        The samples with fewer detections.
    """
    objects = Counter(box.class_name for sample in samples for box in sample.truth)
    ranked = sorted(
        ((box, number) for number, sample in enumerate(samples) for box in sample.detections),
        key=lambda entry: entry[0].score or 0.0,
        reverse=True,
    )
    kept: list[list[Box]] = [[] for _ in samples]
    for box, number in ranked:
        if objects[box.class_name] > 0:
            objects[box.class_name] -= 1
            kept[number].append(box)
    return [replace(s, detections=tuple(boxes)) for s, boxes in zip(samples, kept, strict=True)]


def choose_test_dataset(names: Sequence[str]) -> str | None:
    """Choose the registered dataset with the largest vocabulary; None without any name."""
    return max(
        names, key=lambda n: len(MetadataCatalog.get(n).get("thing_classes", ())), default=None
    )


def judged_classes(dataset_name: str) -> list[str]:
    """List the novel classes of a registered dataset, or all of one that has no split."""
    metadata = MetadataCatalog.get(dataset_name)
    names = list(metadata.thing_classes)
    novel = set(metadata.get("novel_classes", ()))
    return [name for name in names if name in novel] or names


def choose_by_ground_truth(
    samples: Sequence[Sample], class_names: Sequence[str], count: int
) -> list[Sample]:
    """Choose pictures that show the classes in turn, without looking at any detection.

    Goes round the classes; each takes the first picture, in order, that holds it and has not been
    taken.

    Args:
        samples: To choose from.
        class_names: Classes to show.
        count: How many pictures; fewer if there are no more.

    Returns:
        The chosen samples.
    """
    held = [{box.class_name for box in sample.truth} for sample in samples]
    return [samples[i] for i in choose_in_turn(held, class_names, count)]


def choose_in_turn(held: Sequence[set[str]], class_names: Sequence[str], count: int) -> list[int]:
    """Choose pictures that show the classes in turn, as :func:`choose_by_ground_truth`.

    Args:
        held: Classes in each picture.
        class_names: Classes to show.
        count: How many pictures; fewer if there are no more.

    Returns:
        Positions in ``held``.
    """
    queues = [iter([i for i, names in enumerate(held) if name in names]) for name in class_names]
    chosen: dict[int, None] = {}
    while queues and len(chosen) < count:
        for queue in list(queues):
            index = next((i for i in queue if i not in chosen), None)
            if index is None:
                queues.remove(queue)
            elif len(chosen) < count:
                chosen[index] = None
    return list(chosen)


def choose_samples(
    records: Sequence[dict[str, Any]],
    vocabulary: Sequence[str],
    judged: Sequence[str],
    count: int,
) -> list[Sample]:
    """Choose pictures that show classes in turn; neither pictures nor detections are there yet.

    Args:
        records: detectron2 dataset dicts.
        vocabulary: Names that ``category_id`` indexes.
        judged: Classes to show.
        count: How many pictures; fewer if there are no more.

    Returns:
        Samples with an empty ``image``.
    """
    no_image = np.zeros((0, 0, 3), np.uint8)
    truths = [tuple(read_truth(record, vocabulary, set(judged))) for record in records]
    held = [{box.class_name for box in truth} for truth in truths]
    return [
        Sample(no_image, records[i]["file_name"], truths[i], ())
        for i in choose_in_turn(held, judged, count)
    ]


def best_sample_per_class(
    samples: Sequence[Sample], class_names: Sequence[str]
) -> list[tuple[str, Sample]]:
    """Find for each class the picture with its most confident correct detection.

    Returns:
        (class, sample) in the order of ``class_names``; classes never found are left out.
    """
    best: dict[str, tuple[float, Sample]] = {}
    for sample in samples:
        for box in sample.detections:
            if box.verdict == CORRECT and (box.score or 0.0) > best.get(box.class_name, (0.0,))[0]:
                best[box.class_name] = (box.score or 0.0, sample)
    return [(name, best[name][1]) for name in class_names if name in best]


def draw_sample(
    sample: Sample,
    boxes: Sequence[Box],
    *,
    min_long_side: int = 400,
    font_px: float = 21,
    label_uncounted: bool = False,
) -> Image:
    """Draw boxes in the colours of their verdicts: the best on top, the uncounted below.

    Args:
        sample: The picture.
        boxes: Its ``truth`` or ``detections``.
        min_long_side: Pixels the picture is enlarged to.
        font_px: Height of the labels, in pixels of the enlarged picture.
        label_uncounted: Whether the uncounted ones are labelled, too.

    Returns:
        (H', W', 3) RGB.
    """
    boxes = sorted(boxes, key=lambda box: (box.verdict != UNCOUNTED, box.score or 0.0))
    return draw_boxes(
        sample.image[:, :, ::-1],
        [box.xyxy for box in boxes],
        [box.label if label_uncounted or box.verdict != UNCOUNTED else "" for box in boxes],
        [_COLORS[box.verdict] for box in boxes],
        min_long_side=min_long_side,
        font_px=font_px,
    )


def draw_overview(samples: Sequence[Sample], *, columns: int = 2) -> Image:
    """Draw ground truth beside detections of several pictures on one sheet, all of them labelled.

    Args:
        samples: Pictures of one size.
        columns: Pairs per row.

    Returns:
        (H, W, 3) RGB, on white, with a heading above each picture and a legend below all.
    """
    panels = [
        draw_sample(sample, boxes, label_uncounted=True)
        for sample in samples
        for boxes in (sample.truth, sample.detections)
    ]
    width = max(panel.shape[1] for panel in panels)
    in_rows = [panels[start : start + 2 * columns] for start in range(0, len(panels), 2 * columns)]
    return draw_sheet(
        [SheetRow(row, _HEADINGS * (len(row) // 2)) for row in in_rows],
        panel_px=width,
        legend=[(np.full((20, 20, 3), _as_bytes(color), np.uint8), t) for color, t in _LEGEND],
        title_px=26,
    )


def _as_bytes(color: Color) -> tuple[int, ...]:
    return tuple(round(255 * channel) for channel in color)
