#!/usr/bin/env python
"""Measure the speed and the memory of the parts, against what a user would compare them with.

    python tools/benchmark.py crops
    python tools/benchmark.py infer --device cuda --rounds 30

Random data and random weights, so that nothing has to be downloaded. The alternatives take turns in
one process; what is stated is the median of the ratios within a round. Each subcommand prints a
table and writes output/benchmark/<subcommand>.md and .json, with hardware and versions.
"""

from __future__ import annotations

import hierkd

# isort: split
import argparse
import importlib
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch

import hierkd.benchmarks
from hierkd.experiments.runs import git_commit

ROOT = Path(__file__).resolve().parent.parent


def subcommands() -> dict[str, ModuleType]:
    """The modules of ``hierkd.benchmarks`` that measure something, by name."""
    found = {
        info.name: importlib.import_module(f"hierkd.benchmarks.{info.name}")
        for info in pkgutil.iter_modules(hierkd.benchmarks.__path__)
    }
    return {name: module for name, module in found.items() if hasattr(module, "run")}


def get_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: the GPU if there is one (here: %(default)s)",
    )
    common.add_argument("--rounds", type=int, metavar="N", help="timed rounds; default: as fits")
    common.add_argument("--threads", type=int, metavar="N", help="threads of PyTorch on the CPU")
    common.add_argument(
        "--output", type=Path, default=ROOT / "output" / "benchmark", metavar="FOLDER"
    )
    parts = parser.add_subparsers(dest="subcommand", required=True, metavar="SUBCOMMAND")
    for name, module in subcommands().items():
        help_line = (module.__doc__ or "").split("\n")[0]
        part = parts.add_parser(
            name,
            parents=[common],
            help=help_line,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(part)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; wrong input ends with exit status 2 and a message."""
    parser = get_parser()
    args = parser.parse_args(argv)
    try:
        device = torch.device(args.device)
    except RuntimeError as error:
        parser.error(f"--device: {error}")
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: there is no CUDA device here")
    for option in ("rounds", "threads"):
        value = getattr(args, option)
        if value is not None and value < 1:
            parser.error(f"--{option} must be at least 1, got {value}")
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    try:
        report = subcommands()[args.subcommand].run(args, device)
    except (FileNotFoundError, ImportError, ValueError) as error:
        print(f"benchmark.py {args.subcommand}: error: {error}", file=sys.stderr)
        return 2
    report.settings["commit"] = git_commit(ROOT)
    print(report.markdown())
    markdown, data = report.write(args.output, args.subcommand)
    print(f"written to {markdown} and {data}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
