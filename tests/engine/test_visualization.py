"""Drawing: small pictures grow, boxes land where they should, labels stay inside."""

import numpy as np
import torch
from detectron2.structures import Boxes, Instances

from hierkd.engine.visualization import class_color, draw_boxes, draw_instances, enlarge

GREY = np.full((64, 128, 3), 128, dtype=np.uint8)
RED = (1.0, 0.0, 0.0)


def changed(drawn: np.ndarray) -> np.ndarray:
    return (drawn.astype(int) != 128).any(axis=2)


def test_small_pictures_grow_and_large_ones_stay():
    grown, factor = enlarge(GREY, 512)
    assert grown.shape == (256, 512, 3)
    assert factor == 4.0
    same, factor = enlarge(GREY, 100)
    assert same is GREY
    assert factor == 1.0


def test_reversed_channels_can_be_enlarged():
    grown, _ = enlarge(GREY[:, :, ::-1], 256)
    assert grown.shape == (128, 256, 3)


def test_box_is_drawn_at_its_scaled_place():
    drawn = draw_boxes(GREY, [[32, 16, 96, 48]], [""], [RED], min_long_side=512)
    rows, columns = np.nonzero(changed(drawn))
    edges = np.array([columns.min(), rows.min(), columns.max(), rows.max()])
    np.testing.assert_allclose(edges, np.array([32, 16, 96, 48]) * 4, atol=5)
    assert drawn[64, 256].tolist()[0] > 200  # upper edge, red
    assert not changed(drawn)[128, 256]  # inside stays as it was


def test_nothing_to_draw():
    drawn = draw_boxes(GREY, np.zeros((0, 4)), [], [], min_long_side=256)
    assert drawn.shape == (128, 256, 3)
    assert not changed(drawn).any()


def test_labels_at_the_edges_stay_inside():
    """A label at the right or lower edge has as many pixels as one in the middle."""

    def label_area(box: list[float]) -> int:
        with_label = draw_boxes(GREY, [box], ["umbrella 95%"], [RED], min_long_side=512)
        without = draw_boxes(GREY, [box], [""], [RED], min_long_side=512)
        return int((with_label != without).any(axis=2).sum())

    in_the_middle = label_area([20, 20, 60, 50])
    for corner in ([118, 4, 128, 20], [0, 50, 40, 64], [100, 58, 127, 63], [-5, -5, 30, 30]):
        assert label_area(corner) > 0.85 * in_the_middle


def test_instances_are_labelled_by_the_vocabulary(monkeypatch):
    seen = {}

    def record(image, boxes, labels, colors):
        seen.update(boxes=boxes, labels=labels, colors=colors)
        return image

    monkeypatch.setattr("hierkd.engine.visualization.draw_boxes", record)
    instances = Instances(
        (64, 128),
        pred_boxes=Boxes(torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])),
        scores=torch.tensor([0.956, 0.5]),
        pred_classes=torch.tensor([1, 0]),
    )
    draw_instances(GREY, instances, ["cat", "traffic cone"])
    assert seen["labels"] == ["traffic cone 96%", "cat 50%"]
    assert seen["colors"] == [class_color(1), class_color(0)]
    assert seen["boxes"][1].tolist() == [5, 6, 7, 8]


def test_class_colours_never_run_out():
    assert class_color(0) != class_color(1)
    assert all(0 <= channel <= 1 for channel in class_color(5000))
