#!/usr/bin/env python
"""Write a detector to one file that runs without detectron2: ONNX, or PyTorch's .pt2.

    python tools/export.py --config-file output/demo/hierkd/config.yaml --output detector.onnx
    python tools/export.py --config-file configs/hierkd_R50.yaml --output detector.onnx \\
        --vocabulary "cat,umbrella,traffic cone" --check photos/*.jpg --opts MODEL.WEIGHTS model.pth
    python tools/export.py --config-file configs/hierkd_R50.yaml --output any_classes.onnx \\
        --vocabulary-as-input --opts MODEL.WEIGHTS model.pth
    python tools/export.py --config-file configs/hierkd_R50.yaml --output small.onnx \\
        --int8 --calibrate photos --evaluate coco_ovd_48_17_val_all --opts MODEL.WEIGHTS model.pth

The file takes a picture of any size and returns its detections. --check runs it beside PyTorch, and
fails unless the detections are the same, with --int8 nearly; without --opts the weights are the
model_final.pth beside the config. docs/python_api.md shows how to use the file.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hierkd.command import one_line_errors, run_command

logger = logging.getLogger("hierkd.export")

CALIBRATION = 100  # pictures, evenly spaced among those given [ours]
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
    vocabulary("--evaluate", metavar="DATASET",
               help="--vocabulary of a registered dataset, on which PyTorch's AP50 and the file's "
               "are measured")
    add("--fixed-size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"),
        help="of the graph's input, for accelerators that need it; pictures are stretched to it")
    add("--int8", action="store_true",
        help="convolutions in 8-bit integers, of an .onnx; needs --calibrate")
    add("--calibrate", nargs="+", default=[], metavar="PICTURE",
        help="pictures, or folders of them, like those that the file is for, without annotations; "
        f"{CALIBRATION} of them are used")
    add("--check", nargs="+", default=[], metavar="PICTURE",
        help="pictures, or folders of them, whose detections are compared with PyTorch's")
    add("--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE",
        help="config overrides, last on the line, e.g. MODEL.WEIGHTS model.pth")
    # fmt: on
    return parser


def run(args: argparse.Namespace) -> int:
    """Export, check and evaluate.

    Returns:
        0; 1 if the check failed.
    """
    from detectron2.data import transforms
    from tqdm import tqdm

    from hierkd.data.coco import check_datasets
    from hierkd.data.mapper import read_picture
    from hierkd.inference import export
    from hierkd.inference.detectors import load_detectors
    from hierkd.inference.predictor import resolve_vocabulary
    from hierkd.inference.video import find_inputs

    export.check_output(args.output)
    if args.int8 != bool(args.calibrate):
        raise ValueError("--int8 and --calibrate PICTURE ... go together: give both or neither")
    if args.int8 and args.output.suffix != ".onnx":
        raise ValueError(f"--int8 needs an --output that ends in .onnx, not {args.output}")
    if min(args.fixed_size or [1]) < 1:
        raise ValueError(f"--fixed-size must be positive, not {args.fixed_size}")
    pictures, calibration = find_inputs(args.check), find_inputs(args.calibrate)
    records = check_datasets([args.evaluate]) if args.evaluate else []
    text = args.vocabulary or args.evaluate
    names = None if text is None else resolve_vocabulary(text)
    (predictor,) = load_detectors(None, args.config_file, [*args.opts, *PLAIN]).values()
    if names is not None:
        predictor.set_vocabulary(names)
    if args.fixed_size:
        predictor.resize = transforms.Resize(args.fixed_size)
    as_input = args.vocabulary_as_input

    def read(paths: Sequence[Path]) -> Iterator[Any]:
        for path in tqdm(paths, unit="picture", disable=None):
            yield read_picture(str(path))

    few = calibration[:: -(-len(calibration) // CALIBRATION) or 1]
    shown = read(few) if args.int8 else None
    export.export_graph(predictor, args.output, vocabulary_as_input=as_input, calibration=shown)
    vocabulary = (
        "class embeddings as an input" if as_input else f"{len(predictor.vocabulary)} classes"
    )
    megabytes = args.output.stat().st_size / 1e6
    logger.info("wrote %s: %.1f MB, %s", args.output, megabytes, vocabulary)
    if not pictures and not records:
        return 0
    graph = export.as_model(predictor, export.load_graph(args.output), vocabulary_as_input=as_input)
    if records:
        evaluate(predictor, graph, args.evaluate, records)
    if export.same_detections(predictor, graph, read(pictures), int8=args.int8):
        return 0
    logger.error("the exported graph does not detect what PyTorch does")
    return 1


def evaluate(predictor: Any, graph: Any, dataset: str, records: list[Any]) -> None:
    """Log the figures of a detector, and of the graph made of it, on a dataset's records."""
    from detectron2.data import build_detection_test_loader
    from detectron2.evaluation import inference_on_dataset

    from hierkd.data.mapper import read_picture
    from hierkd.evaluation.split_coco_evaluation import SplitCOCOEvaluator

    def prepare(record: dict[str, Any]) -> dict[str, Any]:
        return {**record, **predictor.prepare(read_picture(record["file_name"]))}

    loader = build_detection_test_loader(records, mapper=prepare)
    for title, model in (("PyTorch", predictor.model), ("the exported graph", graph)):
        logger.info("by %s:", title)
        inference_on_dataset(model, loader, SplitCOCOEvaluator(dataset))


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = get_parser()
    args = parser.parse_args(argv)
    from detectron2.utils.logger import setup_logger

    setup_logger(name="hierkd", abbrev_name="hierkd")
    return run(args)


if __name__ == "__main__":
    run_command(main)
