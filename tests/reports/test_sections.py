"""Parts of the reports: what a curve is drawn from, and that texts are texts."""

import base64
import math
import re

import pytest
from matplotlib.axes import Axes

from hierkd.reports import sections

HOSTILE = "<script>alert(1)</script>\"'&"


@pytest.fixture
def plotted(monkeypatch):
    """What matplotlib is asked to draw: (x, y, keywords)."""
    calls = []
    plot = Axes.plot

    def recorded(self, x, y, **keywords):
        calls.append((list(x), list(y), keywords))
        return plot(self, x, y, **keywords)

    monkeypatch.setattr(Axes, "plot", recorded)
    scales = []
    monkeypatch.setattr(Axes, "set_yscale", lambda self, scale: scales.append(scale))
    calls_and_scales = calls, scales
    return calls_and_scales


def svg(html):
    (found,) = re.findall(r"data:image/svg\+xml;base64,([^\"]+)", html)
    return base64.b64decode(found).decode()


def test_a_curve_is_drawn_from_its_values_with_gaps(plotted):
    values = [5.0, math.nan, 3.0, math.inf, 2.0]
    html = sections.curve_figure("t", {"": ([19, 39, 59, 79, 99], values)})
    ((x, y, _),) = plotted[0]
    assert x == [19, 39, 59, 79, 99]
    assert [v for v in y if not math.isnan(v)] == [5.0, 3.0, 2.0]
    assert [math.isnan(v) for v in y] == [False, True, False, True, False]
    assert svg(html).startswith("<?xml")


@pytest.mark.parametrize(
    ("values", "scales"),
    [
        ([100.0, 1.0], ["log"]),
        ([10.0, 1.0], []),
        ([100.0, 0.0], []),
        ([100.0, -1.0], []),
        ([math.nan], []),
        ([], []),
    ],
)
def test_a_logarithmic_axis_is_for_positive_values_of_several_magnitudes(plotted, values, scales):
    sections.curve_figure("t", {"": (list(range(len(values))), values)})
    assert plotted[1] == scales


def test_a_long_curve_is_thinned(plotted):
    n = 50_000
    sections.curve_figure("t", {"": (list(range(n)), [1.0] * n)})
    ((x, y, _),) = plotted[0]
    assert len(x) == len(y) <= 1000
    assert x[-1] >= n - 100


def test_lines_of_several_runs_have_a_legend_and_different_colours(plotted):
    lines = {f"run {i}": ([1, 2], [1.0, i]) for i in range(5)}
    html = sections.curve_figure("t", lines)
    assert len({keywords["color"] for *_, keywords in plotted[0]}) == 5
    assert all(f"<!-- run {i} -->" in svg(html) for i in range(5))


@pytest.mark.parametrize(
    "name", [HOSTILE, "$\\frac{", "_hidden", "$x$", "--><svg onload=alert(1)>"]
)
def test_names_of_runs_are_only_written(name):
    html = sections.curve_figure(HOSTILE, {name: ([1, 2], [1.0, 2.0]), "b": ([1], [1.0])}, HOSTILE)
    assert "<script" not in html
    drawn = svg(html)
    assert "<script" not in drawn
    assert "<svg onload" not in drawn


def test_texts_are_escaped():
    for html in (
        sections.facts({HOSTILE: HOSTILE}),
        sections.table([HOSTILE, HOSTILE], [[HOSTILE, HOSTILE]]),
        sections.details(HOSTILE, ""),
        sections.legend([((0, 0, 0), HOSTILE)]),
    ):
        assert "&lt;script&gt;" in html
        assert "<script" not in html


def test_losses_come_in_the_order_of_the_paper():
    found = ["loss_x", "lr", "loss_ikd", "loss_cls", "total_loss", "val/loss_cls"]
    assert sections.loss_names(found) == ["total_loss", "loss_cls", "loss_ikd", "loss_x"]


def test_bars_stay_in_their_place():
    widths = [
        re.findall(r"width:([\d.]+)%", sections.bar(value, novel=True))
        for value in (0.0, 33.33, 100.0, 250.0, -1.0)
    ]
    assert widths == [["0.0"], ["33.3"], ["100.0"], ["100.0"], ["0.0"]]
    assert sections.bar(None, novel=False) == sections.bar(math.nan, novel=False) == "–"
