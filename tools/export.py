#!/usr/bin/env python
"""Write a detector to one file that runs without detectron2: ONNX, or PyTorch's .pt2.

    python tools/export.py --config-file output/demo/hierkd/config.yaml --output detector.onnx
    python tools/export.py --config-file configs/hierkd_R50.yaml --output detector.onnx \\
        --vocabulary "cat,umbrella,traffic cone" --check photos/*.jpg --opts MODEL.WEIGHTS model.pth
    python tools/export.py --config-file configs/hierkd_R50.yaml --output any_classes.onnx \\
        --vocabulary-as-input --opts MODEL.WEIGHTS model.pth

The file takes a picture of any size and returns its detections. --check runs it beside PyTorch, and
fails unless the detections are the same; without --opts the weights are the model_final.pth beside
the config. docs/python_api.md shows how to use the file.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hierkd.inference.predictor import OpenVocabularyPredictor

logger = logging.getLogger("hierkd.export")

PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm"}
# The graph is of float32 on a CPU, whatever the config chose for its own runs.
_PLAIN = ["MODEL.DEVICE", "cpu", "TEST.AMP.ENABLED", "False", "TEST.COMPILE", "False"]


def get_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="YAML")
    parser.add_argument(
        "--output", required=True, type=Path, metavar="FILE", help="ends in .onnx or .pt2"
    )
    vocabulary = parser.add_mutually_exclusive_group()
    vocabulary.add_argument(
        "--vocabulary",
        metavar="NAMES",
        help="class names separated by commas, or a registered dataset's name; "
        "default: the largest vocabulary among the config's test datasets",
    )
    vocabulary.add_argument(
        "--vocabulary-as-input",
        action="store_true",
        help="class embeddings are a second input of the graph, instead of part of it",
    )
    parser.add_argument(
        "--check",
        nargs="+",
        type=Path,
        metavar="PICTURE",
        help="pictures, or folders of them, whose detections are compared with PyTorch's",
    )
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="KEY VALUE",
        help="config overrides, last on the line, e.g. MODEL.WEIGHTS model.pth",
    )
    return parser


def find_pictures(paths: Sequence[Path]) -> list[Path]:
    """List pictures, and the pictures in folders.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: a folder has no pictures.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = [p for p in sorted(path.iterdir()) if p.suffix.lower() in PICTURE_SUFFIXES]
            if not inside:
                raise ValueError(f"--check: no pictures in the folder {path}")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise FileNotFoundError(f"--check: no such picture or folder: {path}")
    return found


def load_predictor(config_file: str, opts: Sequence[str]) -> OpenVocabularyPredictor:
    """Build the detector; a config without named weights finds its run's own beside it."""
    from hierkd.inference.predictor import OpenVocabularyPredictor
    from hierkd.load_config import load_config

    overrides = [*opts, *_PLAIN]
    trained = Path(config_file).parent / "model_final.pth"
    if "MODEL.WEIGHTS" not in overrides[::2] and trained.is_file():
        overrides += ["MODEL.WEIGHTS", str(trained)]
    return OpenVocabularyPredictor(load_config(config_file, overrides))


def run(args: argparse.Namespace) -> int:
    """Export, and check.

    Returns:
        0; 1 if the check failed.
    """
    from tqdm import tqdm

    from hierkd.data.mapper import read_picture
    from hierkd.inference import export
    from hierkd.inference.predictor import resolve_vocabulary

    export.check_output(args.output)
    if args.check and args.output.suffix == ".onnx":
        export.require_packages("onnxruntime")
    pictures = find_pictures(args.check or [])
    names = None if args.vocabulary is None else resolve_vocabulary(args.vocabulary)
    predictor = load_predictor(args.config_file, args.opts)
    if names is not None:
        predictor.set_vocabulary(names)
    as_input = args.vocabulary_as_input
    export.export_graph(predictor, args.output, vocabulary_as_input=as_input)
    megabytes = args.output.stat().st_size / 1e6
    vocabulary = (
        "class embeddings as an input" if as_input else f"{len(predictor.vocabulary)} classes"
    )
    logger.info("wrote %s: %.1f MB, %s", args.output, megabytes, vocabulary)
    if not pictures:
        return 0
    graph, _ = export.load_graph(args.output)
    progress = tqdm(pictures, unit="picture", disable=None)
    read = (read_picture(str(path)) for path in progress)
    agreement = export.compare_detections(predictor, graph, read, vocabulary_as_input=as_input)
    logger.info("%s", agreement)
    if not agreement.complete:
        logger.error(
            "the exported graph does not detect what PyTorch does within %g pixels and %g in score",
            export.BOX_TOLERANCE,
            export.SCORE_TOLERANCE,
        )
        return 1
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; errors of the user's end it with a message and status 2."""
    parser = get_parser()
    args = parser.parse_args(argv)
    import hierkd  # noqa: F401  (first: it quiets two deprecation warnings inside libraries)

    # isort: split
    from detectron2.utils.logger import setup_logger

    setup_logger(name="hierkd", abbrev_name="hierkd")
    try:
        return run(args)
    except (ValueError, OSError, ImportError) as error:
        parser.exit(2, f"export.py: error: {error}\n")


if __name__ == "__main__":
    raise SystemExit(main())
