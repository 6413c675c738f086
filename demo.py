#!/usr/bin/env python
"""Detect any classes you can name: in pictures, in videos, from a camera.

    python demo.py datasets/miniature/test/00340.jpg "elephant, bicycle"
    python demo.py --run RUN --input street.jpg photos/ --vocabulary "cat,umbrella,traffic cone"
    python demo.py --run RUN --input trip.mp4 --every 5 --html
    python demo.py --run RUN --webcam --vocabulary names.txt

Writes annotated copies and one ``detections.json`` to ``--output``; Ctrl-C keeps what is done.
Without ``--run`` and ``--config-file`` it uses the detector that ``make demo`` trained, which knows
rendered icons only: what it finds in photographs is noise. They need --run with a detector trained
on photographs (no weights are published yet). docs/demo.md shows every option.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hierkd.command import one_line_errors, run_command

if TYPE_CHECKING:
    from hierkd.inference.detectors import Detectors
    from hierkd.reports.annotated import Annotated

logger = logging.getLogger("hierkd.demo")


def get_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # fmt: off
    add = parser.add_argument_group("what to look at: one of these").add_argument
    add("picture", nargs="?", help="as --input")
    add("names", nargs="?", help="behind a picture, as --vocabulary")
    add("--input", nargs="+", metavar="PATH", help="pictures, videos, folders, or globs")
    add("--webcam", nargs="?", type=int, const=0, metavar="NUMBER",
        help="a camera, until Ctrl-C; default: the first one, 0")
    add = parser.add_argument_group("what to find").add_argument
    add("--vocabulary", metavar="NAMES",
        help="class names separated by commas, a text file with one name a line, or a registered "
        "dataset's name; default: the largest vocabulary among the config's test datasets")
    add("--examples", nargs="+", default=[], metavar="NAME=PICTURE,...",
        help="classes by pictures of the object, or by PICTURE@X0:Y0:X1:Y1, its box in pixels; "
        "beside the name, if that is in --vocabulary, too")
    add("--confidence-threshold", type=float, default=0.3, metavar="SCORE",
        help="detections below this score, 0 to 1, are left out; default: %(default)s")
    add("--class-thresholds", default="", metavar="NAME=SCORE,...",
        help="of single classes, or a text file with one NAME=SCORE a line")
    add("--top-k", type=int, metavar="N", help="only the N best detections of each picture")
    add = parser.add_argument_group("with which detector").add_argument
    add("--run", metavar="PATH",
        help="a training's folder, or a checkpoint with its config.yaml beside it or with "
        "--config-file; default: the one of `make demo`")
    add("--compare", nargs="+", default=[], metavar="[TITLE=]PATH",
        help="more of them, side by side with the first, for the same class names")
    add("--config-file", metavar="YAML", help="config; default: the config.yaml of --run")
    add("--device", help="cpu, cuda, cuda:1, ...; default: the config's")
    add("--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE",
        help="config overrides of the first detector, last on the line, e.g. MODEL.WEIGHTS m.pth")
    add = parser.add_argument_group("what to write").add_argument
    add("--annotated", choices=("jpg", "png", "none"), default="jpg",
        help="annotated copies: smaller and sooner, lossless, or none, which is fastest; "
        "default: %(default)s")
    add("--output", type=Path, default="output/detections", metavar="DIR",
        help="default: %(default)s")
    add("--html", nargs="?", const="linked", choices=("linked", "one-file"),
        help="write index.html, too; the pictures stay beside it (linked, the default) or go into "
        "it (one-file)")
    add("--export", nargs="+", default=[], choices=("coco", "yolo", "label-studio"),
        help="labels of the pictures for other tools, to be corrected there")
    add("--heat-maps", nargs="?", const=[], metavar="NAMES",
        help="draw the scores of these classes, too; default: of those detected")
    add("--every", type=int, default=1, metavar="N", help="of videos, only every N-th frame")
    add("--max-frames", type=int, metavar="N", help="of videos and cameras, at most N frames")
    add("--video-format", choices=("mp4", "avi", "webm"), default="mp4",
        help="of annotated videos; browsers play webm; default: %(default)s")
    # fmt: on
    return parser


def load(args: argparse.Namespace) -> Detectors:
    """Load the detectors."""
    from hierkd.inference.detections import DetectionFilter, parse_class_thresholds
    from hierkd.inference.detectors import Detectors, icons_only, load_detectors, unknown_to_icons
    from hierkd.inference.examples import parse_examples
    from hierkd.inference.predictor import resolve_vocabulary

    vocabulary = None if args.vocabulary is None else resolve_vocabulary(args.vocabulary)
    examples = parse_examples(args.examples)
    thresholds = parse_class_thresholds(args.class_thresholds)
    keep = DetectionFilter(args.confidence_threshold, args.top_k, thresholds)
    if vocabulary is not None or examples:
        keep.check_vocabulary([*(vocabulary or ()), *examples])
    predictors = load_detectors(
        args.run, args.config_file, args.opts, compared=args.compare, device=args.device
    )
    for warning in (icons_only(predictors), unknown_to_icons(predictors, vocabulary or ())):
        if warning:
            logger.warning("%s", warning)
    return Detectors(predictors, keep, vocabulary, examples)


def annotate(args: argparse.Namespace) -> int:
    """Detect in all inputs; a broken one is reported and does not stop the others.

    Returns:
        Exit status: 1 if an input could not be read, 130 after Ctrl-C.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: An option or a file is wrong, or an input would be overwritten.
        OSError: --output cannot be written to.
    """
    from tqdm import tqdm

    from hierkd.inference.predictor import resolve_vocabulary
    from hierkd.inference.video import find_inputs, is_video
    from hierkd.reports.annotated import (
        PICTURES_AT_ONCE,
        UNDRAWN,
        annotate_pictures,
        annotate_video,
        name_outputs,
    )

    camera = args.webcam is not None
    sources = [Path(f"webcam{args.webcam}")] if camera else find_inputs(args.input)
    moving = [camera or is_video(source) for source in sources]
    if any(moving) and (args.heat_maps is not None or args.export):
        raise ValueError("--heat-maps and --export are for pictures, not for videos")
    formats = [args.video_format if moves else args.annotated for moves in moving]
    suffixes = [UNDRAWN if args.annotated == "none" else f".{each}" for each in formats]
    outputs = name_outputs(sources, args.output, suffixes)
    args.output.mkdir(parents=True, exist_ok=True)
    detectors = load(args)
    heat_maps = resolve_vocabulary(args.heat_maps) if args.heat_maps else args.heat_maps
    if unknown := [name for name in heat_maps or () if name not in detectors.vocabulary]:
        raise ValueError(f"--heat-maps: {unknown} are not in the vocabulary")

    todo = list(zip(sources, outputs, strict=True))
    videos = [each for each, moves in zip(todo, moving, strict=True) if moves]
    pictures = [each for each, moves in zip(todo, moving, strict=True) if not moves]
    limits = {"every": args.every, "max_frames": args.max_frames}

    def annotated() -> Iterator[Annotated | ValueError]:
        for start in range(0, len(pictures), PICTURES_AT_ONCE):
            some = pictures[start : start + PICTURES_AT_ONCE]
            yield from annotate_pictures(detectors, some, heat_maps)
        for source, output in videos:
            try:
                yield annotate_video(detectors, args.webcam if camera else source, output, **limits)
            except ValueError as error:
                yield error

    done: list[Annotated] = []
    status = 0
    try:
        for each in tqdm(annotated(), total=len(todo), disable=any(moving) or None, unit="picture"):
            if isinstance(each, ValueError):
                logger.error("%s", each)
                status = 1
            else:
                done.append(each)
    except KeyboardInterrupt:
        logger.warning("stopped after %d of %d inputs", len(done), len(todo))
        status = 130
    write(args, detectors, done)
    return status


def write(args: argparse.Namespace, detectors: Detectors, done: Sequence[Annotated]) -> None:
    """Write detections.json, labels and the page, and say where they are."""
    from hierkd.reports.annotated import write_annotated_page, write_detections
    from hierkd.reports.label_files import write_labels

    written = args.output
    write_detections(args.output / "detections.json", detectors, done)
    entries = [each.entry for each in done if not each.is_video]
    write_labels(args.output, args.export, detectors.vocabulary, entries)
    if args.html:
        written = args.output / "index.html"
        write_annotated_page(written, detectors, done, embed=args.html == "one-file")
    found, videos = sum(each.num_detections for each in done), sum(each.is_video for each in done)
    counts = {"detection": found, "picture": len(done) - videos, "video": videos}
    words = [f"{count} {noun}{'s' * (count != 1)}" for noun, count in counts.items()]
    looked_at = [word for word in words[1:] if not word.startswith("0 ")]
    score, name = detectors.best
    best = f", the best score is {score:.1%}, of {name}" if name and not found else ""
    logger.info("%s in %s%s: see %s", words[0], " and ".join(looked_at) or words[1], best, written)


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; inputs that cannot be read end it with status 1 or 2."""
    parser = get_parser()
    args = parser.parse_args(argv)
    if sum(source is not None for source in (args.picture, args.input, args.webcam)) != 1:
        parser.error("name a picture, or give one of --input and --webcam; quote names with blanks")
    if args.every < 1 or (args.max_frames is not None and args.max_frames < 1):
        parser.error("--every and --max-frames must be at least 1")
    if args.annotated == "none" and (args.html or args.heat_maps is not None):
        parser.error("--html and --heat-maps show pictures: leave out --annotated none")
    args.input = args.input or [args.picture]
    args.vocabulary = args.vocabulary if args.names is None else args.names

    from detectron2.utils.logger import setup_logger

    import hierkd.load_config  # noqa: F401  (its datasets are vocabularies)

    setup_logger(name="hierkd", abbrev_name="hierkd")
    if status := annotate(args):
        parser.exit(status, "demo.py: not all inputs could be read\n" if status == 1 else None)


if __name__ == "__main__":
    run_command(main)
