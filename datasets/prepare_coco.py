#!/usr/bin/env python3
"""Make the annotation files of the open-vocabulary COCO splits; see README.md beside this file.

python datasets/prepare_coco.py                  # 48/17, the split of the paper's tables
python datasets/prepare_coco.py --split both
python datasets/prepare_coco.py --coco-year 2014 # 65/15 as its authors made it
python datasets/prepare_coco.py --dry-run        # what is missing, and where it comes from
"""

from __future__ import annotations

import argparse
import logging
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hierkd.command import one_line_errors, run_command

if TYPE_CHECKING:
    from hierkd.data.prepare import PartSummary
    from hierkd.data.splits import CocoVariant


def get_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--split",
        choices=["48_17", "65_15", "both"],
        help="default: 48_17; with --coco-year 2014 65_15",
    )
    parser.add_argument(
        "--coco-year",
        choices=["2017", "2014"],
        default="2017",
        help="2014: the 65/15 split of PL-ZSD and ZSI, without training images of novel objects",
    )
    parser.add_argument(
        "--root",
        type=Path,
        help="folder that holds coco/ (default: $DETECTRON2_DATASETS, else ./datasets)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="write ovd_<split>/ into this folder (default: <root>/coco/annotations)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="read and write nothing; say what is missing"
    )
    parser.add_argument(
        "--allow-missing-pictures",
        action="store_true",
        help="make the annotations although pictures that they list are not there",
    )
    return parser


def dry_run(root: Path, variant: CocoVariant, output: Path, names: Sequence[str]) -> None:
    """Say what is there, what is missing and how to get it, and what would be written."""
    from hierkd.data.prepare import archive_of, describe_inputs
    from hierkd.data.splits import SPLITS

    archives = {}
    for path, state, detail in describe_inputs(root, variant):
        print(f"{state:7}  {path} ({detail})")
        if state != "found":
            archives[archive_of(path)] = None
    if archives:
        folder = shlex.quote(str(root / "coco"))
        print(f"\nTo get what is missing:\n  mkdir -p {folder} && cd {folder}")
    for url, size in archives:
        name = url.rsplit("/", 1)[1]
        print(f"  curl -L -C - -O {url} && unzip -o {name}  # {size}")
    print()
    for name in names:
        for part in SPLITS[name].parts:
            path = output / f"ovd_{name}{variant.suffix}" / f"{part}.json"
            state = "is there, and would be compared:" if path.is_file() else "would be written:"
            print(f"{state} {path}")


def print_summaries(summaries: Sequence[PartSummary]) -> None:
    """Print a line per file with its counts, beside those that others state."""
    from hierkd.data.prepare import EXPECTED_BY

    for each in summaries:
        stated = ["", ""]
        counts = (each.num_images, each.num_boxes)
        if each.expected:
            stated = [
                f" (as in {source})" if count == figure else f" (NOT the {figure:,} of {source})"
                for count, figure, source in zip(
                    counts, each.expected, EXPECTED_BY[each.split], strict=True
                )
            ]
        captions = f", {each.num_captions:,} captions" if each.num_captions else ""
        print(
            f"{each.path}: {counts[0]:,} images{stated[0]}, {counts[1]:,} boxes{stated[1]}"
            f"{captions}{'' if each.changed else '; was there already'}"
        )


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    args = get_parser().parse_args(argv)
    from tqdm.contrib.logging import logging_redirect_tqdm

    from hierkd.data import prepare, splits
    from hierkd.data.coco import datasets_root

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    variant = splits.COCO_2017 if args.coco_year == "2017" else splits.COCO_2014
    split = args.split or ("48_17" if args.coco_year == "2017" else "65_15")
    names = list(splits.SPLITS) if split == "both" else [split]
    root = args.root or Path(datasets_root())
    output = args.output or root / "coco" / "annotations"
    if args.dry_run:
        dry_run(root, variant, output, names)
        return
    with logging_redirect_tqdm():
        summaries = prepare.prepare_coco(
            root,
            [splits.SPLITS[name] for name in names],
            output=output,
            variant=variant,
            check_pictures=not args.allow_missing_pictures,
        )
    print_summaries(summaries)


if __name__ == "__main__":
    run_command(main)
