"""Which pictures a report shows, and which detections it calls correct."""

import numpy as np
import torch
from detectron2.data import DatasetCatalog
from detectron2.structures import Boxes, Instances

from hierkd.reports.gallery import (
    CORRECT_COLOR,
    UNCOUNTED_COLOR,
    WRONG_COLOR,
    Box,
    Sample,
    best_sample_per_class,
    build_samples,
    choose_by_ground_truth,
    choose_samples,
    choose_test_dataset,
    draw_overview,
    draw_sample,
    judge_detections,
    judged_classes,
    keep_as_many_as_objects,
    keep_as_many_as_objects_in_picture,
)
from toy_world import NOVEL, PICTURES, VOCABULARY, register_toy_world

BLANK = np.zeros((16, 16, 3), np.uint8)


def instances(*found):
    """Detections from (class, box, score)."""
    boxes = torch.tensor([box for _, box, _ in found], dtype=torch.float32).reshape(-1, 4)
    return Instances(
        (128, 128),
        pred_boxes=Boxes(boxes),
        scores=torch.tensor([score for *_, score in found]),
        pred_classes=torch.tensor([VOCABULARY.index(c) for c, _, _ in found], dtype=torch.int64),
    )


def truth(name, box):
    return Box(box, name, "correct")


def verdicts(found, objects):
    judged = judge_detections(found, objects, VOCABULARY, set(NOVEL))
    return [(box.class_name, box.verdict) for box in judged]


def test_an_object_is_found_once_by_the_best_score():
    objects = [truth("bee", (0, 0, 10, 10))]
    found = instances(
        ("bee", [0, 0, 10, 9], 0.6), ("bee", [0, 0, 10, 10], 0.5), ("bee", [0, 0, 10, 8], 0.9)
    )
    judged = judge_detections(found, objects, VOCABULARY, set(NOVEL))
    assert [round(box.score, 2) for box in judged] == [0.9, 0.6, 0.5]
    assert [box.verdict for box in judged] == ["correct", "wrong", "wrong"]


def test_class_and_overlap_must_both_be_right():
    objects = [truth("bee", (0, 0, 10, 10)), truth("ant", (50, 50, 60, 60))]
    assert verdicts(instances(("dog", [0, 0, 10, 10], 0.9)), objects) == [("dog", "wrong")]
    assert verdicts(instances(("bee", [0, 0, 10, 4.9], 0.9)), objects) == [("bee", "wrong")]
    assert verdicts(instances(("bee", [0, 0, 10, 5.1], 0.9)), objects) == [("bee", "correct")]


def test_base_classes_are_not_judged():
    found = instances(("ant", [0, 0, 10, 10], 0.9))
    assert verdicts(found, []) == [("ant", "uncounted")]
    assert verdicts(found, [Box((0, 0, 10, 10), "ant", "uncounted")]) == [("ant", "uncounted")]


def test_a_picture_without_objects_has_only_wrong_detections():
    assert verdicts(instances(("bee", [0, 0, 9, 9], 0.9)), []) == [("bee", "wrong")]
    assert verdicts(instances(), []) == []


def test_samples_of_a_dataset(tmp_path):
    records = DatasetCatalog.get(register_toy_world(tmp_path))
    found = instances(("bee", [0, 0, 10, 10], 0.8), ("dog", [0, 0, 10, 10], 0.2))
    samples = build_samples(records, lambda image: found, VOCABULARY, NOVEL)
    assert len(samples) == len(PICTURES)
    assert [[t.class_name for t in s.truth] for s in samples] == [
        [name for name, _ in objects] for objects in PICTURES
    ]
    assert samples[2].truth[0].xyxy == (20, 60, 70, 120)
    assert samples[2].image[90, 45].tolist() == [60, 150, 30]  # BGR of a dog
    assert [box.label for box in samples[0].detections] == ["bee 80%", "dog 20%"]


def picture(*names, detections=()):
    objects = tuple(truth(name, (0, 0, 9, 9)) for name in names)
    return Sample(BLANK, f"{'-'.join(names)}.png", objects, detections)


def found(name, score):
    return Box((0, 0, 9, 9), name, "wrong", score)


def kept_scores(*samples):
    kept = keep_as_many_as_objects(samples)
    assert [s.truth for s in kept] == [s.truth for s in samples]
    return [[box.score for box in s.detections] for s in kept]


def test_each_class_keeps_as_many_detections_as_it_has_objects():
    """Two bees and one dog: the two best bees over all pictures, and the best dog, however low."""
    assert kept_scores(
        picture("bee", "dog", detections=(found("bee", 0.6), found("bee", 0.3))),
        picture("bee", detections=(found("bee", 0.5), found("dog", 0.1), found("dog", 0.05))),
        picture(detections=(found("bee", 0.4), found("ant", 0.9))),
    ) == [[0.6], [0.5, 0.1], []]


def test_a_picture_keeps_of_each_kind_as_many_as_it_has_objects():
    box = (0, 0, 9, 9)
    truths = (truth("bee", box), truth("dog", box), Box(box, "ant", "uncounted"))
    detections = (
        Box(box, "ant", "uncounted", 0.9),
        Box(box, "elk", "uncounted", 0.8),  # one base object: the second has no place
        Box(box, "bee", "wrong", 0.3),
        Box(box, "bee", "correct", 0.2),
        Box(box, "dog", "correct", 0.1),
    )
    kept = keep_as_many_as_objects_in_picture(Sample(BLANK, "x.png", truths, detections))
    assert [box.score for box in kept.detections] == [0.9, 0.3, 0.2]
    assert kept.truth == truths
    empty = keep_as_many_as_objects_in_picture(Sample(BLANK, "x.png", (), detections))
    assert empty.detections == ()


def test_samples_are_chosen_without_reading_a_picture(tmp_path):
    dataset = register_toy_world(tmp_path)
    records = DatasetCatalog.get(dataset)
    for path in (tmp_path / "images").iterdir():
        path.unlink()
    chosen = choose_samples(records, VOCABULARY, NOVEL, 3)
    # bee: picture 2; dog: 3; bee again: 4
    assert [s.file_name.split("/")[-1] for s in chosen] == ["2.png", "3.png", "4.png"]
    for sample, picture in zip(chosen, PICTURES[1:4], strict=True):
        assert {box.class_name for box in sample.truth} == {name for name, _ in picture}
        assert sample.detections == ()


def test_the_largest_vocabulary_is_tested_and_its_novel_classes_judged(tmp_path, monkeypatch):
    whole = register_toy_world(tmp_path / "whole")
    names = (*VOCABULARY, "fly")
    for constant, value in {"VOCABULARY": names, "BASE": names, "NOVEL": ()}.items():
        monkeypatch.setattr(f"toy_world.{constant}", value)
    larger = register_toy_world(tmp_path / "larger")
    assert choose_test_dataset([whole, larger]) == larger
    assert choose_test_dataset([]) is None
    assert judged_classes(whole) == list(NOVEL)
    assert judged_classes(larger) == list(names)


def test_fewer_detections_than_objects_are_all_kept():
    assert kept_scores(picture("bee", "bee", detections=(found("bee", 0.01),))) == [[0.01]]
    assert kept_scores(picture("bee")) == [[]]
    assert kept_scores() == []


def test_choice_goes_round_the_classes():
    samples = [
        picture("bee"), picture("bee", "ant"), picture("ant"), picture("dog"), picture("dog", "bee")
    ]  # fmt: skip
    chosen = choose_by_ground_truth(samples, ["bee", "dog"], 3)
    assert [s.file_name for s in chosen] == ["bee.png", "dog.png", "bee-ant.png"]


def test_choice_ends_when_no_picture_is_left():
    samples = [picture("bee"), picture("ant"), picture("bee", "dog")]
    chosen = choose_by_ground_truth(samples, ["bee", "dog"], 12)
    assert [s.file_name for s in chosen] == ["bee.png", "bee-dog.png"]
    assert choose_by_ground_truth([], ["bee"], 12) == []


def test_choice_ignores_detections():
    seen = [picture("bee"), picture("bee")]
    blind = [picture("bee", detections=(Box((0, 0, 1, 1), "bee", "wrong", 0.9),)), picture("bee")]
    assert choose_by_ground_truth(seen, ["bee"], 1)[0].file_name == (
        choose_by_ground_truth(blind, ["bee"], 1)[0].file_name
    )


def test_best_sample_is_the_most_confident_correct_one():
    low = picture("bee", detections=(Box((0, 0, 9, 9), "bee", "correct", 0.4),))
    high = picture("bee", detections=(Box((0, 0, 9, 9), "bee", "correct", 0.7),))
    wrong = picture("bee", detections=(Box((0, 0, 9, 9), "bee", "wrong", 0.9),))
    assert best_sample_per_class([low, high, wrong], ["dog", "bee"]) == [("bee", high)]


def test_drawing_tells_verdicts_apart():
    def colours(verdict):
        drawn = draw_sample(picture(), [Box((2, 2, 14, 14), "bee", verdict, 0.9)])
        return {tuple(pixel) for pixel in drawn.reshape(-1, 3).tolist()}

    edge_colours = [colours(v) - {(0, 0, 0)} for v in ("correct", "wrong", "uncounted")]
    assert not set.intersection(*edge_colours)
    assert all(edge_colours)


def test_the_overview_has_headings_above_pairs_and_a_legend_below():
    samples = [Sample(BLANK, f"{i}.png", (), ()) for i in range(3)]
    height, width, _ = draw_sample(samples[0], ()).shape
    black = (draw_overview(samples, columns=2) == 0).all(axis=2)
    lines = [int(row.sum()) for row in black if row.sum() >= 2 * width]  # no text has so many
    assert lines == [4 * width] * height + [2 * width] * height  # and there is no fourth pair


def test_the_overview_labels_base_classes_and_says_the_colours():
    boxes = [Box((2, 2, 14, 14), "bee", "uncounted", 0.9)]
    plain = draw_overview([Sample(BLANK, "1.png", (), ())])
    named = draw_overview([Sample(BLANK, "1.png", (), tuple(boxes))])
    unnamed = draw_sample(Sample(BLANK, "1.png", (), ()), boxes)
    assert plain.shape == named.shape
    changed = (plain != named).any(axis=2).sum()
    assert changed > (unnamed != 0).any(axis=2).sum()  # the label, too
    for color in (CORRECT_COLOR, WRONG_COLOR, UNCOUNTED_COLOR):
        swatch = (plain == np.round(255 * np.array(color))).all(axis=2)
        assert swatch.sum() >= 400
