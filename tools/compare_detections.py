#!/usr/bin/env python
"""Detections of several checkpoints side by side, with the ground truth (Figure 5).

    python tools/compare_detections.py --dataset coco_ovd_48_17_val_all --novel 6 \\
        --run IKD=configs/COCO-48-17/ikd_R50_1x.yaml:output/COCO-48-17/ikd_R50_1x/model_final.pth \\
        --run GKD=configs/COCO-48-17/gkd_R50_1x.yaml:output/COCO-48-17/gkd_R50_1x/model_final.pth \\
        --run HierKD=configs/hierkd_R50.yaml:output/hierkd_R50/model_final.pth

Pictures are chosen by id (--image-ids), at random (--random N --seed S), or so that they show the
novel classes in turn (--novel N), never by what is detected. Blue is right, orange wrong, by AP50's
rule. Writes one PNG or JPG, by the suffix of --output.
"""

from __future__ import annotations

import argparse
import logging
import random
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from hierkd.command import run_command

logger = logging.getLogger("hierkd.compare_detections")

SUFFIXES = (".png", ".jpg", ".jpeg")


def get_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run",
        action="append",
        required=True,
        dest="runs",
        metavar="NAME=CONFIG:WEIGHTS",
        help="a detector: title of its column, config and checkpoint; once for each",
    )
    parser.add_argument("--dataset", required=True, metavar="NAME", help="registered dataset")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--image-ids", nargs="+", metavar="ID")
    which.add_argument("--random", type=int, metavar="N", help="N pictures at random, see --seed")
    which.add_argument(
        "--novel", type=int, metavar="N", help="N pictures that show the novel classes in turn"
    )
    parser.add_argument("--seed", type=int, default=0, help="of --random; default: %(default)s")
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="SCORE",
        help="draw the detections with at least this score, 0 to 1; default: of each picture as "
        "many as it has objects, the best",
    )
    parser.add_argument(
        "--judge",
        choices=("all", "novel"),
        default="all",
        help="classes whose detections are right or wrong; the others are grey; default: all",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("output/figure5.png"), help="default: %(default)s"
    )
    parser.add_argument(
        "--panel-px", type=int, default=480, metavar="N", help="longer side of a panel; %(default)s"
    )
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="KEY VALUE",
        help="config overrides of all runs, last on the line",
    )
    return parser


def parse_runs(texts: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Read the detectors to compare: name to config and checkpoint.

    Raises:
        ValueError: One is not NAME=CONFIG:WEIGHTS, or two have one name.
        FileNotFoundError: A config or a checkpoint does not exist.
    """
    runs: dict[str, tuple[str, str]] = {}
    for text in texts:
        name, _, rest = text.partition("=")
        config_file, _, weights = rest.partition(":")
        if not (name.strip() and config_file and weights):
            raise ValueError(f"--run: expected NAME=CONFIG:WEIGHTS, got {text!r}")
        for path in (config_file, weights):
            if "://" not in path and not Path(path).is_file():
                raise FileNotFoundError(f"--run {name}: no file {path!r}")
        if name.strip() in runs:
            raise ValueError(f"--run: several are called {name.strip()!r}")
        runs[name.strip()] = (config_file, weights)
    return runs


def choose_records(
    records: Sequence[dict[str, Any]],
    args: argparse.Namespace,
    vocabulary: Sequence[str],
    novel: Collection[str],
) -> list[dict[str, Any]]:
    """Choose the pictures to show, without looking at any detection.

    Raises:
        ValueError: There is no such picture, or the dataset has no novel classes.
    """
    from hierkd.reports.gallery import choose_in_turn

    if args.image_ids is not None:
        by_id = {str(record["image_id"]): record for record in records}
        if unknown := [each for each in args.image_ids if each not in by_id]:
            raise ValueError(f"--image-ids: {args.dataset} has no images {unknown}")
        return [by_id[each] for each in dict.fromkeys(args.image_ids)]
    if args.novel is None:
        return random.Random(args.seed).sample(list(records), min(args.random, len(records)))
    if not novel:
        raise ValueError(f"--novel: the vocabulary of {args.dataset} has no novel classes")
    return choose_in_turn(records, vocabulary, [n for n in vocabulary if n in novel], args.novel)


def describe(record: dict[str, Any], vocabulary: Sequence[str], novel: Collection[str]) -> str:
    """The line above a picture: its file and what is in it."""
    counts = Counter(
        vocabulary[a["category_id"]] for a in record["annotations"] if not a.get("iscrowd", 0)
    )

    def listed(wanted: bool) -> str:
        names = {name: n for name, n in counts.items() if (name in novel) == wanted}
        return ", ".join(f"{n} {name}" if n > 1 else name for name, n in names.items())

    parts = {"novel: ": listed(True), "base: " if novel else "": listed(False)}
    objects = "; ".join(kind + names for kind, names in parts.items() if names) or "no objects"
    return f"{Path(record['file_name']).name} (id {record['image_id']}) · {objects}"


def compare(args: argparse.Namespace) -> Path:
    """Run all detectors and write the sheet.

    Returns:
        The file written.

    Raises:
        FileNotFoundError: A config, a checkpoint or the dataset is missing.
        ValueError: A wrong option, or a picture that cannot be decoded.
    """
    from detectron2.data import DatasetCatalog, MetadataCatalog

    from hierkd.data.coco import check_datasets
    from hierkd.inference.predictor import OpenVocabularyPredictor
    from hierkd.load_config import load_config
    from hierkd.reports.charts import draw_comparison
    from hierkd.reports.drawing import save_picture
    from hierkd.reports.gallery import build_samples, keep_best

    runs = parse_runs(args.runs)
    check_datasets([args.dataset])
    metadata = MetadataCatalog.get(args.dataset)
    vocabulary = list(metadata.thing_classes)
    novel = set(metadata.get("novel_classes", ())) & set(vocabulary)
    judged = vocabulary if args.judge == "all" else novel
    records = choose_records(DatasetCatalog.get(args.dataset), args, vocabulary, novel)
    columns = {}
    for name, (config_file, weights) in runs.items():
        overrides = [*args.opts, "MODEL.WEIGHTS", weights]
        predictor = OpenVocabularyPredictor(load_config(config_file, overrides))
        predictor.set_vocabulary(vocabulary)
        found = build_samples(records, lambda _, image, p=predictor: p(image), vocabulary, judged)
        columns[name] = keep_best(found, args.threshold)
    captions = [describe(record, vocabulary, novel) for record in records]
    save_picture(args.output, draw_comparison(columns, captions, panel_px=args.panel_px))
    logger.info("wrote %s: %d pictures, %s", args.output, len(records), ", ".join(columns))
    return Path(args.output)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; errors of the user's end it with a message and status 2."""
    parser = get_parser()
    args = parser.parse_args(argv)
    if args.output.suffix.lower() not in SUFFIXES:
        parser.error(f"--output: expected one of {SUFFIXES}, got {str(args.output)!r}")
    if args.threshold is not None and not 0 <= args.threshold <= 1:
        parser.error(f"--threshold must be 0 to 1, got {args.threshold}")
    if args.panel_px < 64:
        parser.error(f"--panel-px must be at least 64, got {args.panel_px}")
    for count in (args.random, args.novel):
        if count is not None and count < 1:
            parser.error(f"--random and --novel must be at least 1, got {count}")
    from detectron2.utils.logger import setup_logger

    setup_logger(name="hierkd", abbrev_name="hierkd")
    try:
        compare(args)
    except (ValueError, FileNotFoundError, ConnectionError) as error:
        parser.exit(2, f"compare_detections.py: error: {error}\n")


if __name__ == "__main__":
    run_command(main)
