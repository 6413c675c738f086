#!/usr/bin/env python
"""Run or collect the rows of one of the paper's tables; print them beside the paper's figures.

    python tools/reproduce.py --table 4 --scale coco --num-gpus 4 --dry-run
    python tools/reproduce.py --table 4 --scale coco --num-gpus 4 --rows "GKD" "IKD + GKD"
    python tools/reproduce.py --table 3 --seeds 0 1
    python tools/reproduce.py --table 4 --collect
    python tools/reproduce.py --table 4 --output output/half --opts SOLVER.AMP.ENABLED True

The default scale is the embedded miniature, made by ``python tools/prepare_miniature.py``, on a
CPU; ``--scale coco`` needs COCO (datasets/README.md) and GPUs. Every row is a config; rows that are
the same training are trained once, also across tables. A run that is complete is not run again, one
that was interrupted goes on, and ``--collect`` starts nothing. Writes ``table<N>.md``, ``.csv`` and
``.png`` to ``<output>/<scale>``; a row that was not run says "not run". What --opts
changes in every run is said above the table.
"""

from __future__ import annotations

import hierkd  # noqa: F401  (first: it quiets two deprecation warnings inside libraries)

# isort: split
import argparse
import json
import math
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hierkd.experiments.reproduce import write_table
from hierkd.experiments.runs import Run, execute, find_figure, read_record
from hierkd.experiments.tables import TABLES, Row, Table
from hierkd.load_config import load_config

ROOT = Path(__file__).resolve().parent.parent
# GPUs that the configs' batches and learning rates are for. [paper §4.2]
PAPER_GPUS = 4


def get_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", type=int, required=True, choices=sorted(TABLES))
    parser.add_argument("--scale", choices=("coco", "miniature"), default="miniature")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: the table's")
    parser.add_argument("--rows", nargs="+", metavar="LABEL", help="default: all of the table")
    parser.add_argument("--output", type=Path, default=Path("output/reproduce"))
    parser.add_argument("--collect", action="store_true", help="start nothing, only print")
    parser.add_argument("--dry-run", action="store_true", help="print the commands that would run")
    parser.add_argument(
        "--num-gpus",
        type=int,
        default=0,
        help=f"with other than {PAPER_GPUS}, batch, learning rate and iterations follow the linear "
        "rule; 0 = one process as the config says",
    )
    parser.add_argument("--jobs", type=int, help="runs at a time; default: 1 on COCO, 2 else")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads per run")
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE ... of every run"
    )
    return parser


def choose_rows(table: Table, labels: Sequence[str] | None) -> list[Row]:
    """The rows of these labels, all without.

    Raises:
        ValueError: for an unknown label; names the table's.
    """
    known = {row.label: row for row in table.rows}
    unknown = [label for label in labels or [] if label not in known]
    if unknown:
        raise ValueError(f"--rows {unknown}: table {table.number} has {list(known)}")
    return [known[label] for label in labels] if labels else list(table.rows)


class Reproduction:
    """The runs of some rows of a table, and the evaluations that follow them.

    Args:
        table: of the paper.
        rows: of it.
        seeds: of each row.
        folder: of this scale's runs.
        scale: "coco" or "miniature".
        num_gpus: of each run.
        opts: KEY VALUE ... on top of each row's own.
    """

    def __init__(
        self,
        table: Table,
        rows: Sequence[Row],
        seeds: Sequence[int],
        folder: Path,
        scale: str,
        num_gpus: int,
        opts: Sequence[str] = (),
    ) -> None:
        self.table = table
        self.rows = rows
        self.seeds = seeds
        self.folder = folder
        self.scale = scale
        self.num_gpus = num_gpus
        self.opts = tuple(opts)
        if scale == "coco" and num_gpus not in (0, PAPER_GPUS):
            self.opts += ("SOLVER.REFERENCE_WORLD_SIZE", str(PAPER_GPUS))

    def run_of(self, row: Row, seed: int) -> Run | None:
        """The training of a row; None if the row has none at this scale."""
        training = row.coco if self.scale == "coco" else row.miniature
        if training is None:
            return None
        return Run(
            name=training.name,
            config=training.config,
            opts=(*training.opts, *self.opts),
            seed=seed,
            folder=self.folder / training.name / f"seed{seed}",
            num_gpus=self.num_gpus,
        )

    def runs(self) -> list[Run]:
        """Every training once, seed by seed."""
        found = [self.run_of(row, seed) for seed in self.seeds for row in self.rows]
        return list({run.folder: run for run in found if run is not None}.values())

    def evaluation(self, row: Row, seed: int) -> tuple[list[str], Path] | None:
        """The command that turns a row's checkpoint into figures, and where it writes them.

        None if the training's own evaluation holds the figures.
        """
        if self.table.evaluation == "upper_bound":
            config = f"configs/{'hierkd_R50' if self.scale == 'coco' else 'miniature/hierkd'}.yaml"
            file = self.folder / "upper_bound.json"
            datasets = self.datasets(config, self.opts)
            command = [
                "tools/clip_upper_bound.py",
                "--config-file",
                config,
                "--datasets",
                *datasets,
            ]
            opts = ["--opts", *self.opts] if self.opts else []
            return [sys.executable, *command, "--output", str(file), *opts], file
        run = self.run_of(row, seed)
        if self.table.evaluation != "direct_inference" or run is None:
            return None
        file = run.folder / "direct_inference.json"
        command = ["tools/clip_direct_inference.py", "--config-file", run.config]
        datasets = self.datasets(run.config, run.opts)
        weights = ("MODEL.WEIGHTS", str(run.folder / "model_final.pth"))
        settings = ["--crop-scale", "1.5"]  # as CLIP sees regions in §3.2, whatever the row's IKD
        if self.scale == "miniature":
            settings += ["--max-anchors", "50"]  # of an image: enough for its 2 to 4 objects
        return [
            *(sys.executable, *command, *settings, "--datasets", *datasets, "--output", str(file)),
            *("--opts", *run.opts, *weights),
        ], file

    def datasets(self, config: str, opts: Sequence[str]) -> list[str]:
        """The test datasets of a config that the table has a column of."""
        parts = {column.part for column in self.table.columns}
        names = load_config(str(ROOT / config), opts).DATASETS.TEST
        return [name for name in names if name.split("_")[-1] in parts]

    def missing_evaluations(self) -> list[list[str]]:
        """Commands of the evaluations that have not been made."""
        found = [self.evaluation(row, seed) for seed in self.seeds for row in self.rows]
        unique = {file: command for command, file in [each for each in found if each]}
        return [command for file, command in unique.items() if not file.is_file()]

    def figures(self, row: Row, seed: int) -> dict[str, float]:
        """The figures of a row that are there, by column."""
        evaluation, run = self.evaluation(row, seed), self.run_of(row, seed)
        metrics: dict[str, float] = {}
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
    content: dict[str, Any] = json.loads(path.read_text())
    return {
        f"{dataset}/bbox/{metric}": math.nan if value is None else value  # None: no such object
        for dataset, metrics in content["figures"].items()
        for metric, value in metrics.items()
    }


def reproduce(args: argparse.Namespace) -> None:
    """Run what is missing, print and write the table."""
    table = TABLES[args.table]
    rows = choose_rows(table, args.rows)
    seeds = args.seeds or (table.seeds if args.scale == "miniature" else (0,))
    if table.evaluation == "upper_bound":
        seeds = seeds[:1]  # nothing is random
    folder = (args.output / args.scale).resolve()
    work = Reproduction(table, rows, seeds, folder, args.scale, args.num_gpus, args.opts)
    runs = work.runs()
    for run in runs:
        load_config(str(ROOT / run.config), run.opts)  # a mistake shows before anything starts
    if args.dry_run:
        commands = [run.command() for run in runs if read_record(run) is None]
        print("\n".join(shlex.join(c) for c in [*commands, *work.missing_evaluations()]))
        return
    if not args.collect:
        jobs = args.jobs or (1 if args.scale == "coco" else 2)
        execute(runs, ROOT, jobs=jobs, threads=args.threads)
        for command in work.missing_evaluations():
            subprocess.run(command, cwd=ROOT, check=True)
    title = f"Table {table.number}: {table.title} ({args.scale}, seeds {list(seeds)})"
    if work.opts:
        title += f", every run with {shlex.join(work.opts)}"
    print(write_table(table, work.results(), args.scale, folder, title))
    print(f"written to {folder}/table{table.number}.md, .csv and .png")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; what went wrong ends it with a message and status 2."""
    parser = get_parser()
    args = parser.parse_args(argv)
    try:
        reproduce(args)
    except (ValueError, FileNotFoundError, RuntimeError, subprocess.CalledProcessError) as error:
        parser.exit(2, f"reproduce.py: error: {error}\n")


if __name__ == "__main__":
    main()
