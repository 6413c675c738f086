"""Drawing: small pictures grow, boxes land where they should, labels stay inside."""

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image

from hierkd.inference import drawing
from hierkd.inference.drawing import (
    class_color,
    draw_boxes,
    draw_instances,
    enlarge,
    fit,
    save_picture,
)

GREY = np.full((64, 128, 3), 128, dtype=np.uint8)
RED = (1.0, 0.0, 0.0)


def changed(drawn: np.ndarray) -> np.ndarray:
    return (drawn.astype(int) != 128).any(axis=2)


def test_pictures_are_brought_to_a_size():
    assert [enlarge(GREY, 512)[0].shape, enlarge(GREY, 512)[1]] == [(256, 512, 3), 4.0]
    assert enlarge(GREY, 100)[0] is GREY  # a larger one stays
    shrunk, factor = fit(GREY[:, :, ::-1], 64)
    assert (shrunk.shape, factor) == ((32, 64, 3), 0.5)
    assert not changed(shrunk).any()
    assert fit(GREY.transpose(1, 0, 2), 256)[0].shape == (256, 128, 3)


def test_box_is_drawn_at_its_scaled_place():
    drawn = draw_boxes(GREY, [[32, 16, 96, 48]], [""], [RED], min_long_side=512)
    rows, columns = np.nonzero(changed(drawn))
    edges = np.array([columns.min(), rows.min(), columns.max(), rows.max()])
    np.testing.assert_allclose(edges, np.array([32, 16, 96, 48]) * 4, atol=5)
    assert drawn[64, 256].tolist()[0] > 200  # upper edge, red
    assert not changed(drawn)[128, 256]  # inside stays as it was
    assert not changed(draw_boxes(GREY, np.zeros((0, 4)), [], [], min_long_side=256)).any()


def test_a_label_is_no_formula():
    def drawn(label):
        return draw_boxes(GREY, [[10, 30, 60, 60]], [label], [RED], min_long_side=512)

    assert changed(drawn(r"$\bad{$ 9%")).any()  # as a formula it would be an error
    # "$" is as wide in the middle as elsewhere, and letters are upright: one glyph differs, alone
    one, two = drawn("$5 or 6"), drawn("$5 or $")
    columns = np.nonzero((one != two).any(axis=2).any(axis=0))[0]
    assert 0 < columns.max() - columns.min() < 30


def test_labels_do_not_cover_each_other():
    boxes = np.array([[100.0, 100, 300, 250]] * 4 + [[102.0, 98, 290, 240], [2, 2, 60, 40]])
    labels = ["umbrella 95%", "cat 3%", "traffic cone 40%", "dog 7%", "bus 1%", "cup 2%"]
    places = drawing._place_labels(boxes, labels, 18, 25, (480, 640))
    assert places[-2] == (102, 98 - 25)  # the last ones choose first: above the box
    rectangles = [(x, y, x + 9 * len(t), y + 25) for (x, y), t in zip(places, labels, strict=True)]
    for i, (x0, y0, x1, y1) in enumerate(rectangles):
        assert x0 >= 0
        assert y0 >= 0
        assert y1 <= 480
        for u0, v0, u1, v1 in rectangles[:i]:
            assert x1 <= u0 or u1 <= x0 or y1 <= v0 or v1 <= y0
    crowd = drawing._place_labels(np.array([[10.0, 10, 60, 40]] * 40), ["umbrella"] * 40, 18, 25,
                                  (64, 200))  # fmt: skip
    assert all(0 <= x <= 200 and 0 <= y <= 64 - 25 for x, y in crowd)


@pytest.mark.parametrize("classes", [[1, 0], [0, 5000]])
def test_the_best_detection_is_labelled_by_the_vocabulary_and_on_top(monkeypatch, classes):
    labels = []

    def record(image, boxes, texts, colors, **_):
        labels.extend(texts)
        return draw_boxes(image, boxes, texts, colors)

    monkeypatch.setattr(drawing, "draw_boxes", record)
    found = Instances(
        (640, 640),
        pred_boxes=Boxes(torch.tensor([[200.0, 200, 400, 400]] * 2)),
        scores=torch.tensor([0.956, 0.5]),
        pred_classes=torch.tensor(classes),
    )
    names = {0: "cat", 1: "traffic cone", 5000: "dog"}
    drawn = draw_instances(np.zeros((640, 640, 3), np.uint8), found, names)
    assert labels == [f"{names[classes[1]]} 50%", f"{names[classes[0]]} 96%"]
    assert np.abs(drawn[300, 200] - 255 * np.array(class_color(classes[0]))).max() < 40
    assert class_color(classes[0]) != class_color(classes[1])


@pytest.mark.parametrize(("name", "kind"), [("a.png", "PNG"), ("a.JPG", "JPEG")])
def test_the_suffix_decides_the_format(tmp_path, name, kind):
    save_picture(tmp_path / "new" / name, GREY)
    with Image.open(tmp_path / "new" / name) as saved:
        assert (saved.format, saved.size) == (kind, (128, 64))
