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

from hierkd.command import run_command

logger = logging.getLogger("hierkd.export")

# The graph is of float32 on a CPU, whatever the config chose for its own runs.
PLAIN = ["MODEL.DEVICE", "cpu", "TEST.AMP.ENABLED", "False", "TEST.COMPILE", "False"]


def get_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    vocabulary = parser.add_mutually_exclusive_group().add_argument
    # fmt: off
    add("--config-file", required=True, metavar="YAML")
    add("--output", required=True, type=Path, metavar="FILE", help="ends in .onnx or .pt2")
    vocabulary("--vocabulary", metavar="NAMES",
               help="class names separated by commas, or a registered dataset's name; default: "
               "the largest vocabulary among the config's test datasets")
    vocabulary("--vocabulary-as-input", action="store_true",
               help="class embeddings are a second input of the graph, instead of part of it")
    add("--check", nargs="+", default=[], metavar="PICTURE",
        help="pictures, or folders of them, whose detections are compared with PyTorch's")
    add("--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE",
        help="config overrides, last on the line, e.g. MODEL.WEIGHTS model.pth")
    # fmt: on
    return parser


def run(args: argparse.Namespace) -> int:
    """Export, and check.

    Returns:
        0; 1 if the check failed.
    """
    from tqdm import tqdm

    from hierkd.data.mapper import read_picture
    from hierkd.inference.detectors import load_detectors
    from hierkd.inference.export import check_output, export_graph, load_graph, same_detections
    from hierkd.inference.predictor import resolve_vocabulary
    from hierkd.inference.video import find_inputs

    check_output(args.output)
    pictures = find_inputs(args.check)
    names = None if args.vocabulary is None else resolve_vocabulary(args.vocabulary)
    (predictor,) = load_detectors(None, args.config_file, [*args.opts, *PLAIN]).values()
    if names is not None:
        predictor.set_vocabulary(names)
    as_input = args.vocabulary_as_input
    export_graph(predictor, args.output, vocabulary_as_input=as_input)
    vocabulary = (
        "class embeddings as an input" if as_input else f"{len(predictor.vocabulary)} classes"
    )
    megabytes = args.output.stat().st_size / 1e6
    logger.info("wrote %s: %.1f MB, %s", args.output, megabytes, vocabulary)
    if not pictures:
        return 0
    read = (read_picture(str(path)) for path in tqdm(pictures, unit="picture", disable=None))
    graph = load_graph(args.output)
    if same_detections(predictor, graph, read, vocabulary_as_input=as_input):
        return 0
    logger.error("the exported graph does not detect what PyTorch does")
    return 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; errors of the user's end it with a message and status 2."""
    parser = get_parser()
    args = parser.parse_args(argv)
    from detectron2.utils.logger import setup_logger

    setup_logger(name="hierkd", abbrev_name="hierkd")
    try:
        return run(args)
    except (ValueError, OSError, ImportError) as error:
        parser.exit(2, f"export.py: error: {error}\n")


if __name__ == "__main__":
    run_command(main)
