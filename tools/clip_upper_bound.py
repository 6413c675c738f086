#!/usr/bin/env python
"""The upper bound (Table 9): CLIP names the ground-truth boxes, scored as detections.

    python tools/clip_upper_bound.py --config-file configs/hierkd_R50.yaml \\
        --output output/table9/coco.json
    python tools/clip_upper_bound.py --config-file configs/miniature/hierkd.yaml \\
        --datasets miniature_ovd_test_novel miniature_ovd_test_all --crop-scale 1.25

No detector takes part: of the config only the teacher, its prompt and DATASETS.TEST count. Works on
any registered dataset, with its vocabulary. Prints a table; --output is JSON.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from hierkd.command import one_line_errors, run_command

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
    add("--crop-scale", type=float, metavar="FACTOR",
        help="side of a crop over side of its box; default: MODEL.IKD.CROP_SCALE")
    add("--images-per-batch", type=int, default=16, metavar="N", help="default: %(default)s")
    add("--output", type=Path, metavar="JSON", help="file for the figures")
    add("--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE",
        help="config overrides, last on the line, e.g. MODEL.TEACHER.WEIGHTS RN50")
    # fmt: on
    return parser


def run(args: argparse.Namespace, command: str) -> None:
    """Measure all datasets, write ``--output`` and print a table."""
    from hierkd.data.coco import check_datasets
    from hierkd.data.mapper import check_images
    from hierkd.evaluation.upper_bound import clip_upper_bound
    from hierkd.experiments.results import figures_table, rounded_figures, write_results
    from hierkd.experiments.runs import git_commit
    from hierkd.load_config import load_config
    from hierkd.teachers import clip as teachers

    cfg = load_config(args.config_file, args.opts)
    datasets = list(args.datasets or cfg.DATASETS.TEST)
    images = check_datasets(datasets)
    if cfg.DATALOADER.CHECK_IMAGES:
        check_images(images)
    teacher = teachers.build_teacher(cfg)
    commit = git_commit(ROOT)  # before: files may change during a long measurement
    figures = {
        name: clip_upper_bound(
            teacher,
            name,
            args.crop_scale or cfg.MODEL.IKD.CROP_SCALE,
            image_format=cfg.INPUT.FORMAT,
            images_per_batch=args.images_per_batch,
            max_detections=cfg.TEST.DETECTIONS_PER_IMAGE,
        )
        for name in datasets
    }
    record = {
        "command": command,
        "config": args.config_file,
        "teacher": cfg.MODEL.TEACHER.WEIGHTS,
        "commit": commit,
        "figures": rounded_figures(figures),
    }
    if args.output is not None:
        write_results(args.output, record)
    print(figures_table(figures, COLUMNS))


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = get_parser()
    args = parser.parse_args(argv)
    if min(args.images_per_batch, 1 if args.crop_scale is None else args.crop_scale) <= 0:
        parser.error("--crop-scale and --images-per-batch must be positive")
    from detectron2.utils.logger import setup_logger

    setup_logger(name="hierkd", abbrev_name="hierkd")
    command = shlex.join(
        ["python", "tools/clip_upper_bound.py", *(sys.argv[1:] if argv is None else argv)]
    )
    run(args, command)


if __name__ == "__main__":
    run_command(main)
