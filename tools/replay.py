#!/usr/bin/env python
"""Do a training step again whose loss or gradient was not finite.

    python tools/replay.py output/hierkd_R50/non_finite/iteration_0001234.pth
    python tools/replay.py output/hierkd_R50/non_finite/iteration_0001234.pth MODEL.DEVICE cpu

Reads the dump that ``train_net.py`` left (without executing anything in it), runs the same batch
through the same weights with the same random numbers, and prints the losses of the batch and of
each image by itself. Trailing KEY VALUE pairs override the run's config. Exit status 0: the step is
not finite here either; 1: here it is; 2: wrong input.
"""

from __future__ import annotations

import hierkd  # noqa: F401  (first: it quiets two deprecation warnings inside libraries)

# isort: split
import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from hierkd.training.replay import read_dump, replay


def get_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dump", type=Path, metavar="DUMP")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run; see the top of the file for the exit status."""
    args = get_parser().parse_args(argv)
    try:
        dump = read_dump(args.dump)
        found = replay(dump, args.opts)
    except (FileNotFoundError, ValueError) as error:
        print(f"replay.py: error: {error}", file=sys.stderr)
        return 2
    recorded = dump["non_finite"]
    rows = [["in training", *map(_figure, recorded["losses"].values())]]
    rows.append(["here", *map(_figure, found.losses.values())])
    for image, losses in zip(recorded["images"], found.losses_of_images, strict=True):
        rows.append([image, *map(_figure, losses.values())])
    print(f"iteration {dump['iteration'] + 1}")
    print(tabulate(rows, headers=["", *recorded["losses"]], tablefmt="simple"))
    bad = [name for name, value in found.losses.items() if not math.isfinite(value)]
    print(f"losses that are not finite here: {', '.join(bad) or 'none'}")
    print(f"gradients that are not finite here: {', '.join(found.gradients) or 'none'}")
    return 1 if found.is_finite else 0


def _figure(value: float) -> str:
    return f"{value:.6g}"


if __name__ == "__main__":
    sys.exit(main())
