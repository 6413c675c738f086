"""The paper's figures beside one's own: Markdown, CSV and a picture of a table.

A cell without a run says "not run", one that the paper is not known to fill says "?", and a figure
over no object at all (NaN) "no objects".
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from hierkd.experiments.tables import Column, Table
from hierkd.files import replacing

__all__ = ["Results", "format_csv", "format_markdown", "plot_table", "write_table"]

Results = Mapping[str, Mapping[int, Mapping[str, float]]]
"""Row label -> seed -> column label -> percent; what was not run is not in it."""

NOT_RUN = "not run"
UNKNOWN = "?"
NO_OBJECTS = "no objects"


def _values(results: Results, label: str, column: Column) -> list[float]:
    """The figures of a cell, one a seed, in the order of the seeds; NaN: over no object."""
    by_seed = results.get(label, {})
    return [
        by_seed[seed][column.label] for seed in sorted(by_seed) if column.label in by_seed[seed]
    ]


def _cell(values: Sequence[float]) -> str:
    """Mean and range, such as ``65.4 (64.7-65.8)``; the value alone if there is one."""
    if not values:
        return NOT_RUN
    if any(map(math.isnan, values)):
        return NO_OBJECTS
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1f}-{max(values):.1f})"


def format_markdown(table: Table, results: Results, scale: str) -> str:
    """A Markdown table: a row a row, the paper's figure beside each of ours.

    Args:
        table: what the paper prints.
        results: what was run.
        scale: ``"coco"`` or ``"miniature"``: what the figures were measured on.
    """
    header, rule = "| row | seeds |", "|---|---|"
    for column in table.columns:
        header += f" {column.label}, {scale} | paper, COCO |"
        rule += "---|---|"
    lines = [header, rule]
    for row in table.rows:
        line = f"| {row.label} | {len(results.get(row.label, {}))} |"
        for column in table.columns:
            paper = row.paper.get(column.label)
            known = UNKNOWN if paper is None else f"{paper:.1f}"
            line += f" {_cell(_values(results, row.label, column))} | {known} |"
        lines.append(line)
    return "\n".join(lines)


def format_csv(table: Table, results: Results, scale: str) -> str:
    """The same as CSV, a line a cell: row, column, paper, number of seeds, mean, minimum, maximum.

    Args:
        table: what the paper prints.
        results: what was run.
        scale: as in :func:`format_markdown`.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["row", "column", "paper_coco", "scale", "seeds", "mean", "min", "max"])
    for row in table.rows:
        for column in table.columns:
            values = _values(results, row.label, column)
            summary = (statistics.mean(values), min(values), max(values)) if values else ()
            figures = [f"{value:.2f}" for value in summary] or [NOT_RUN] * 3
            if any(map(math.isnan, values)):
                figures = [NO_OBJECTS] * 3
            paper = row.paper.get(column.label, UNKNOWN)
            writer.writerow([row.label, column.label, paper, scale, len(values), *figures])
    return text.getvalue()


def plot_table(table: Table, results: Results, scale: str, path: Path) -> None:
    """Bars of the first column in the paper and of every AP50 (of proposals: AR75) that was run.

    The paper's figures (COCO) have a panel of their own: unless they were measured on COCO, ours
    are of another world and only the order of the rows can be compared. Dots are seeds.

    Args:
        table: what the paper prints.
        results: what was run; at least one row.
        scale: as in :func:`format_markdown`.
        path: of the PNG.
    """
    columns = [c for c in table.columns if c.metric.endswith(("AP50", "AR75@100", "AR75@1000"))]
    labels = [row.label for row in table.rows]
    height = 1.1 + 0.34 * len(labels)
    panels = 1 + len(columns)
    with mpl.rc_context({"font.size": 8}):
        figure = Figure(figsize=(2.4 + 1.9 * panels, height), layout="constrained")
        axes = figure.subplots(1, panels, sharey=True, squeeze=False)[0]
        places = range(len(labels))
        paper = [row.paper.get(columns[0].label) for row in table.rows]
        axes[0].barh(places, [value or 0.0 for value in paper], color="#9aa5b1")
        axes[0].set_title(f"paper, COCO:\n{columns[0].label}")
        _write_values(axes[0], [None if v is None else f"{v:.1f}" for v in paper], UNKNOWN, paper)
        for axis, column in zip(axes[1:], columns, strict=True):
            cells = [_values(results, label, column) for label in labels]
            means = [statistics.mean(values) if values else None for values in cells]
            axis.barh(places, [mean or 0.0 for mean in means], color="#4c86c6")
            for place, values in zip(places, cells, strict=True):
                axis.plot(values, [place] * len(values), "o", color="#1b3350", markersize=2.5)
            ends = [max(values) if values else None for values in cells]
            texts = [None if mean is None else f"{mean:.1f}" for mean in means]
            _write_values(axis, texts, NOT_RUN, ends)
            axis.set_title(f"{scale}:\n{column.label}")
        axes[0].set_yticks(list(places), labels)
        axes[0].invert_yaxis()
        figure.suptitle(f"Table {table.number}: {table.title}")
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=150, format="png")


def _write_values(
    axis: mpl.axes.Axes, texts: Sequence[str | None], missing: str, ends: Sequence[float | None]
) -> None:
    """Write a value at the end of each bar, and leave room for it."""
    largest = max([end for end in ends if end is not None], default=1.0)
    for place, (text, end) in enumerate(zip(texts, ends, strict=True)):
        axis.text((end or 0.0) + 0.03 * largest, place, text or missing, va="center", fontsize=7)
    axis.set_xlim(0, 1.3 * largest)
    axis.spines[["top", "right"]].set_visible(False)


def write_table(table: Table, results: Results, scale: str, folder: Path, title: str) -> str:
    """Write ``table<N>.md``, ``.csv`` and, if anything was run, ``.png``; returns the Markdown.

    Args:
        table: what the paper prints.
        results: what was run.
        scale: as in :func:`format_markdown`.
        folder: made if it is not there.
        title: above the table, one line.
    """
    folder.mkdir(parents=True, exist_ok=True)
    markdown = f"{title}\n\n{format_markdown(table, results, scale)}"
    stem = folder / f"table{table.number}"
    for suffix, text in ((".md", markdown + "\n"), (".csv", format_csv(table, results, scale))):
        with replacing(stem.with_suffix(suffix)) as temporary:
            Path(temporary).write_text(text)
    if any(results.values()):
        plot_table(table, results, scale, stem.with_suffix(".png"))
    return markdown
