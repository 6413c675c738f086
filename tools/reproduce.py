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
that was interrupted goes on, and ``--collect`` starts nothing. Writes ``table<N>.md`` to
``<output>/<scale>``; a row that was not run says "not run", and what the paper does not print is
"-". What --opts changes in every run is said above the table.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from hierkd.command import run_command
from hierkd.experiments.tables import TABLES, Row, Table

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


def reproduce(args: argparse.Namespace) -> None:
    """Run what is missing, print and write the table."""
    table = TABLES[args.table]
    rows = choose_rows(table, args.rows)

    from hierkd.experiments.reproduce import Reproduction, write_table
    from hierkd.experiments.runs import execute, read_record
    from hierkd.load_config import load_config

    seeds = args.seeds or (table.seeds if args.scale == "miniature" else (0,))
    folder = (args.output / args.scale).resolve()
    opts = list(args.opts)
    if args.scale == "coco" and args.num_gpus not in (0, PAPER_GPUS):
        opts += ["SOLVER.REFERENCE_WORLD_SIZE", str(PAPER_GPUS)]
    work = Reproduction(table, rows, seeds, ROOT, folder, args.scale, args.num_gpus, tuple(opts))
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
    if opts:
        title += f", every run with {shlex.join(opts)}"
    print(write_table(table, work.results(), args.scale, folder, title))
    print(f"written to {folder}/table{table.number}.md")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; what went wrong ends it with a message and status 2."""
    parser = get_parser()
    args = parser.parse_args(argv)
    try:
        reproduce(args)
    except (ValueError, FileNotFoundError, RuntimeError, subprocess.CalledProcessError) as error:
        parser.exit(2, f"reproduce.py: error: {error}\n")


if __name__ == "__main__":
    run_command(main)
