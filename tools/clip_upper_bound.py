#!/usr/bin/env python
"""The upper bound (Table 9): CLIP names the ground-truth boxes, scored as detections.

    python tools/clip_upper_bound.py --config-file configs/hierkd_R50.yaml \\
        --output output/table9/coco.json
    python tools/clip_upper_bound.py --config-file configs/miniature/hierkd.yaml \\
        --datasets miniature_ovd_test_novel miniature_ovd_test_all --crop-scales 1 1.25 1.5 2

No detector takes part: of the config only the teacher, its prompt and DATASETS.TEST count. Works on
any registered dataset, with its vocabulary. Prints a table. --output is JSON: "figures" has the
first crop scale, "rows" has all.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from hierkd.command import run_command

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ("AP50", "APs", "APm", "APl", "AR50")  # Table 9's


def get_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    # fmt: off
    add("--config-file", required=True, metavar="YAML")
    add("--datasets", nargs="+", metavar="NAME", help="default: DATASETS.TEST of the config")
    add("--crop-scales", nargs="+", type=float, metavar="FACTOR",
        help="sides of the crops over sides of the boxes; default: MODEL.IKD.CROP_SCALE")
    add("--images-per-batch", type=int, default=16, metavar="N", help="default: %(default)s")
    add("--output", type=Path, metavar="JSON", help="file for the figures")
    add("--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE",
        help="config overrides, last on the line, e.g. MODEL.TEACHER.WEIGHTS RN50")
    # fmt: on
    return parser


def run(args: argparse.Namespace, command: str) -> None:
    """Measure all datasets at all crop scales, write ``--output`` and print a table."""
    from hierkd.data.coco import check_datasets
    from hierkd.data.mapper import check_images
    from hierkd.evaluation.upper_bound import clip_upper_bound
    from hierkd.experiments.results import collect_record, figures_table, write_results
    from hierkd.experiments.runs import git_commit
    from hierkd.load_config import load_config
    from hierkd.teachers import clip as teachers

    cfg = load_config(args.config_file, args.opts)
    datasets = list(args.datasets or cfg.DATASETS.TEST)
    scales = list(dict.fromkeys(args.crop_scales or [cfg.MODEL.IKD.CROP_SCALE]))
    images = check_datasets(datasets)
    if cfg.DATALOADER.CHECK_IMAGES:
        check_images(images)
    teacher = teachers.build_teacher(cfg)
    commit = git_commit(ROOT)  # before: files may change during a long measurement
    rows = {
        name: {
            f"crop {scale:g}": clip_upper_bound(
                teacher,
                name,
                scale,
                image_format=cfg.INPUT.FORMAT,
                images_per_batch=args.images_per_batch,
                max_detections=cfg.TEST.DETECTIONS_PER_IMAGE,
            )
            for scale in scales
        }
        for name in datasets
    }
    record = collect_record(
        command=command,
        config=args.config_file,
        weights="",
        dataset=datasets,
        options={
            "crop_scales": scales,
            "teacher": cfg.MODEL.TEACHER.WEIGHTS,
            "template": cfg.MODEL.TEXT_CLASSIFIER.TEMPLATE,
            "opts": args.opts,
        },
        rows=rows,
        main_row=f"crop {scales[0]:g}",
        commit=commit,
    )
    if args.output is not None:
        write_results(args.output, record)
    print(figures_table(rows, COLUMNS))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; errors of the user's end it with a message and status 2."""
    parser = get_parser()
    args = parser.parse_args(argv)
    if min(args.images_per_batch, *(args.crop_scales or [1])) <= 0:
        parser.error("--crop-scales and --images-per-batch must be positive")
    from detectron2.utils.logger import setup_logger

    setup_logger(name="hierkd", abbrev_name="hierkd")
    command = shlex.join(
        ["python", "tools/clip_upper_bound.py", *(sys.argv[1:] if argv is None else argv)]
    )
    try:
        run(args, command)
    except (ValueError, FileNotFoundError, ConnectionError) as error:
        parser.exit(2, f"clip_upper_bound.py: error: {error}\n")


if __name__ == "__main__":
    run_command(main)
