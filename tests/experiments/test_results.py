"""Figures as results.json and as tables."""

import json
import math

from hierkd.experiments.results import (
    collect_results,
    figures_table,
    rounded_figures,
    summary_rows,
    write_results,
)


def metrics(start):
    """Distinct figures: novel AP50 is ``start``, AR50 ``start + .5``, the next group one more."""
    groups = enumerate(("novel", "base", "all"))
    return {f"{g}/{m}": start + k + h for k, g in groups for m, h in (("AP50", 0), ("AR50", 0.5))}


def test_results_have_the_promised_layout(tmp_path):
    figures = {"zsd": metrics(10.123), "gzsd": metrics(20)}
    bounds = {"gzsd": {**metrics(40), "all/AR50": math.nan}, "zsd": metrics(30)}
    results = collect_results(figures, bounds, config="x.yaml", seconds={"train": 12.3})
    write_results(tmp_path / "new" / "results.json", results)
    assert json.loads((tmp_path / "new" / "results.json").read_text()) == {
        "zsd": {"novel": {"AP50": 10.12, "AR50": 10.62}},
        "gzsd": {
            group: {"AP50": 20 + k, "AR50": 20.5 + k}
            for k, group in enumerate(("novel", "base", "all"))
        },
        "upper_bound": {
            "zsd": {"novel": {"AP50": 30, "AR50": 30.5}},
            "gzsd": {
                "novel": {"AP50": 40, "AR50": 40.5},
                "base": {"AP50": 41, "AR50": 41.5},
                "all": {"AP50": 42, "AR50": None},
            },
        },
        "config": "x.yaml",
        "seconds": {"train": 12.3},
    }
    assert summary_rows(results) == [
        ("ZSD", "novel", 10.12, 10.62, 30),
        ("GZSD", "novel", 20, 20.5, 40),
        ("GZSD", "base", 21, 21.5, 41),
        ("GZSD", "all", 22, 22.5, 42),
    ]


def test_figures_are_rounded_and_laid_out():
    figures = {"val_novel": {"novel/AP50": 68.04321, "novel/APl": math.nan, "AP50-cat": 70.0}}
    rounded = {"novel/AP50": 68.04, "novel/APl": None, "AP50-cat": 70.0}
    assert rounded_figures(figures) == {"val_novel": rounded}
    lines = figures_table(figures, ["AP50", "APl"]).split("\n")
    assert [line.replace(" ", "") for line in (lines[0], *lines[2:])] == [
        "|dataset|classes|AP50|APl|",
        "|val_novel|novel|68.0|–|",
    ]
