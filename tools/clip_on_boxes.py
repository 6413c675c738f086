#!/usr/bin/env python
"""CLIP names boxes, scored as detections: a detector's (Table 6) or the ground truth's (Table 9).

    python tools/clip_on_boxes.py predicted --config-file configs/hierkd_R50.yaml \\
        --output output/table6/hierkd.json --opts MODEL.WEIGHTS model.pth
    python tools/clip_on_boxes.py gt --config-file configs/miniature/hierkd.yaml \\
        --datasets miniature_ovd_test_novel miniature_ovd_test_all --crop-scale 1.25

"predicted" is CLIP direct inference (Algorithm 1), by default as the paper prints it: crops of the
boxes themselves, CLIP's probability as the score. CLIP looks at every anchor that inference keeps,
up to 1000 a level: on a CPU, limit them with --max-anchors 100 (per image, the best ones).

"gt" is the upper bound. No detector takes part: of the config only the teacher, its prompt, the
crops and DATASETS.TEST count.

Both work on any registered dataset, with its vocabulary. Prints a table; --output is JSON.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hierkd.command import one_line_errors, run_command

ROOT = Path(__file__).resolve().parent.parent
# What Table 6 and Table 9 show.
COLUMNS = {
    "predicted": ("AP50", "AR50", "AP", "APs", "APm", "APl"),
    "gt": ("AP50", "APs", "APm", "APl", "AR50"),
}


def get_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    # fmt: off
    add("boxes", choices=COLUMNS, help="whose boxes: a detector's, or the ground truth's")
    add("--config-file", required=True, metavar="YAML")
    add("--datasets", nargs="+", metavar="NAME", help="default: DATASETS.TEST of the config")
    add("--crop-scale", type=float, metavar="FACTOR",
        help="side of a crop over side of its box; default: 1, of gt MODEL.IKD.CROP_SCALE")
    add("--max-anchors", type=int, default=0, metavar="N",
        help="of predicted: anchors per image that CLIP looks at, the detector's best; 0: all that "
        "inference keeps (MODEL.ATSS.TOPK_ANCHORS_TEST a level); default: %(default)s")
    add("--with-iou", action="store_true",
        help="of predicted: score by CLIP's probability times the predicted IoU, as the authors' "
        "code does")
    add("--images-per-batch", type=int, metavar="N", help="default: 1, of gt 16")
    add("--output", type=Path, metavar="JSON", help="file for the figures")
    add("--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE",
        help="config overrides, last on the line, e.g. MODEL.WEIGHTS model.pth")
    # fmt: on
    return parser


def evaluate_predicted(
    cfg: Any, datasets: Sequence[str], args: argparse.Namespace
) -> dict[str, Mapping[str, float]]:
    """Figures of each dataset, by Algorithm 1."""
    from detectron2.data import build_detection_test_loader

    from hierkd.data.mapper import HierKDDatasetMapper
    from hierkd.evaluation.direct_inference import DirectInference
    from hierkd.inference.predictor import OpenVocabularyPredictor

    direct_inference = DirectInference(
        OpenVocabularyPredictor(cfg).model,
        crop_scale=args.crop_scale or 1.0,
        max_anchors=args.max_anchors,
        fuse_quality=args.with_iou,
    )
    figures = {}
    for name in datasets:
        loader = build_detection_test_loader(
            cfg,
            name,
            mapper=HierKDDatasetMapper(cfg, is_train=False),
            batch_size=args.images_per_batch or 1,
        )
        figures[name] = direct_inference.evaluate(loader, name, cfg.TEST.DETECTIONS_PER_IMAGE)
    return figures


def evaluate_gt(
    cfg: Any, datasets: Sequence[str], args: argparse.Namespace
) -> dict[str, Mapping[str, float]]:
    """Figures of each dataset: what a detector would have that found every box as CLIP names it."""
    from hierkd.evaluation.upper_bound import clip_upper_bound
    from hierkd.teachers import clip as teachers

    teacher = teachers.build_teacher(cfg)
    return {
        name: clip_upper_bound(
            teacher,
            name,
            args.crop_scale or cfg.MODEL.IKD.CROP_SCALE,
            image_format=cfg.INPUT.FORMAT,
            images_per_batch=args.images_per_batch or 16,
            max_detections=cfg.TEST.DETECTIONS_PER_IMAGE,
        )
        for name in datasets
    }


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Measure all datasets, write ``--output`` and print a table."""
    parser = get_parser()
    args = parser.parse_args(argv)
    given = [each for each in (args.crop_scale, args.images_per_batch) if each is not None]
    if min(given, default=1) <= 0 or args.max_anchors < 0:
        parser.error(
            "--crop-scale and --images-per-batch must be positive, --max-anchors 0 or more"
        )
    if args.boxes == "gt" and (args.max_anchors or args.with_iou):
        parser.error("--max-anchors and --with-iou are of predicted boxes")
    from detectron2.utils.logger import setup_logger

    from hierkd.data.coco import check_datasets
    from hierkd.data.mapper import check_images
    from hierkd.experiments.results import figures_table, rounded_figures, write_results
    from hierkd.experiments.runs import git_commit
    from hierkd.load_config import load_config

    setup_logger(name="hierkd", abbrev_name="hierkd")
    cfg = load_config(args.config_file, args.opts)
    datasets = list(args.datasets or cfg.DATASETS.TEST)
    images = check_datasets(datasets)
    if cfg.DATALOADER.CHECK_IMAGES:
        check_images(images)
    words = sys.argv[1:] if argv is None else argv
    record = {
        "command": shlex.join(["python", "tools/clip_on_boxes.py", *words]),
        "config": args.config_file,
        "weights": cfg.MODEL.WEIGHTS if args.boxes == "predicted" else None,
        "teacher": cfg.MODEL.TEACHER.WEIGHTS,
        "commit": git_commit(ROOT),  # before: files may change during a long measurement
    }
    evaluate = {"predicted": evaluate_predicted, "gt": evaluate_gt}[args.boxes]
    figures = evaluate(cfg, datasets, args)
    if args.output is not None:
        write_results(args.output, {**record, "figures": rounded_figures(figures)})
    print(figures_table(figures, COLUMNS[args.boxes]))


if __name__ == "__main__":
    run_command(main)
