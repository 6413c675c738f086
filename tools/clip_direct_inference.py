#!/usr/bin/env python
"""CLIP direct inference (Table 6, Algorithm 1): a detector's boxes, classified by CLIP.

    python tools/clip_direct_inference.py --config-file configs/hierkd_R50.yaml \\
        --output output/table6/hierkd.json --opts MODEL.WEIGHTS model.pth
    python tools/clip_direct_inference.py --config-file configs/miniature/hierkd.yaml \\
        --datasets miniature_ovd_test_novel --max-anchors 50 \\
        --output output/table6/miniature.json --opts MODEL.WEIGHTS model.pth

By default as the paper prints the algorithm: crops of the boxes themselves, CLIP's probability as
the score. Works on any checkpoint and any registered dataset, with its vocabulary. CLIP looks at
every anchor that inference keeps, up to 1000 a level: on a CPU, limit them with --max-anchors 100
(per image, the best ones). Prints a table; --output is JSON.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from hierkd.command import one_line_errors, run_command

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ("AP50", "AR50", "AP", "APs", "APm", "APl")


def get_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    # fmt: off
    add("--config-file", required=True, metavar="YAML")
    add("--datasets", nargs="+", metavar="NAME", help="default: DATASETS.TEST of the config")
    add("--crop-scale", type=float, default=1.0, metavar="FACTOR",
        help="side of a crop over side of its box; default: %(default)s")
    add("--max-anchors", type=int, default=0, metavar="N",
        help="anchors per image that CLIP looks at, the detector's best; 0: all that inference "
        "keeps (MODEL.ATSS.TOPK_ANCHORS_TEST a level); default: %(default)s")
    add("--with-iou", action="store_true",
        help="score by CLIP's probability times the predicted IoU, as the authors' code does")
    add("--images-per-batch", type=int, default=1, metavar="N", help="default: %(default)s")
    add("--output", type=Path, metavar="JSON", help="file for the figures")
    add("--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE",
        help="config overrides, last on the line, e.g. MODEL.WEIGHTS model.pth")
    # fmt: on
    return parser


def run(args: argparse.Namespace, command: str) -> None:
    """Measure all datasets, write the record to ``--output`` and print a table."""
    from detectron2.data import build_detection_test_loader

    from hierkd.data.coco import check_datasets
    from hierkd.data.mapper import HierKDDatasetMapper, check_images
    from hierkd.evaluation.direct_inference import DirectInference
    from hierkd.experiments.results import figures_table, rounded_figures, write_results
    from hierkd.experiments.runs import git_commit
    from hierkd.inference.predictor import OpenVocabularyPredictor
    from hierkd.load_config import load_config

    cfg = load_config(args.config_file, args.opts)
    datasets = list(args.datasets or cfg.DATASETS.TEST)
    images = check_datasets(datasets)
    if cfg.DATALOADER.CHECK_IMAGES:
        check_images(images)
    direct_inference = DirectInference(
        OpenVocabularyPredictor(cfg).model,
        crop_scale=args.crop_scale,
        max_anchors=args.max_anchors,
        fuse_quality=args.with_iou,
    )
    commit = git_commit(ROOT)  # before: files may change during a long measurement
    figures = {}
    for name in datasets:
        loader = build_detection_test_loader(
            cfg,
            name,
            mapper=HierKDDatasetMapper(cfg, is_train=False),
            batch_size=args.images_per_batch,
        )
        figures[name] = direct_inference.evaluate(loader, name, cfg.TEST.DETECTIONS_PER_IMAGE)
    record = {
        "command": command,
        "config": args.config_file,
        "weights": cfg.MODEL.WEIGHTS,
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
    if args.crop_scale <= 0 or args.images_per_batch < 1 or args.max_anchors < 0:
        parser.error(
            "--crop-scale and --images-per-batch must be positive, --max-anchors 0 or more"
        )
    from detectron2.utils.logger import setup_logger

    setup_logger(name="hierkd", abbrev_name="hierkd")
    command = shlex.join(
        ["python", "tools/clip_direct_inference.py", *(sys.argv[1:] if argv is None else argv)]
    )
    run(args, command)


if __name__ == "__main__":
    run_command(main)
