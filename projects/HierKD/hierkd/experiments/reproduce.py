"""A table of the paper made again: its runs, its evaluations, and its figures beside the paper's.

A cell without a run says "not run", one that the paper leaves empty "-", and a figure over no
object at all (NaN) "no objects". A scale is ``"coco"`` or ``"miniature"``: what the figures are
measured on.
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

__all__ = ["Reproduction", "Results", "format_csv", "format_markdown", "plot_table"]
__all__ += ["read_evaluation", "write_table"]

Results = Mapping[str, Mapping[int, Mapping[str, float]]]
"""Row label -> seed -> column label -> percent; what was not run is not in it."""

NOT_RUN = "not run"
NO_OBJECTS = "no objects"
EMPTY = "-"


@dataclass(frozen=True)
class Reproduction:
    """The runs of some rows of a table, and the evaluations that follow them."""

    table: Table
    rows: Sequence[Row]
    seeds: Sequence[int]  # of each row
    root: Path  # of the project; commands run there
    folder: Path  # of this scale's runs
    scale: str
    num_gpus: int = 0  # of each run
    opts: tuple[str, ...] = ()  # KEY VALUE ... on top of each row's own

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
        unique = {file: command for command, file in filter(None, found)}
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
    by_seed = sorted(results.get(row.label, {}).items())
    return [cells[column.label] for _, cells in by_seed if column.label in cells]


def _summary(row: Row, values: Sequence[float], digits: int = 1) -> list[str]:
    """Mean, minimum and maximum, or what stands for them; rows of other methods are never run."""
    if not values:
        is_ours = row.coco or row.miniature or row.evaluation == "upper_bound"
        return [NOT_RUN if is_ours else EMPTY] * 3
    if any(map(math.isnan, values)):
        return [NO_OBJECTS] * 3
    return [f"{v:.{digits}f}" for v in (statistics.mean(values), min(values), max(values))]


def format_markdown(table: Table, results: Results, scale: str) -> str:
    """A line a row: mean (range) over the seeds, such as ``65.4 (64.7-65.8)``, and the paper's."""
    headers = ["row", "seeds"]
    for column in table.columns:
        headers.append(f"{column.label}, {scale}")
        if column.label in table.printed:
            headers.append("paper, COCO")
    lines = []
    for row in table.rows:
        line = [row.label, str(len(results.get(row.label, {})))]
        for column in table.columns:
            values = _values(results, row, column)
            mean, low, high = _summary(row, values)
            has_range = len(values) > 1 and mean != NO_OBJECTS
            line.append(f"{mean} ({low}-{high})" if has_range else mean)
            if column.label in table.printed:
                line.append(str(row.paper.get(column.label, EMPTY)))
        lines.append(line)
    return str(tabulate(lines, headers, tablefmt="github", disable_numparse=True))


def format_csv(table: Table, results: Results, scale: str) -> str:
    """A line a cell: row, column, paper, scale, number of seeds, mean, minimum, maximum."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["row", "column", "paper_coco", "scale", "seeds", "mean", "min", "max"])
    for row in table.rows:
        for column in table.columns:
            values = _values(results, row, column)
            paper = row.paper.get(column.label, EMPTY)
            figures = _summary(row, values, digits=2)
            writer.writerow([row.label, column.label, paper, scale, len(values), *figures])
    return text.getvalue()


def plot_table(table: Table, results: Results, scale: str, path: Path) -> None:
    """Bars of the first AP50 (of proposals: AR75) in the paper and of every one that was run.

    The paper's figures (COCO) have a panel of their own: unless they were measured on COCO, ours
    are of another world and only the order of the rows can be compared. Dots are seeds.
    """
    columns = [c for c in table.columns if c.metric.endswith(("AP50", "AR75@100", "AR75@1000"))]
    first = columns[0].label
    paper = [[row.paper[first]] if first in row.paper else [] for row in table.rows]
    panels = [(f"paper, COCO:\n{first}", paper, "#9aa5b1")]
    for column in columns:
        cells = [_values(results, row, column) for row in table.rows]
        panels.append((f"{scale}:\n{column.label}", cells, "#4c86c6"))
    with mpl.rc_context({"font.size": 8}):
        size = 4.3 + 1.9 * len(columns), 1.1 + 0.34 * len(table.rows)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(1, len(panels), sharey=True)
        for axis, (title, cells, colour) in zip(axes, panels, strict=True):
            largest = max((value for values in cells for value in values), default=1.0)
            for place, (row, values) in enumerate(zip(table.rows, cells, strict=True)):
                axis.barh(place, statistics.mean(values) if values else 0.0, color=colour)
                if len(values) > 1:
                    axis.plot(values, [place] * len(values), "o", color="#1b3350", markersize=2.5)
                text = EMPTY if cells is paper and not values else _summary(row, values)[0]
                end = max(values, default=0.0) + 0.03 * largest
                axis.text(end, place, text, va="center", fontsize=7)
            axis.set_xlim(0, 1.3 * largest)
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_title(title)
        axes[0].set_yticks(range(len(table.rows)), [row.label for row in table.rows])
        axes[0].invert_yaxis()
        figure.suptitle(f"Table {table.number}: {table.title}")
        with replacing(path) as temporary:
            figure.savefig(temporary, dpi=150, format="png")


def write_table(table: Table, results: Results, scale: str, folder: Path, title: str) -> str:
    """Write ``table<N>.md``, ``.csv`` and, if anything was run, ``.png``; returns the Markdown.

    ``title`` is one line, above the table.
    """
    markdown = f"{title}\n\n{format_markdown(table, results, scale)}"
    stem = folder / f"table{table.number}"
    for suffix, text in ((".md", markdown + "\n"), (".csv", format_csv(table, results, scale))):
        with replacing(stem.with_suffix(suffix)) as temporary:
            temporary.write_text(text, encoding="utf-8")
    if any(results.values()):
        plot_table(table, results, scale, stem.with_suffix(".png"))
    return markdown
