"""Sheets after Figures 4 and 5: which panels, which titles, which detections."""

import numpy as np
import pytest

import hierkd.reports.figures as figures
from hierkd.evaluation.heat_maps import HeatMap
from hierkd.reports.figures import (
    draw_comparison,
    draw_heat_map_sheet,
    draw_truth_and_detections,
    keep_best,
)
from hierkd.reports.gallery import CORRECT, UNCOUNTED, WRONG, Box, Sample


@pytest.fixture
def sheets(monkeypatch):
    """What reaches ``draw_sheet``."""
    seen = []
    draw = figures.draw_sheet

    def record(rows, **options):
        seen.append((list(rows), options))
        return draw(rows, **options)

    monkeypatch.setattr(figures, "draw_sheet", record)
    return seen


def heat_map(name: str, level: str, best: float) -> HeatMap:
    scores = np.zeros((20, 30), np.float32)
    scores[5, 6] = best
    return HeatMap(name, level, 8 if level == "p3" else 16, scores)


def test_a_row_per_class_and_a_title_per_panel(sheets):
    maps = [
        [heat_map("cat", "p3", 0.25), heat_map("cat", "p4", 0.5)],
        [heat_map("traffic cone", "p3", 0.0031), heat_map("traffic cone", "p4", 0.001)],
    ]
    sheet = draw_heat_map_sheet(np.full((40, 60, 3), 200, np.uint8), maps, panel_px=90)
    ((rows, options),) = sheets
    assert [row.titles for row in rows] == [
        ["cat", "cat · P3, stride 8 · max 0.25", "cat · P4, stride 16 · max 0.5"],
        [
            "traffic cone",
            "traffic cone · P3, stride 8 · max 0.0031",
            "traffic cone · P4, stride 16 · max 0.001",
        ],
    ]
    assert all(panel.shape == (60, 90, 3) for row in rows for panel in row.panels)
    assert len(options["legend"]) == 1
    assert sheet.shape[1] > 3 * 90


def test_the_maps_of_a_row_share_their_colours_and_noise_stays_dark(sheets):
    image = np.full((20, 30, 3), 100, np.uint8)
    row = [heat_map("cat", "p3", 0.25), heat_map("cat", "p4", 0.5)]
    noise = [heat_map("dog", "p3", 0.001), heat_map("dog", "p4", 0.001)]
    draw_heat_map_sheet(image, [row, noise], panel_px=30)
    ((rows, _),) = sheets
    best = [[int(p[5, 6].astype(int).sum()) for p in r.panels[1:]] for r in rows]
    assert best[0][1] > best[0][0] + 50  # half the score, darker
    assert max(best[1]) < best[0][0]


def test_no_maps_are_refused():
    with pytest.raises(ValueError, match="at least one class"):
        draw_heat_map_sheet(np.zeros((20, 30, 3), np.uint8), [])


def box(name: str, verdict: str, score: float | None, left: float = 2.0) -> Box:
    return Box((left, 3.0, left + 10.0, 12.0), name, verdict, score)


def sample(*detections: Box, color: int = 60) -> Sample:
    truth = (box("cat", CORRECT, None), box("dog", CORRECT, None, left=20))
    return Sample(np.full((30, 40, 3), color, np.uint8), "a.png", truth, detections)


def test_the_best_detections_by_number_or_by_score():
    found = tuple(box("cat", WRONG, score) for score in (0.9, 0.8, 0.2, 0.1))
    (by_number,) = keep_best([sample(*found)])
    assert [b.score for b in by_number.detections] == [0.9, 0.8]  # it has two objects
    (by_score,) = keep_best([sample(*found)], threshold=0.2)
    assert [b.score for b in by_score.detections] == [0.9, 0.8, 0.2]
    assert by_score.truth == sample().truth


def test_ground_truth_comes_first_and_each_detector_has_its_column(sheets, monkeypatch):
    drawn = []
    draw = figures.draw_sample

    def record(one, boxes, **options):
        drawn.append([(b.label, b.xyxy) for b in boxes])
        return draw(one, boxes, **options)

    monkeypatch.setattr(figures, "draw_sample", record)
    runs = {
        "IKD": [sample(box("cat", CORRECT, 0.5)), sample()],
        "HierKD": [sample(box("dog", WRONG, 0.25, left=20)), sample()],
    }
    draw_comparison(runs, ["first", "second"], panel_px=80)
    ((rows, options),) = sheets
    assert [row.titles for row in rows] == [["ground truth", "IKD", "HierKD"], ["", "", ""]]
    assert [row.caption for row in rows] == ["first", "second"]
    assert all(panel.shape == (60, 80, 3) for row in rows for panel in row.panels)
    assert len(options["legend"]) == 2
    truth, ikd, hierkd = drawn[:3]
    # Twice as large as the picture.
    assert truth == [("cat", (4, 6, 24, 24)), ("dog", (40, 6, 60, 24))]
    assert ikd == [("cat 50%", (4, 6, 24, 24))]
    assert hierkd == [("dog 25%", (40, 6, 60, 24))]


def test_classes_that_are_not_judged_are_explained(sheets):
    draw_comparison({"one": [sample(box("cow", UNCOUNTED, 0.5))]}, ["first"], panel_px=80)
    ((_, options),) = sheets
    assert [text for _, text in options["legend"]][-1] == "class that is not judged"


@pytest.mark.parametrize(
    ("runs", "captions"),
    [({}, []), ({"one": []}, []), ({"one": [sample()]}, []), ({"a": [sample()], "b": []}, ["x"])],
)
def test_unequal_columns_are_refused(runs, captions):
    with pytest.raises(ValueError, match="the same pictures"):
        draw_comparison(runs, captions)


@pytest.mark.parametrize(("judged", "legend"), [("novel", 3), ("", 2)])
def test_a_picture_with_its_truth_and_its_detections(sheets, judged, legend):
    found = (box("cat", CORRECT, 0.5), box("dog", WRONG, 0.4, left=20), box("ant", UNCOUNTED, 0.9))
    sheet = draw_truth_and_detections(sample(*found), "a.png", judged=judged, panel_px=80)
    (((row,), options),) = sheets
    assert row.titles == ["ground truth", "detected"]
    assert row.caption == "a.png"
    assert [panel.shape for panel in row.panels] == [(60, 80, 3)] * 2
    assert not np.array_equal(*row.panels)
    assert len(options["legend"]) == legend
    assert ("base class" in [text for _, text in options["legend"]]) == bool(judged)
    assert sheet.dtype == np.uint8
