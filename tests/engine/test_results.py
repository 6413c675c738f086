"""Records of a measurement: what JSON can hold, and the table."""

import json
import subprocess

from hierkd.engine.results import (
    collect_record,
    current_commit,
    figures_table,
    write_results,
)

FIGURES = {
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
        figures=FIGURES,
        commit="abc",
    )
    path = tmp_path / "new" / "figures.json"
    write_results(path, record)
    assert json.loads(path.read_text()) == record
    assert list(record) == [
        *("command", "config", "weights", "dataset", "options", "figures", "commit")
    ]
    assert record["dataset"] == ["val_novel"]
    assert record["figures"]["val_novel"]["crop 1"] == {
        "novel/AP50": 68.04,
        "novel/APl": None,
        "AP50-cat": 70.0,
    }
    assert [p.name for p in path.parent.iterdir()] == ["figures.json"]


def test_the_table_has_a_line_per_row_and_group():
    lines = figures_table(FIGURES, ["AP50", "APl"]).split("\n")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["dataset", "row", "classes", "AP50", "APl"]
    assert cells[2:] == [
        ["val_novel", "crop 1", "novel", "68.0", "–"],
        ["val_novel", "crop 1.5", "novel", "7.0", "100.0"],
    ]


def test_the_commit_is_a_word_with_a_plus_after_changes(tmp_path):
    assert current_commit(tmp_path) == "unknown"
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    (tmp_path / "file").write_text("one")
    for arguments in (["init", "-q"], ["add", "file"], ["commit", "-qm", "first"]):
        subprocess.run([*git, *arguments], check=True)
    clean = current_commit(tmp_path)
    assert len(clean) == 10
    (tmp_path / "file").write_text("two")
    assert current_commit(tmp_path) == clean + "+"
