"""The paper's figures beside ours: no cell is invented, whatever was run."""

import pytest

from hierkd.experiments.reproduce import format_markdown, write_table
from hierkd.experiments.tables import TABLES, Column, Row, Table, Training

TRAINING = Training("a", "a.yaml")
TABLE = Table(
    4,
    "a table",
    (
        Column("novel", "novel", "novel/AP50"),
        Column("recall", "novel", "novel/AR50"),
        Column("base", "base", "base/AP50"),  # the paper does not print it
    ),
    (
        Row("first", TRAINING, None, {"novel": 10.25}),
        Row("second", TRAINING, None, {"novel": 20.0, "recall": 60.0}),
        Row("another's", None, None, {"novel": 0.31}),
        Row("bound", evaluation="upper_bound"),
    ),
)
RESULTS = {
    "first": {0: {"novel": 1.0, "recall": 50.0}, 2: {"novel": 4.0}},
    "second": {0: {"novel": 7.0}, 1: {"novel": float("nan")}},
}


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_markdown_by_hand():
    header, _, *rows = format_markdown(TABLE, RESULTS, "miniature").split("\n")
    assert cells(header) == [
        *("row", "seeds", "novel, miniature", "paper, COCO", "recall, miniature", "paper, COCO"),
        "base, miniature",
    ]
    assert [cells(row) for row in rows] == [
        ["first", "2", "2.5 (1.0-4.0)", "10.25", "50.0", "-", "not run"],
        ["second", "2", "no objects", "20.0", "not run", "60.0", "not run"],
        ["another's", "0", "-", "0.31", "-", "-", "-"],
        ["bound", "0", "not run", "-", "not run", "-", "not run"],
    ]


@pytest.mark.parametrize("number", sorted(TABLES))
def test_without_any_run_every_table_is_written_with_all_figures_of_the_paper(tmp_path, number):
    table = TABLES[number]
    markdown = write_table(table, {}, "coco", tmp_path / "new", "a title")
    title, _, header, _, *lines = markdown.split("\n")
    assert title == "a title"
    papers = [i for i, name in enumerate(cells(header)) if name == "paper, COCO"]
    assert "?" not in markdown
    for row, line in zip(table.rows, lines, strict=True):
        assert cells(line)[0] == row.label
        shown = [cells(line)[i] for i in papers]
        assert [float(cell) for cell in shown if cell != "-"] == list(row.paper.values())
    ours = sum(r.coco is not None or r.evaluation != "train_net" for r in table.rows)
    assert markdown.count("not run") == ours * len(table.columns)
    assert (tmp_path / "new" / f"table{number}.md").read_text() == markdown + "\n"
