"""A table of the paper made again: its runs, its evaluations, and its figures beside the paper's.

A cell without a run says "not run", one that the paper leaves empty "-", and a figure over no
object at all (NaN) "no objects". A scale is ``"coco"`` or ``"miniature"``: what the figures are
measured on.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tabulate import tabulate  # type: ignore[import-untyped]

from hierkd.experiments.runs import Run, find_figure, read_record
from hierkd.experiments.tables import Column, Row, Table
from hierkd.files import replacing
from hierkd.load_config import load_config

__all__ = ["Reproduction", "Results", "format_markdown", "read_evaluation", "write_table"]

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
            boxes, opts = "gt", list(self.opts)
        elif row.evaluation == "direct_inference" and run is not None:
            config, file = run.config, run.folder / "direct_inference.json"
            boxes = "predicted"
            if self.scale == "miniature":
                settings = ["--max-anchors", "50"]  # of an image: enough for its 2 to 4 objects
            opts = [*run.opts, "MODEL.WEIGHTS", str(run.folder / "model_final.pth")]
        else:
            return None
        parts = {column.part for column in self.table.columns}
        names = load_config(str(self.root / config), opts).DATASETS.TEST
        return [
            *(sys.executable, "tools/clip_on_boxes.py", boxes, "--config-file", config, *settings),
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


def _summary(row: Row, values: Sequence[float]) -> list[str]:
    """Mean, minimum and maximum, or what stands for them; rows of other methods are never run."""
    if not values:
        is_ours = row.coco or row.miniature or row.evaluation == "upper_bound"
        return [NOT_RUN if is_ours else EMPTY] * 3
    if any(map(math.isnan, values)):
        return [NO_OBJECTS] * 3
    return [f"{v:.1f}" for v in (statistics.mean(values), min(values), max(values))]


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


def write_table(table: Table, results: Results, scale: str, folder: Path, title: str) -> str:
    """Write ``table<N>.md``; returns the Markdown.

    ``title`` is one line, above the table.
    """
    markdown = f"{title}\n\n{format_markdown(table, results, scale)}"
    with replacing(folder / f"table{table.number}.md") as temporary:
        temporary.write_text(markdown + "\n", encoding="utf-8")
    return markdown
