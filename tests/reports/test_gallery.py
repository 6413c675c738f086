"""Which pictures a report shows, and which detections it calls correct."""

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, BoxMode, Instances

from hierkd.reports import gallery
from hierkd.reports.gallery import CORRECT, UNCOUNTED, WRONG, Box, Sample
from toy_world import NOVEL, PICTURES, VOCABULARY, register_toy_world

PLACE = (0.0, 0.0, 9.0, 9.0)


def instances(*found):
    """Detections from (class, box, score)."""
    boxes = torch.tensor([box for _, box, _ in found], dtype=torch.float32).reshape(-1, 4)
    return Instances(
        (128, 128),
        pred_boxes=Boxes(boxes),
        scores=torch.tensor([score for *_, score in found]),
        pred_classes=torch.tensor([VOCABULARY.index(c) for c, _, _ in found], dtype=torch.int64),
    )


BEE, ANT = Box((0, 0, 10, 10), "bee", CORRECT), Box((50, 50, 60, 60), "ant", UNCOUNTED)


@pytest.mark.parametrize(
    ("found", "objects", "verdicts"),
    [
        # an object is found once, by the best score
        (
            [("bee", [0, 0, 10, y], score) for y, score in ((9, 0.6), (10, 0.5), (8, 0.9))],
            [BEE],
            [(0.9, CORRECT), (0.6, WRONG), (0.5, WRONG)],
        ),
        # class and overlap must both be right
        ([("dog", [0, 0, 10, 10], 0.9)], [BEE, ANT], [(0.9, WRONG)]),
        ([("bee", [0, 0, 10, 4.9], 0.9)], [BEE, ANT], [(0.9, WRONG)]),
        ([("bee", [0, 0, 10, 5.1], 0.9)], [BEE, ANT], [(0.9, CORRECT)]),
        # base classes are not judged
        ([("ant", [50, 50, 60, 60], 0.9)], [BEE, ANT], [(0.9, UNCOUNTED)]),
        ([("ant", [0, 0, 10, 10], 0.9)], [], [(0.9, UNCOUNTED)]),
        ([("bee", [0, 0, 10, 10], 0.9)], [], [(0.9, WRONG)]),
        ([], [BEE], []),
    ],
)
def test_detections_are_judged_as_ap50_does(found, objects, verdicts):
    judged = gallery.judge_detections(instances(*found), objects, VOCABULARY, set(NOVEL))
    assert [(round(box.score, 2), box.verdict) for box in judged] == verdicts


def test_samples_of_a_dataset(tmp_path):
    records = DatasetCatalog.get(register_toy_world(tmp_path))
    records[0]["annotations"].append({**records[0]["annotations"][0], "iscrowd": 1})
    found = instances(("dog", [0, 0, 10, 10], 0.2), ("bee", [0, 0, 10, 10], 0.8))
    asked = []

    def detect(record, image):
        asked.append((record["image_id"], image.shape))
        return found

    samples = gallery.build_samples(records, detect, VOCABULARY, NOVEL)
    assert asked == [(i, (128, 128, 3)) for i in range(1, 7)]
    assert [[t.class_name for t in s.truth] for s in samples] == [
        [name for name, _ in objects] for objects in PICTURES
    ]
    assert samples[2].truth[0].xyxy == (20, 60, 70, 120)
    assert samples[2].image[90, 45].tolist() == [60, 150, 30]  # BGR of a dog
    assert [box.label for box in samples[0].detections] == ["bee 80%", "dog 20%"]


def sample(*truth, detections=()):
    """A picture with objects and detections of (class, verdict, score)."""
    objects = tuple(Box(PLACE, name, UNCOUNTED if name == "ant" else CORRECT) for name in truth)
    found = tuple(Box(PLACE, *each) for each in detections)
    return Sample(np.zeros((16, 20, 3), np.uint8), f"{'-'.join(truth)}.png", objects, found)


DETECTIONS = [
    ("ant", UNCOUNTED, 0.9),
    ("elk", UNCOUNTED, 0.8),  # one base object: the second has no place
    ("bee", WRONG, 0.3),
    ("bee", CORRECT, 0.2),
    ("dog", CORRECT, 0.1),
]


@pytest.mark.parametrize(
    ("truth", "scores"),
    [(["bee", "dog", "ant"], [0.9, 0.3, 0.2]), (["bee"], [0.3]), ([], [])],
)
def test_a_picture_keeps_its_best_detections_of_each_kind(truth, scores):
    given = sample(*truth, detections=DETECTIONS)
    (kept,) = gallery.keep_best([given])
    assert [box.score for box in kept.detections] == scores
    assert kept.truth == given.truth


def records(*pictures):
    box = {"bbox": [0, 0, 9, 9], "bbox_mode": BoxMode.XYWH_ABS}
    return [
        {
            "file_name": "-".join(names),
            "annotations": [{**box, "category_id": VOCABULARY.index(name)} for name in names],
        }
        for names in pictures
    ]


@pytest.mark.parametrize(
    ("count", "chosen"),
    [(0, []), (3, ["bee", "dog", "bee-ant"]), (12, ["bee", "dog", "bee-ant", "dog-bee"])],
)
def test_pictures_show_the_classes_in_turn(count, chosen):
    given = records(["bee"], ["bee", "ant"], ["ant"], ["dog"], ["dog", "bee"])
    found = gallery.choose_in_turn(given, VOCABULARY, ["bee", "dog"], count)
    assert [record["file_name"] for record in found] == chosen


def test_the_largest_vocabulary_is_tested_and_its_novel_classes_judged(tmp_path, monkeypatch):
    whole = register_toy_world(tmp_path / "whole")
    names = (*VOCABULARY, "fly")
    for constant, value in {"VOCABULARY": names, "BASE": names, "NOVEL": ()}.items():
        monkeypatch.setattr(f"toy_world.{constant}", value)
    larger = register_toy_world(tmp_path / "larger")
    assert gallery.choose_test_dataset([whole, larger]) == larger
    assert gallery.choose_test_dataset([]) is None
    assert gallery.judged_classes(whole) == list(NOVEL)
    assert gallery.judged_classes(larger) == list(names)


def test_best_sample_is_the_most_confident_correct_one():
    low = sample("bee", detections=[("bee", CORRECT, 0.4)])
    high = sample("bee", detections=[("bee", CORRECT, 0.7)])
    wrong = sample("bee", detections=[("bee", WRONG, 0.9)])
    assert gallery.best_sample_per_class([low, high, wrong], ["dog", "bee"]) == {"bee": high}
