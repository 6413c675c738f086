"""Records of a measurement: what JSON can hold, and the table."""

import json

from hierkd.experiments.results import (
    collect_record,
    figures_table,
    write_results,
)

ROWS = {
    "val_novel": {
        "crop 1": {"novel/AP50": 68.04321, "novel/APl": float("nan"), "AP50-cat": 70.0},
        "crop 1.5": {"novel/AP50": 7.0, "novel/APl": 100.0, "AP50-cat": 70.0},
    }
}


def test_a_record_goes_through_json(tmp_path):
    record = collect_record(
        command="python tools/x.py",
        config="a.yaml",
        weights="model.pth",
        dataset=("val_novel",),
        options={"crop_scales": [1.0, 1.5]},
        rows=ROWS,
        main_row="crop 1.5",
        commit="abc",
    )
    path = tmp_path / "new" / "figures.json"
    write_results(path, record)
    assert json.loads(path.read_text()) == record
    assert list(record) == [
        *("command", "config", "weights", "dataset", "options"),
        *("figures", "main_row", "rows", "commit"),
    ]
    assert record["dataset"] == ["val_novel"]
    assert record["rows"]["val_novel"]["crop 1"] == {
        "novel/AP50": 68.04,
        "novel/APl": None,
        "AP50-cat": 70.0,
    }
    assert record["figures"] == {"val_novel": ROWS["val_novel"]["crop 1.5"]}
    assert [p.name for p in path.parent.iterdir()] == ["figures.json"]


def test_the_table_has_a_line_per_row_and_group():
    lines = figures_table(ROWS, ["AP50", "APl"]).split("\n")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["dataset", "row", "classes", "AP50", "APl"]
    assert cells[2:] == [
        ["val_novel", "crop 1", "novel", "68.0", "–"],
        ["val_novel", "crop 1.5", "novel", "7.0", "100.0"],
    ]
