"""Counting what a COCO file holds, on a file of three images, and findings about names."""

import torch

from hierkd.data.check import (
    check_embeddings,
    check_tokens,
    class_table,
    count_contents,
    short_line,
    warnings_of,
)


def box(image, category, *xywh, **more):
    return {"id": 0, "image_id": image, "category_id": category, "bbox": list(xywh), **more}


CONTENT = {
    "images": [
        {"id": 1, "width": 100, "height": 50},
        {"id": 2, "width": 100, "height": 50},
        {"id": 3, "width": 100, "height": 50},
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
REPORT = count_contents(CONTENT, {7: "base", 8: "novel", 9: "ignored"})


def test_counts():
    assert [(c["name"], c["boxes"], c["images"]) for c in REPORT["classes"]] == [
        ("cat", 2, 1),
        ("dog", 3, 2),
        ("Cat", 1, 1),
    ]
    expected = {"images": 3, "images_without_boxes": 1, "boxes": 6, "crowd": 1, "tiny": 1}
    expected |= {"outside": 1, "without_area": 1, "non_finite": 1}
    assert {key: REPORT[key] for key in expected} == expected


def test_what_is_odd_is_said():
    text = "\n".join(warnings_of("train", REPORT))
    for words in (
        *("fewer than 10 boxes: cat (2)", "left out with their boxes: Cat (1)", "alone: cat, Cat"),
        *("1 images without any box", "1 boxes reaching out", "1 boxes that are no finite numbers"),
    ):
        assert words in text
    assert "fewer than" not in "\n".join(warnings_of("val", REPORT))


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
    assert long in too_long
    assert "anything that CLIP reads:  " in empty


def test_the_same_to_clip():
    rows = torch.nn.functional.normalize(
        torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]), dim=1
    )  # cosines 0.995, 0, 0.0995
    (found,) = check_embeddings(["sofa", "couch", "cup"], rows)
    assert "sofa = couch (0.995)" in found
    assert "cup" not in found
