#!/usr/bin/env python3
"""Make the annotation files of the open-vocabulary COCO splits; see README.md beside this file.

python datasets/prepare_coco.py                  # 48/17, the split of the paper's tables
python datasets/prepare_coco.py --split both
python datasets/prepare_coco.py --dry-run        # what is missing, and where it comes from
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from hierkd.data.datasets import datasets_root
from hierkd.data.prepare import PartSummary, describe_inputs, prepare_coco
from hierkd.data.splits import SPLITS


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--split", choices=[*SPLITS, "both"], default="48_17")
    parser.add_argument(
        "--root",
        type=Path,
        default=Path(datasets_root()),
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
    return parser.parse_args(arguments)


def dry_run(root: Path, output: Path, names: list[str]) -> int:
    """Say what is there, what is missing, and what would be written; 1 if something is missing."""
    missing = 0
    for path, is_there, where_from in describe_inputs(root):
        print(f"{'found  ' if is_there else 'MISSING'}  {path}")
        if not is_there:
            missing += 1
            print(f"         {where_from}")
    for name in names:
        print(
            f"would write {output / f'ovd_{name}'}/{{train_base,val_base,val_novel,val_all}}.json"
        )
    return 1 if missing else 0


def print_summaries(summaries: list[PartSummary]) -> None:
    """Print a line per file with its counts."""
    for each in summaries:
        check = ""
        if each.expected_images is not None:
            check = "  as published" if each.is_as_expected else f"  NOT {each.expected_images:,}"
        captions = f", {each.num_captions:,} captions" if each.num_captions else ""
        print(f"{each.path}: {each.num_images:,} images{check}, {each.num_boxes:,} boxes{captions}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    args = parse_arguments(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    names = list(SPLITS) if args.split == "both" else [args.split]
    if args.dry_run:
        return dry_run(args.root, args.output or args.root / "coco" / "annotations", names)
    try:
        summaries = prepare_coco(args.root, [SPLITS[name] for name in names], output=args.output)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print_summaries(summaries)
    return 0


if __name__ == "__main__":
    sys.exit(main())
