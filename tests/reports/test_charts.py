"""What curves are drawn from, and sheets after Figures 4 and 5: which panels, which titles."""

import math

import numpy as np
import pytest
from matplotlib.axes import Axes

from hierkd.evaluation.heat_maps import HeatMap
from hierkd.reports import charts
from hierkd.reports.gallery import CORRECT, LEGEND, WRONG, Box, Sample


@pytest.fixture
def plotted(monkeypatch):
    """What matplotlib is asked to draw: (x, y, keywords); and scales of axes."""
    calls, scales, plot = [], [], Axes.plot

    def recorded(self, x, y, **keywords):
        calls.append((list(x), list(y), keywords))
        return plot(self, x, y, **keywords)

    monkeypatch.setattr(Axes, "plot", recorded)
    monkeypatch.setattr(Axes, "set_yscale", lambda self, scale: scales.append(scale))
    return calls, scales


def test_a_curve_is_drawn_from_its_values_with_gaps(plotted):
    values = [5.0, math.nan, 3.0, math.inf, 2.0]
    svg = charts.draw_curves({"": ([19, 39, 59, 79, 99], values)})
    charts.draw_curves({"": (list(range(50_000)), [1.0] * 50_000)})  # thinned
    (x, y, _), (long, _, _) = plotted[0]
    assert len(long) <= 1000
    assert long[-1] >= 49_900
    assert x == [19, 39, 59, 79, 99]
    assert [None if math.isnan(v) else v for v in y] == [5.0, None, 3.0, None, 2.0]
    assert svg.startswith(b"<?xml")


@pytest.mark.parametrize(
    ("values", "scales"),
    [([100.0, 1.0], ["log"])]
    + [(values, []) for values in ([10.0, 1.0], [100.0, 0.0], [100.0, -1.0], [math.nan], [])],
)
def test_a_logarithmic_axis_is_for_positive_values_of_several_magnitudes(plotted, values, scales):
    charts.draw_curves({"": (list(range(len(values))), values)})
    assert plotted[1] == scales


def test_lines_have_colours_and_a_legend(plotted):
    svg = charts.draw_curves({name: ([1, 2], [1.0, 2.0]) for name in ("novel", "base")}).decode()
    assert len({keywords["color"] for *_, keywords in plotted[0]}) == 2
    assert all(f"<!-- {name} -->" in svg for name in ("novel", "base"))


# ------------------------------------------------------------------------------------------ sheets


@pytest.fixture
def sheets(monkeypatch):
    """What reaches ``draw_sheet``."""
    seen, draw = [], charts.draw_sheet

    def record(rows, **options):
        seen.append((list(rows), options))
        return draw(rows, **options)

    monkeypatch.setattr(charts, "draw_sheet", record)
    return seen


def heat_map(name: str, level: str, best: float) -> HeatMap:
    scores = np.zeros((20, 30), np.float32)
    scores[5, 6] = best
    return HeatMap(name, level, 8 if level == "p3" else 16, scores)


def test_heat_maps_have_a_row_per_class_common_colours_and_dark_noise(sheets):
    maps = [
        [heat_map("cat", "p3", 0.25), heat_map("cat", "p4", 0.5)],
        [heat_map("traffic cone", "p3", 0.0031), heat_map("traffic cone", "p4", 0.001)],
    ]
    sheet = charts.draw_heat_map_sheet(np.full((40, 60, 3), 100, np.uint8), maps, panel_px=30)
    ((rows, options),) = sheets
    assert [row.titles for row in rows] == [
        ["cat", "cat · P3, stride 8 · max 0.25", "cat · P4, stride 16 · max 0.5"],
        [
            "traffic cone",
            "traffic cone · P3, stride 8 · max 0.0031",
            "traffic cone · P4, stride 16 · max 0.001",
        ],
    ]
    assert all(panel.shape == (20, 30, 3) for row in rows for panel in row.panels)
    assert len(options["legend"]) == 1
    assert sheet.shape[1] > 3 * 30
    best = [[int(p[5, 6].astype(int).sum()) for p in r.panels[1:]] for r in rows]
    assert best[0][1] > best[0][0] + 50  # half the score, darker
    assert max(best[1]) < best[0][0]


def box(name: str, verdict: str, score: float | None, left: float = 2.0) -> Box:
    return Box((left, 3.0, left + 10.0, 12.0), name, verdict, score)


def sample(*detections: Box) -> Sample:
    truth = (box("cat", CORRECT, None), box("dog", CORRECT, None, left=20))
    return Sample(np.full((30, 40, 3), 60, np.uint8), "a.png", truth, detections)


def test_ground_truth_comes_first_and_each_detector_has_its_column(sheets, monkeypatch):
    drawn = []

    def record(one, boxes, **options):
        drawn.append([each.label for each in boxes])
        return np.zeros((60, 80, 3), np.uint8)

    monkeypatch.setattr(charts, "draw_sample", record)
    columns = {
        "IKD": [sample(box("cat", CORRECT, 0.5)), sample()],
        "HierKD": [sample(box("dog", WRONG, 0.25, left=20)), sample()],
    }
    charts.draw_comparison(columns, ["first", "second"], panel_px=80)
    ((rows, options),) = sheets
    assert [row.titles for row in rows] == [["ground truth", "IKD", "HierKD"], ["", "", ""]]
    assert [row.caption for row in rows] == ["first", "second"]
    assert drawn[:3] == [["cat", "dog"], ["cat 50%"], ["dog 25%"]]
    assert [text for _, text in options["legend"]] == [text for _, text in LEGEND[:2]]
