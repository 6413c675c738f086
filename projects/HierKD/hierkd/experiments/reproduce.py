"""A table of the paper made again: its runs, its evaluations, and its figures beside the paper's.

A cell without a run says "not run", one that the paper leaves empty "-", and a figure over no
object at all (NaN) "no objects".
"""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from tabulate import tabulate  # type: ignore[import-untyped]

from hierkd.experiments.runs import Run, find_figure, read_record
from hierkd.experiments.tables import Column, Row, Table
from hierkd.files import replacing
from hierkd.load_config import load_config

__all__ = [
    "Reproduction",
    "Results",
    "format_csv",
    "format_markdown",
    "plot_table",
    "read_evaluation",
    "write_table",
]

Results = Mapping[str, Mapping[int, Mapping[str, float]]]
"""Row label -> seed -> column label -> percent; what was not run is not in it."""

NOT_RUN = "not run"
NO_OBJECTS = "no objects"
EMPTY = "-"


@dataclass(frozen=True)
class Reproduction:
    """The runs of some rows of a table, and the evaluations that follow them.

    Attributes:
        table: of the paper.
        rows: of it.
        seeds: of each row.
        root: of the project; commands run there.
        folder: of this scale's runs.
        scale: ``"coco"`` or ``"miniature"``.
        num_gpus: of each run.
        opts: KEY VALUE ... on top of each row's own.
    """

    table: Table
    rows: Sequence[Row]
    seeds: Sequence[int]
    root: Path
    folder: Path
    scale: str
    num_gpus: int = 0
    opts: tuple[str, ...] = ()

    def run_of(self, row: Row, seed: int) -> Run | None:
        """The training of a row; None if the row has none at this scale."""
        training = row.coco if self.scale == "coco" else row.miniature
        if training is None:
            return None
        folder = self.folder / training.name / f"seed{seed}"
        opts = (*training.opts, *self.opts)
        return Run(training.name, training.config, opts, seed, folder, self.num_gpus)

    def runs(self) -> list[Run]:
        """Every training once, seed by seed."""
        found = [self.run_of(row, seed) for seed in self.seeds for row in self.rows]
        return list({run.folder: run for run in found if run is not None}.values())

    def evaluation(self, row: Row, seed: int) -> tuple[list[str], Path] | None:
        """The command that turns a row's checkpoint into figures, and where it writes them.

        None if the training's own evaluation holds the figures, or there are none.
        """
        run = self.run_of(row, seed)
        settings: list[str] = []
        if row.evaluation == "upper_bound" and seed == self.seeds[0]:  # nothing is random
            config = f"configs/{'hierkd_R50' if self.scale == 'coco' else 'miniature/hierkd'}.yaml"
            file = self.folder / "upper_bound.json"
            tool, opts = "clip_upper_bound", list(self.opts)
        elif row.evaluation == "direct_inference" and run is not None:
            config, file = run.config, run.folder / "direct_inference.json"
            tool = "clip_direct_inference"
            if self.scale == "miniature":
                settings = ["--max-anchors", "50"]  # of an image: enough for its 2 to 4 objects
            opts = [*run.opts, "MODEL.WEIGHTS", str(run.folder / "model_final.pth")]
        else:
            return None
        parts = {column.part for column in self.table.columns}
        names = load_config(str(self.root / config), opts).DATASETS.TEST
        return [
            *(sys.executable, f"tools/{tool}.py", "--config-file", config, *settings),
            *("--datasets", *(name for name in names if name.split("_")[-1] in parts)),
            *("--output", str(file), *(["--opts", *opts] if opts else [])),
        ], file

    def missing_evaluations(self) -> list[list[str]]:
        """Commands of the evaluations that have not been made."""
        found = [self.evaluation(row, seed) for seed in self.seeds for row in self.rows]
        unique = {file: command for command, file in [each for each in found if each]}
        return [command for file, command in unique.items() if not file.is_file()]

    def figures(self, row: Row, seed: int) -> dict[str, float]:
        """The figures of a row that are there, by column."""
        evaluation, run = self.evaluation(row, seed), self.run_of(row, seed)
        metrics: Mapping[str, float] = {}
        if evaluation is not None:
            metrics = read_evaluation(evaluation[1])
        elif run is not None and (record := read_record(run)):
            metrics = record["metrics"]
        cells = {c.label: find_figure(metrics, c.part, c.metric) for c in self.table.columns}
        return {label: value for label, value in cells.items() if value is not None}

    def results(self) -> dict[str, dict[int, dict[str, float]]]:
        """Row label -> seed -> column -> figure, of what was run."""
        return {
            row.label: {seed: cells for seed in self.seeds if (cells := self.figures(row, seed))}
            for row in self.rows
        }


def read_evaluation(path: Path) -> dict[str, float]:
    """Figures of a tool's file as detectron2 would write them; {} if there is no file."""
    if not path.is_file():
        return {}
    return {
        f"{dataset}/bbox/{metric}": math.nan if value is None else value  # None: no such object
        for dataset, metrics in json.loads(path.read_text())["figures"].items()
        for metric, value in metrics.items()
    }


def _values(results: Results, row: Row, column: Column) -> list[float]:
    """The figures of a cell, one a seed, in the order of the seeds; NaN: over no object."""
    by_seed = results.get(row.label, {})
    return [
        by_seed[seed][column.label] for seed in sorted(by_seed) if column.label in by_seed[seed]
    ]


def _missing(row: Row) -> str:
    """What stands for a figure that is not there: rows of other methods are never run."""
    is_ours = row.coco or row.miniature or row.evaluation == "upper_bound"
    return NOT_RUN if is_ours else EMPTY


def _cell(row: Row, values: Sequence[float]) -> str:
    """Mean and range, such as ``65.4 (64.7-65.8)``; the value alone if there is one."""
    if not values:
        return _missing(row)
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
    headers = ["row", "seeds"]
    for column in table.columns:
        headers.append(f"{column.label}, {scale}")
        if column.label in table.printed:
            headers.append("paper, COCO")
    lines = []
    for row in table.rows:
        line = [row.label, str(len(results.get(row.label, {})))]
        for column in table.columns:
            line.append(_cell(row, _values(results, row, column)))
            if column.label in table.printed:
                line.append(str(row.paper.get(column.label, EMPTY)))
        lines.append(line)
    return str(tabulate(lines, headers, tablefmt="github", disable_numparse=True))


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
            values = _values(results, row, column)
            figures = [_missing(row)] * 3
            if any(map(math.isnan, values)):
                figures = [NO_OBJECTS] * 3
            elif values:
                summary = statistics.mean(values), min(values), max(values)
                figures = [f"{value:.2f}" for value in summary]
            paper = row.paper.get(column.label, EMPTY)
            writer.writerow([row.label, column.label, paper, scale, len(values), *figures])
    return text.getvalue()


def plot_table(table: Table, results: Results, scale: str, path: Path) -> None:
    """Bars of the first AP50 (of proposals: AR75) in the paper and of every one that was run.

    The paper's figures (COCO) have a panel of their own: unless they were measured on COCO, ours
    are of another world and only the order of the rows can be compared. Dots are seeds.

    Args:
        table: what the paper prints.
        results: what was run; at least one row.
        scale: as in :func:`format_markdown`.
        path: of the PNG.
    """
    columns = [c for c in table.columns if c.metric.endswith(("AP50", "AR75@100", "AR75@1000"))]
    with mpl.rc_context({"font.size": 8}):
        size = 4.3 + 1.9 * len(columns), 1.1 + 0.34 * len(table.rows)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(1, 1 + len(columns), sharey=True, squeeze=False)[0]
        paper = [row.paper.get(columns[0].label) for row in table.rows]
        _draw_bars(
            axes[0], [[] if v is None else [v] for v in paper], [EMPTY] * len(paper), "#9aa5b1"
        )
        axes[0].set_title(f"paper, COCO:\n{columns[0].label}")
        for axis, column in zip(axes[1:], columns, strict=True):
            cells = [_values(results, row, column) for row in table.rows]
            _draw_bars(axis, cells, [_missing(row) for row in table.rows], "#4c86c6")
            axis.set_title(f"{scale}:\n{column.label}")
        axes[0].set_yticks(range(len(table.rows)), [row.label for row in table.rows])
        axes[0].invert_yaxis()
        figure.suptitle(f"Table {table.number}: {table.title}")
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=150, format="png")


def _draw_bars(
    axis: mpl.axes.Axes, cells: Sequence[Sequence[float]], missing: Sequence[str], colour: str
) -> None:
    """A bar a row to the mean of its figures, with its value behind it and a dot a seed."""
    largest = max((value for values in cells for value in values), default=1.0)
    for place, values in enumerate(cells):
        mean = statistics.mean(values) if values else 0.0
        axis.barh(place, mean, color=colour)
        if len(values) > 1:
            axis.plot(values, [place] * len(values), "o", color="#1b3350", markersize=2.5)
        text = f"{mean:.1f}" if values else missing[place]
        end = max(values, default=0.0) + 0.03 * largest
        axis.text(end, place, text, va="center", fontsize=7)
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
            temporary.write_text(text, encoding="utf-8")
    if any(results.values()):
        plot_table(table, results, scale, stem.with_suffix(".png"))
    return markdown
