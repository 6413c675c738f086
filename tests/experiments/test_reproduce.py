"""The paper's figures beside ours: no cell is invented, whatever was run."""

import csv
import io

import pytest
from PIL import Image

from hierkd.experiments.reproduce import format_csv, format_markdown, write_table
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


def test_csv_has_a_line_a_cell():
    rows = list(csv.DictReader(io.StringIO(format_csv(TABLE, RESULTS, "coco"))))
    by_cell = {(row["row"], row["column"]): list(row.values())[2:] for row in rows}
    assert len(by_cell) == len(rows) == 4 * 3
    assert by_cell["first", "novel"] == ["10.25", "coco", "2", "2.50", "1.00", "4.00"]
    assert by_cell["second", "novel"] == ["20.0", "coco", "2", *["no objects"] * 3]
    assert by_cell["second", "base"] == ["-", "coco", "0", *["not run"] * 3]
    assert by_cell["another's", "novel"] == ["0.31", "coco", "0", "-", "-", "-"]


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
    assert {p.suffix for p in (tmp_path / "new").iterdir()} == {".md", ".csv"}


def test_the_picture_shows_what_was_run(tmp_path):
    pictures = []
    for results in (RESULTS, {**RESULTS, "bound": {0: {"novel": 30.0}}}):
        write_table(TABLE, results, "miniature", tmp_path, "a title")
        pictures.append(Image.open(tmp_path / "table4.png").convert("RGB").tobytes())
    assert pictures[0] != pictures[1]
