"""Counting what a COCO file holds, on a file of three images, and findings about names."""

import pytest
import torch

from hierkd.data.check import (
    check_embeddings,
    check_tokens,
    class_table,
    count_contents,
    findings_of,
    short_line,
)


def box(image, category, *xywh, **more):
    return {"id": 0, "image_id": image, "category_id": category, "bbox": list(xywh), **more}


CONTENT = {
    "images": [
        {"id": 1, "file_name": "1.jpg", "width": 100, "height": 50},
        {"id": 2, "file_name": "2.jpg", "width": 100, "height": 50},
        {"id": 3, "file_name": "3.jpg", "width": 100, "height": 50},
    ],
    "annotations": [
        box(1, 7, 0, 0, 10, 10),
        box(1, 7, 0, 0, 3, 10),  # tiny
        box(1, 8, 95, 0, 10, 10),  # 5 px outside
        box(2, 8, 10, 10, 0, 10),  # no area
        box(2, 8, 10, 10, float("nan"), 10),
        box(2, 9, 10, 10, 20, 20, iscrowd=1),
    ],
    "categories": [{"id": 9, "name": "Cat"}, {"id": 7, "name": "cat"}, {"id": 8, "name": "dog"}],
}
KINDS = {7: "base", 8: "novel", 9: "ignored"}
REPORT = count_contents(CONTENT, KINDS, "train", "all.json")


def test_counts():
    assert [(c["name"], c["boxes"], c["images"]) for c in REPORT["classes"]] == [
        ("cat", 2, 1),
        ("dog", 3, 2),
        ("Cat", 1, 1),
    ]
    assert (REPORT["images"], REPORT["boxes"]) == (3, 6)


def found(*boxes):
    content = {**CONTENT, "annotations": list(boxes)}
    report = count_contents(content, KINDS, "train", "all.json")
    return {kind: each["count"] for kind, each in report["findings"].items()}


GOOD = [box(image, 7, 60, 20, 30, 20) for image in (1, 2, 3)]


@pytest.mark.parametrize(
    ("boxes", "expected"),
    [
        (GOOD, {}),
        ([*GOOD, box(1, 7, 5, float("inf"), 9, 9)], {"non_finite": 1}),
        ([*GOOD, box(1, 7, 5, 5, -3, 9)], {"without_area": 1}),
        ([*GOOD, box(1, 7, 0.2, 0.2, 0.5, 0.8)], {"fractions": 1}),
        ([*GOOD, box(1, 7, 200, 0, 10, 10)], {"outside": 1}),
        ([*GOOD, box(1, 7, 95, 0, 10, 10)], {"reaching": 1}),
        ([*GOOD, box(1, 7, 60.2, 20, 30, 20), box(1, 8, 60, 20, 30, 20)], {"repeated": 1}),
        ([box(i, 7, 40, 10, 90, 45) for i in (1, 2, 3)], {"xyxy": 3, "reaching": 3}),
        (GOOD[:1], {"train_left_out": 2}),
        ([{**each, "iscrowd": 1} for each in GOOD], {"no_box": 1, "crowd": 3}),
        ([box(i, 8, 10, 10, 20, 20) for i in (1, 2, 3)], {"no_box": 1, "train_left_out": 3}),
    ],
)
def test_what_is_odd_about_boxes(boxes, expected):
    assert found(*boxes) == expected


def test_a_finding_names_file_place_and_value():
    by_kind = {each.kind: each for each in findings_of("train", REPORT)}
    (example,) = by_kind["non_finite"].examples
    assert example == {
        "file": "all.json", "where": "annotations[4]", "value": "[10, 10, nan, 10]"
    }  # fmt: skip
    assert by_kind["non_finite"].costs
    assert not by_kind["reaching"].costs
    names = {kind: [e["value"] for e in each.examples] for kind, each in by_kind.items()}
    assert names["few_boxes"] == ["cat (2)"]
    assert names["ignored"] == ["Cat (1)"]
    assert names["capitals"] == ["cat", "Cat"]
    assert "train: 1 base classes with fewer than 10 boxes: cat (2)" in map(str, by_kind.values())
    assert "few_boxes" not in {each.kind for each in findings_of("val", REPORT)}


def test_lines_and_table():
    assert "val: 3 images; 2 boxes of 1 base classes, 3 boxes of 1 novel classes" in short_line(
        "x", "val", REPORT
    )
    lines = class_table({"train": REPORT, "val": REPORT}).splitlines()[2:]  # base, novel, ignored
    assert [line.split("|")[1].strip() for line in lines] == ["cat", "dog", "Cat"]
    assert "2 (1)" in lines[0]


def test_long_prompts_and_empty_names():
    def count(texts):
        return [2 + len(text.split()) for text in texts]

    long = "very " * 6 + "long cat"
    too_long, empty = check_tokens(["cat", long, " "], ["{}", "a photo of a {}."], count, 10)
    assert (too_long.examples[0]["value"], empty.examples[0]["value"]) == (long, " ")


def test_the_same_to_clip():
    rows = torch.nn.functional.normalize(
        torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]), dim=1
    )  # cosines 0.995, 0, 0.0995
    (found,) = check_embeddings(["sofa", "couch", "cup"], rows)
    assert [each["value"] for each in found.examples] == ["sofa = couch (0.995)"]
