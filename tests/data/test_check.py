"""Counting what a COCO file holds, on a file of three images."""

from hierkd.data.check import class_table, count_contents, short_line, warnings_of


def box(image, category, *xywh, **more):
    return {"image_id": image, "category_id": category, "bbox": list(xywh), **more}


CONTENT = {
    "images": [
        {"id": 1, "width": 100, "height": 50, "captions": ["a cat"]},
        {"id": 2, "width": 100, "height": 50},
        {"id": 3, "width": 100, "height": 50},
    ],
    "annotations": [
        box(1, 7, 0, 0, 10, 10),
        box(1, 7, 0, 0, 3, 10),  # tiny
        box(1, 8, 95, 0, 10, 10),  # 5 px outside
        box(2, 8, 10, 10, 0, 10),  # no area
        box(2, 9, 10, 10, 20, 20, iscrowd=1),
    ],
    "categories": [{"id": 9, "name": "Cat"}, {"id": 7, "name": "cat"}, {"id": 8, "name": "dog"}],
}
REPORT = count_contents(CONTENT, {7: "base", 8: "novel", 9: "ignored"})


def test_counts():
    assert [(c["name"], c["boxes"], c["images"]) for c in REPORT["classes"]] == [
        ("cat", 2, 1),
        ("dog", 2, 2),
        ("Cat", 1, 1),
    ]
    expected = {"images": 3, "images_without_boxes": 1, "boxes": 5, "crowd": 1, "tiny": 1}
    expected |= {"outside": 1, "without_area": 1, "images_with_captions": 1}
    assert {key: REPORT[key] for key in expected} == expected


def test_what_is_odd_is_said():
    text = "\n".join(warnings_of("train", REPORT))
    assert "fewer than 10 boxes: cat (2)" in text
    assert "left out with their boxes: Cat (1)" in text
    assert "capitals alone: cat, Cat" in text
    assert "1 images without any box" in text
    assert "1 boxes reaching out" in text
    assert "fewer than" not in "\n".join(warnings_of("val", REPORT))
    assert "train: 3 images; 1 with captions" in short_line("x", "train", REPORT)
    assert "2 boxes of 1 novel classes" in short_line("x", "val", REPORT)


def test_the_table_has_base_before_novel_before_ignored():
    lines = class_table({"train": REPORT, "val": REPORT}).splitlines()[2:]
    assert [line.split("|")[1].strip() for line in lines] == ["cat", "dog", "Cat"]
    assert "2 (1)" in lines[0]
