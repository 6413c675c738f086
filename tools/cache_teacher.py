#!/usr/bin/env python
"""Write what CLIP says of all training boxes and captions to disk, for training without CLIP.

    python tools/cache_teacher.py --config-file configs/hierkd_R50.yaml MODEL.IKD.BOXES gt \\
        --output output/teacher_cache
    python train_net.py --config-file configs/hierkd_R50.yaml --num-gpus 4 MODEL.IKD.BOXES gt \\
        MODEL.TEACHER.CACHE output/teacher_cache

An interrupted run goes on where it stopped when it is started again. DATASETS.TRAIN, MODEL.TEACHER,
MODEL.IKD.CROP_SCALE, MODEL.IKD.PROPOSALS_PER_IMAGE and the prompts of the config count; the
detector does not. With proposals --proposals-from names a trained class-agnostic detector.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from hierkd.command import one_line_errors, run_command


def get_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="YAML", help="of the training")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="of the cache")
    parser.add_argument(
        "--images-per-chunk",
        type=int,
        default=16,
        metavar="N",
        help="encoded and written together; default: %(default)s",
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="that read images; default: one per core"
    )
    parser.add_argument(
        "--proposals-from",
        nargs=2,
        default=(),
        metavar=("YAML", "WEIGHTS"),
        help="of the RPN whose best MODEL.IKD.PROPOSALS_PER_IMAGE boxes are embedded, too",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="begin anew, whatever FOLDER holds"
    )
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config overrides")
    return parser


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Fill the cache."""
    parser = get_parser()
    args = parser.parse_intermixed_args(argv)
    for option in ("images_per_chunk", "threads"):
        value = getattr(args, option)
        if value is not None and value < 1:
            parser.error(f"--{option.replace('_', '-')} must be at least 1, got {value}")

    from detectron2.utils.logger import setup_logger

    import hierkd.training.fill_cache  # PyTorch comes when the command line has been understood
    from hierkd.load_config import load_config

    setup_logger(name="hierkd")
    cache = hierkd.training.fill_cache.fill_cache(
        load_config(args.config_file, args.opts),
        args.output,
        images_per_chunk=args.images_per_chunk,
        num_threads=args.threads,
        overwrite=args.overwrite,
        proposals_from=args.proposals_from,
    )
    size = sum(path.stat().st_size for path in args.output.iterdir()) / 2**20
    print(
        f"{args.output}: {cache.contents.num_boxes:,} boxes, original and mirrored, and "
        f"{cache.contents.num_texts:,} texts of {', '.join(cache.contents.datasets)}; {size:,.1f} "
        f"MiB. Train with MODEL.IKD.BOXES gt MODEL.TEACHER.CACHE {args.output}"
    )


if __name__ == "__main__":
    run_command(main)
