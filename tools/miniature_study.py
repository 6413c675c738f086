#!/usr/bin/env python
"""Train configs of the miniature over several seeds and report mean and spread.

    python tools/miniature_study.py --configs atss hierkd --seeds 0 1 2
    python tools/miniature_study.py --configs hierkd --seeds 0 1 --split val \\
        --output output/study/gkd_0.3 --opts MODEL.GKD.LOSS_WEIGHT 0.3

For settings that are no row of the paper; ``tools/reproduce.py`` runs those. Tune on ``--split
val``; report on ``--split test``, which nothing else looks at. Every run is a ``train_net.py`` of
its own, of one thread, with ``--jobs`` at a time; a run that is complete is not run again, one that
was interrupted goes on. The seeds are the detector's: world, teacher and warm start are shared.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hierkd.command import run_command

if TYPE_CHECKING:
    from hierkd.experiments.runs import Run

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = {
    "ZSD novel AP50": ("novel", "novel/AP50"),
    "AR50": ("novel", "novel/AR50"),
    "AP": ("novel", "novel/AP"),
    "AP75": ("novel", "novel/AP75"),
    "base AP50": ("base", "base/AP50"),
    "base AP": ("base", "base/AP"),
    "base AP75": ("base", "base/AP75"),
    "GZSD novel AP50": ("all", "novel/AP50"),
    "GZSD base AP50": ("all", "base/AP50"),
    "GZSD all AP50": ("all", "all/AP50"),
}


def build_run(config: str, seed: int, output: Path, split: str, opts: Sequence[str]) -> Run:
    """The run of one config with one seed, evaluated on one split."""
    from hierkd.experiments.runs import Run

    names = tuple(f"miniature_ovd_{split}_{part}" for part in ("novel", "base", "all"))
    return Run(
        name=config,
        config=f"configs/miniature/{config}.yaml",
        opts=("DATASETS.TEST", str(names), *opts),
        seed=seed,
        folder=output / f"{config}_seed{seed}",
    )


def format_table(runs: Sequence[Run]) -> str:
    """Markdown of mean and range over the seeds that are complete."""
    from hierkd.experiments.runs import find_figure, read_record

    rows = [
        "| config | seeds | " + " | ".join(COLUMNS) + " |",
        "|---|---|" + "---|" * len(COLUMNS),
    ]
    for config in dict.fromkeys(run.name for run in runs):
        records = [record for run in runs if run.name == config and (record := read_record(run))]
        cells = []
        for part, metric in COLUMNS.values():
            figures = [find_figure(record["metrics"], part, metric) for record in records]
            values = [value for value in figures if value is not None]
            cells.append(
                f"{statistics.mean(values):.1f} ({min(values):.1f}-{max(values):.1f})"
                if values
                else "not run"
            )
        rows.append(f"| {config} | {len(records)} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--configs", nargs="+", default=["atss", "hierkd"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument("--output", type=Path, default=Path("output/miniature_study"))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads per run")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE ...")
    args = parser.parse_args()

    from hierkd.experiments.runs import execute

    output = args.output.resolve()
    runs = [
        build_run(config, seed, output, args.split, args.opts)
        for seed in args.seeds
        for config in args.configs
    ]
    execute(runs, ROOT, jobs=args.jobs, threads=args.threads)
    text = format_table(runs)
    (output / "table.md").write_text(text + "\n")
    print(f"Miniature, {args.split} split, opts {args.opts}\n{text}")


if __name__ == "__main__":
    run_command(main)
