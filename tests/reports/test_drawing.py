"""Drawing: small pictures grow, boxes land where they should, labels stay inside."""

import numpy as np
import torch
from detectron2.structures import Boxes, Instances

from hierkd.reports.drawing import (
    SheetRow,
    _place_labels,
    class_color,
    draw_boxes,
    draw_instances,
    draw_sheet,
    enlarge,
    fit,
)

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


def test_a_label_is_no_formula():
    def drawn(label):
        return draw_boxes(GREY, [[10, 30, 60, 60]], [label], [RED], min_long_side=512)

    assert changed(drawn(r"$\bad{$ 9%")).any()  # as a formula it would be an error
    # "$" is as wide in the middle as elsewhere, and letters are upright: one glyph differs, alone
    one, two = drawn("$5 or 6"), drawn("$5 or $")
    columns = np.nonzero((one != two).any(axis=2).any(axis=0))[0]
    assert 0 < columns.max() - columns.min() < 30


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

    def record(image, boxes, labels, colors, **_):
        seen.update(boxes=boxes, labels=labels, colors=colors)
        return image

    monkeypatch.setattr("hierkd.reports.drawing.draw_boxes", record)
    instances = Instances(
        (64, 128),
        pred_boxes=Boxes(torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])),
        scores=torch.tensor([0.956, 0.5]),
        pred_classes=torch.tensor([1, 0]),
    )
    draw_instances(GREY, instances, ["cat", "traffic cone"])
    assert seen["labels"] == ["cat 50%", "traffic cone 96%"]  # the best last, on top
    assert seen["colors"] == [class_color(0), class_color(1)]
    assert seen["boxes"][0].tolist() == [5, 6, 7, 8]


def test_class_colours_never_run_out():
    assert class_color(0) != class_color(1)
    assert all(0 <= channel <= 1 for channel in class_color(5000))


def test_fit_shrinks_and_enlarges_to_the_longer_side():
    shrunk, factor = fit(GREY, 64)
    assert shrunk.shape == (32, 64, 3)
    assert factor == 0.5
    grown, factor = fit(np.ascontiguousarray(GREY.transpose(1, 0, 2)), 256)
    assert grown.shape == (256, 128, 3)
    assert factor == 2.0
    assert not changed(shrunk).any()


def test_labels_of_boxes_that_coincide_do_not_cover_each_other():
    boxes = np.array([[100.0, 100, 300, 250]] * 4 + [[102.0, 98, 290, 240], [2, 2, 60, 40]])
    labels = ["umbrella 95%", "cat 3%", "traffic cone 40%", "dog 7%", "bus 1%", "cup 2%"]
    places = _place_labels(boxes, labels, 18, 25, (480, 640))
    assert places[-2] == (102, 98 - 25)  # the last ones choose first: above the box
    rectangles = [(x, y, x + 9 * len(t), y + 25) for (x, y), t in zip(places, labels, strict=True)]
    for i, (x0, y0, x1, y1) in enumerate(rectangles):
        assert x0 >= 0
        assert y0 >= 0
        assert y1 <= 480
        for u0, v0, u1, v1 in rectangles[:i]:
            assert x1 <= u0 or u1 <= x0 or y1 <= v0 or v1 <= y0


def test_more_labels_than_room_are_still_placed_inside():
    boxes = np.array([[10.0, 10, 60, 40]] * 40)
    places = _place_labels(boxes, ["umbrella 95%"] * 40, 18, 25, (64, 200))
    assert all(0 <= x <= 200 and 0 <= y <= 64 - 25 for x, y in places)


def colored(color: tuple[int, int, int], height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), color, dtype=np.uint8)


def place_of(sheet: np.ndarray, color: tuple[int, int, int]) -> tuple[int, int, int, int]:
    rows, columns = np.nonzero((sheet == color).all(axis=2))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def test_panels_of_a_sheet_line_up_and_nothing_covers_them():
    red, green, blue, grey = (255, 0, 0), (0, 255, 0), (0, 0, 255), (90, 91, 92)
    rows = [
        SheetRow([colored(red, 60, 100), colored(green, 80, 100)], ["one", "two"], "a caption"),
        SheetRow([colored(blue, 50, 40)], [""]),
    ]
    sheet = draw_sheet(rows, panel_px=100, legend=[(colored(grey, 20, 30), "grey")])
    sizes = {red: (100, 60), green: (100, 80), blue: (40, 50), grey: (30, 20)}
    places = {color: place_of(sheet, color) for color in sizes}
    for color, (width, height) in sizes.items():
        x0, y0, x1, y1 = places[color]
        assert (x1 - x0, y1 - y0) == (width, height)
        assert (sheet[y0:y1, x0:x1] == color).all()
    assert places[red][0] == places[blue][0]
    assert places[red][1] == places[green][1]
    assert places[blue][1] >= places[green][3]
    assert places[grey][1] >= places[blue][3]
    above = sheet[: places[red][1]]
    assert (above < 128).any(), "titles and caption are written above the panels"


def test_titles_of_any_length_stay_over_their_panel():
    long = "an exceedingly long name of a class that nobody would ever write · P3, stride 8"
    panels = [colored((255, 0, 0), 40, 120), colored((0, 255, 0), 40, 120)]
    with_text = draw_sheet([SheetRow(panels, [long, ""])], panel_px=120)
    top = place_of(with_text, (255, 0, 0))[1]
    second = place_of(with_text, (0, 255, 0))[0]
    written = (with_text[:top] < 200).any(axis=(0, 2)).nonzero()[0]
    assert len(written) > 50
    assert written.max() < second


def test_the_best_detection_is_drawn_on_top():
    boxes = torch.tensor([[200.0, 200, 400, 400]] * 2)
    for classes in ([0, 1], [1, 0]):
        instances = Instances(
            (640, 640),
            pred_boxes=Boxes(boxes),
            scores=torch.tensor([0.9, 0.4]),
            pred_classes=torch.tensor(classes),
        )
        drawn = draw_instances(np.zeros((640, 640, 3), np.uint8), instances, ["a", "b"])
        best = 255 * np.array(class_color(classes[0]))
        assert np.abs(drawn[300, 200] - best).max() < 40  # the left edge
