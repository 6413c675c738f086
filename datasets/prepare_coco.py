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
import sys
from collections.abc import Iterable
from pathlib import Path

from tqdm.contrib.logging import logging_redirect_tqdm

from hierkd.data.coco import datasets_root
from hierkd.data.official_coco import Archive, describe_inputs
from hierkd.data.prepare import Figure, PartSummary, prepare_coco
from hierkd.data.splits import COCO_2014, COCO_2017, SPLITS, CocoVariant

VARIANTS = {"2017": COCO_2017, "2014": COCO_2014}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--split", choices=[*SPLITS, "both"], help="default: 48_17; with --coco-year 2014 65_15"
    )
    parser.add_argument(
        "--coco-year",
        choices=VARIANTS,
        default="2017",
        help="2014: the 65/15 split of PL-ZSD and ZSI, without training images of novel objects",
    )
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
    parser.add_argument(
        "--allow-missing-pictures",
        action="store_true",
        help="make the annotations although pictures that they list are not there",
    )
    return parser.parse_args(arguments)


def dry_run(root: Path, variant: CocoVariant, output: Path, names: list[str]) -> int:
    """Say what is there, what is missing, and what would be written; 1 if something is missing."""
    inputs = describe_inputs(root, variant)
    for each in inputs:
        print(f"{each.state:7}  {each.path} ({each.detail})")
    archives = [each.archive for each in inputs if each.state != "found"]
    if archives:
        print_downloads(root / "coco", archives)
    print()
    for name in names:
        for part in ("train_base", "val_base", "val_novel", "val_all"):
            path = output / f"ovd_{name}{variant.suffix}" / f"{part}.json"
            state = "is there, and would be compared:" if path.is_file() else "would be written:"
            print(f"{state} {path}")
    return 1 if archives else 0


def print_downloads(coco: Path, archives: Iterable[Archive]) -> None:
    """Print the commands that bring ``archives``, each one once, into the folder ``coco``."""
    folder = shlex.quote(str(coco))
    print(f"\nTo get what is missing:\n  mkdir -p {folder} && cd {folder}")
    for archive in dict.fromkeys(archives):
        name = archive.url.rsplit("/", 1)[1]
        print(f"  curl -L -C - -O {archive.url} && unzip -o {name}  # {archive.size}")


def compare(count: int, expected: Figure | None) -> str:
    """Return how ``count`` stands to the expected one, in brackets."""
    if expected is None:
        return ""
    if count == expected.value:
        return f" (as in {expected.source})"
    return f" (NOT the {expected.value:,} of {expected.source})"


def print_summaries(summaries: list[PartSummary]) -> None:
    """Print a line per file with its counts."""
    for each in summaries:
        images = compare(each.num_images, each.expected_images)
        boxes = compare(each.num_boxes, each.expected_boxes)
        captions = f", {each.num_captions:,} captions" if each.num_captions else ""
        print(
            f"{each.path}: {each.num_images:,} images{images}, {each.num_boxes:,} boxes{boxes}"
            f"{captions}{'' if each.changed else '; was there already'}"
        )


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    args = parse_arguments(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    variant = VARIANTS[args.coco_year]
    split = args.split or ("48_17" if variant is COCO_2017 else "65_15")
    names = list(SPLITS) if split == "both" else [split]
    if args.dry_run:
        output = args.output or args.root / "coco" / "annotations"
        return dry_run(args.root, variant, output, names)
    try:
        with logging_redirect_tqdm():
            summaries = prepare_coco(
                args.root,
                [SPLITS[name] for name in names],
                output=args.output,
                variant=variant,
                check_pictures=not args.allow_missing_pictures,
            )
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print_summaries(summaries)
    return 0


if __name__ == "__main__":
    sys.exit(main())
