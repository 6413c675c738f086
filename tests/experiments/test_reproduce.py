"""The paper's figures beside ours: no cell is invented, whatever was run."""

import csv
import io

import numpy as np
import pytest
from PIL import Image

from hierkd.experiments.reproduce import format_csv, format_markdown, write_table
from hierkd.experiments.tables import TABLES, Column, Row, Table

TABLE = Table(
    4,
    "a table",
    (Column("novel", "novel", "novel/AP50"), Column("recall", "novel", "novel/AR50")),
    (
        Row("first", None, None, {"novel": 10.25}),
        Row("second", None, None, {"novel": 20.0, "recall": 60.0}),
        Row("third", None, None),
    ),
)
RESULTS = {
    "first": {0: {"novel": 1.0, "recall": 50.0}, 2: {"novel": 4.0}},
    "second": {0: {"novel": 7.0}},
}


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_markdown_by_hand():
    header, rule, first, second, third = format_markdown(TABLE, RESULTS, "miniature").split("\n")
    assert cells(header) == [
        *("row", "seeds", "novel, miniature", "paper, COCO", "recall, miniature", "paper, COCO")
    ]
    assert len(cells(rule)) == 6
    assert cells(first) == ["first", "2", "2.5 (1.0-4.0)", "10.2", "50.0", "?"]
    assert cells(second) == ["second", "1", "7.0", "20.0", "not run", "60.0"]
    assert cells(third) == ["third", "0", "not run", "?", "not run", "?"]


def test_a_figure_over_no_object_is_not_a_missing_run():
    results = {"first": {0: {"novel": float("nan")}, 1: {"novel": float("nan")}}}
    first = format_markdown(TABLE, results, "miniature").split("\n")[2]
    assert cells(first)[2] == "no objects"
    row = next(csv.DictReader(io.StringIO(format_csv(TABLE, results, "miniature"))))
    assert (row["mean"], row["seeds"]) == ("no objects", "2")


def test_csv_has_a_line_a_cell():
    rows = list(csv.DictReader(io.StringIO(format_csv(TABLE, RESULTS, "coco"))))
    assert len(rows) == 3 * 2
    by_cell = {(row["row"], row["column"]): row for row in rows}
    cell = by_cell["first", "novel"]
    assert (cell["mean"], cell["min"], cell["max"], cell["seeds"]) == ("2.50", "1.00", "4.00", "2")
    assert (cell["paper_coco"], cell["scale"]) == ("10.25", "coco")
    cell = by_cell["third", "recall"]
    assert (cell["paper_coco"], cell["mean"], cell["seeds"]) == ("?", "not run", "0")


@pytest.mark.parametrize("number", sorted(TABLES))
def test_without_any_run_every_table_is_written_and_says_so(tmp_path, number):
    table = TABLES[number]
    markdown = write_table(table, {}, "coco", tmp_path / "new", "a title")
    assert markdown.startswith("a title\n\n| row |")
    assert markdown.count("not run") == len(table.rows) * len(table.columns)
    for row in table.rows:
        assert f"| {row.label} | 0 |" in markdown
    assert {p.name for p in (tmp_path / "new").iterdir()} == {
        f"table{number}.md",
        f"table{number}.csv",
    }


def test_the_picture_shows_what_was_run(tmp_path):
    write_table(TABLE, RESULTS, "miniature", tmp_path, "a title")
    first = np.asarray(Image.open(tmp_path / "table4.png").convert("RGB"))
    assert first.shape[0] > 200
    assert len(np.unique(first.reshape(-1, 3), axis=0)) > 10
    more = {**RESULTS, "third": {0: {"novel": 30.0}}}
    write_table(TABLE, more, "miniature", tmp_path, "a title")
    second = np.asarray(Image.open(tmp_path / "table4.png").convert("RGB"))
    assert first.shape != second.shape or (first != second).any()
