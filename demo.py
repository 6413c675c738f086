#!/usr/bin/env python
"""Detect any classes you can name: in pictures, videos, from a camera, or on request.

    python demo.py --input datasets/miniature/test/00340.jpg --vocabulary "elephant,bicycle"
    python demo.py --run RUN --input street.jpg photos/ --vocabulary "cat,umbrella,traffic cone"
    python demo.py --run RUN --input trip.mp4 --every 5 --html
    python demo.py --run RUN --webcam --window --vocabulary names.txt
    echo '{"image": "street.jpg", "vocabulary": ["cat"]}' | python demo.py --run RUN --input -

Writes annotated copies and one ``detections.json`` to ``--output``. Without ``--run`` and
``--config-file`` it uses the detector that ``make demo`` trained, which knows rendered icons only:
what it finds in photographs is noise. They need --run with a detector trained on photographs (no
weights are published yet). docs/demo.md shows every option.
"""

from __future__ import annotations

import hierkd  # noqa: F401  (first: it quiets two deprecation warnings inside libraries)

# isort: split
import argparse
import contextlib
import io
import logging
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

from detectron2.utils.logger import setup_logger
from tqdm import tqdm

from hierkd.inference.detections import DetectionFilter, parse_class_thresholds
from hierkd.inference.json_lines import answer_lines
from hierkd.inference.predictor import OpenVocabularyPredictor, resolve_vocabulary
from hierkd.inference.video import find_inputs, is_video
from hierkd.reports.demo_outputs import (
    VIDEO_CODECS,
    PageEntry,
    Window,
    check_inputs_stay,
    list_names,
    name_outputs,
    write_json,
    write_page,
)
from hierkd.reports.demonstration import (
    DEFAULT_RUN,
    CocoIds,
    Detectors,
    add_detector_options,
    annotate_picture,
    annotate_video,
    icons_only,
    load_detector,
    parse_compared,
    title_of,
)

logger = logging.getLogger("hierkd.demo")

REQUESTS = "-"  # as the only input: JSON lines from standard input


def get_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sources = parser.add_argument_group("what to look at").add_mutually_exclusive_group(
        required=True
    )
    sources.add_argument(
        "--input",
        nargs="+",
        metavar="PATH",
        help="pictures, videos, folders, or globs; or -, for requests as JSON lines on standard "
        "input, answered on standard output",
    )
    sources.add_argument(
        "--webcam",
        nargs="?",
        type=int,
        const=0,
        metavar="NUMBER",
        help="a camera, until Ctrl-C; the first one is 0, the default",
    )
    add = parser.add_argument_group("what to find").add_argument
    add(
        "--vocabulary",
        metavar="NAMES",
        help="class names separated by commas, a text file with one name a line, or a registered "
        "dataset's name; default: the largest vocabulary among the config's test datasets",
    )
    add(
        "--confidence-threshold",
        type=float,
        default=0.3,
        metavar="SCORE",
        help="detections below this score, 0 to 1, are left out; default: %(default)s",
    )
    add(
        "--class-thresholds",
        default="",
        metavar="NAME=SCORE,...",
        help="thresholds of single classes, or a text file with one NAME=SCORE a line",
    )
    add("--top-k", type=int, metavar="N", help="only the N best detections of each picture")
    add_detector_options(parser)
    _add_output_options(parser)
    return parser


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what to write and show").add_argument
    add("--output", default="output/detections", metavar="DIR", help="default: %(default)s")
    add(
        "--html",
        nargs="?",
        const="linked",
        choices=("linked", "one-file"),
        help="write index.html, too; the pictures stay beside it (linked, the default) or go into "
        "it (one-file)",
    )
    add(
        "--heat-maps",
        nargs="?",
        const="",
        metavar="NAMES",
        help="draw the scores of these classes over each picture, too; default: of those detected",
    )
    add(
        "--coco-results",
        metavar="ANNOTATIONS",
        help="write coco_results.json, too, with the ids of this COCO annotation file",
    )
    add("--window", action="store_true", help="show pictures: a key for the next one, q ends")
    add("--every", type=int, default=1, metavar="N", help="of videos, only every N-th frame")
    add("--max-frames", type=int, metavar="N", help="of videos and cameras, at most N frames")
    add(
        "--video-format",
        choices=[suffix[1:] for suffix in VIDEO_CODECS],
        default="mp4",
        help="of annotated videos; browsers play webm; default: %(default)s",
    )


def check_options(args: argparse.Namespace) -> None:
    """Raise ValueError if an option is out of range, or does not go with another."""
    for name in ("every", "max_frames", "top_k"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if not 0 <= args.confidence_threshold <= 1:
        raise ValueError(f"--confidence-threshold must be 0 to 1, got {args.confidence_threshold}")
    if args.webcam is not None and args.webcam < 0:
        raise ValueError(f"--webcam must be at least 0, got {args.webcam}")
    if args.input and REQUESTS in args.input:
        if len(args.input) > 1:
            raise ValueError("--input: - stands for standard input, and cannot be mixed with paths")
        drawing = ("compare", "html", "heat_maps", "coco_results", "window")
        given = [f"--{n.replace('_', '-')}" for n in drawing if getattr(args, n) not in (None, [])]
        if given := [flag for flag in given if flag != "--window" or args.window]:
            raise ValueError(f"--input - answers with JSON alone: leave out {', '.join(given)}")


def load_detectors(args: argparse.Namespace) -> Detectors:
    """Build the detector and those to compare it with.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: An option or a file is wrong.
    """
    vocabulary = None if args.vocabulary is None else resolve_vocabulary(args.vocabulary)
    keep = DetectionFilter(
        args.confidence_threshold, args.top_k, parse_class_thresholds(args.class_thresholds)
    )
    if vocabulary is not None:
        keep.check_vocabulary(vocabulary)
    first = title_of(args.run or args.config_file or DEFAULT_RUN)
    compared = parse_compared(args.compare, first)
    predictors = {first: load_detector(args.run, args.config_file, args.opts, args.device)}
    for title, path in compared.items():
        predictors[title] = OpenVocabularyPredictor.from_checkpoint(path, device=args.device)
    if icons := icons_only(predictors):
        logger.warning("%s", icons)
    return Detectors(predictors, keep, vocabulary)


def annotate(args: argparse.Namespace) -> int:
    """Detect in all inputs; a broken one is reported and does not stop the others.

    Returns:
        How many inputs could not be read.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: An option or a file is wrong, or an input would be overwritten.
        OSError: --output cannot be written to.
    """
    camera = args.webcam is not None
    sources = [Path(f"webcam{args.webcam}")] if camera else find_inputs(args.input)
    moving = [camera or is_video(source) for source in sources]
    ids = CocoIds.read(args.coco_results) if args.coco_results else None
    if any(moving) and (ids or args.heat_maps is not None):
        raise ValueError("--coco-results and --heat-maps are for pictures, not for videos")
    names = name_outputs(sources, [f".{args.video_format}" if m else ".png" for m in moving])
    folder = Path(args.output)
    check_inputs_stay(sources, folder, names)
    window = Window("HierKD") if args.window else None
    folder.mkdir(parents=True, exist_ok=True)
    detectors = load_detectors(args)
    if ids:
        ids.check(sources, detectors.vocabulary)
    heat_maps = None if args.heat_maps is None else resolve_classes(args.heat_maps, detectors)

    entries: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    shown: list[PageEntry] = []
    broken, results = 0, []
    todo = list(zip(sources, moving, names, strict=True))
    for source, moves, name in tqdm(todo, disable=True if any(moving) else None, unit="picture"):
        go_on = True
        try:
            if moves:
                entry, on_page = annotate_video(
                    detectors,
                    args.webcam if camera else source,
                    folder / name,
                    every=args.every,
                    max_frames=args.max_frames,
                    window=window,
                )
            else:
                entry, on_page, go_on = annotate_picture(
                    detectors, source, folder / name, heat_maps=heat_maps, window=window
                )
        except ValueError as error:
            logger.error("%s", error)
            broken += 1
            continue
        entries[moves].append(entry)
        shown.append(on_page)
        if ids:
            results += ids.results(source, entry["detections"])
        if not go_on:
            break
    write_outputs(args, detectors, entries, shown)
    if ids:
        write_json(folder / "coco_results.json", results)
    return broken


def resolve_classes(text: str, detectors: Detectors) -> list[str]:
    """Read the classes of --heat-maps; "" gives none.

    Raises:
        ValueError: One is not in the vocabulary.
    """
    classes = resolve_vocabulary(text) if text else []
    if unknown := [name for name in classes if name not in detectors.vocabulary]:
        raise ValueError(f"--heat-maps: {unknown} are not in the vocabulary")
    return classes


def write_outputs(
    args: argparse.Namespace,
    detectors: Detectors,
    entries: dict[bool, list[dict[str, Any]]],
    shown: Sequence[PageEntry],
) -> None:
    """Write detections.json and the page, and say where they are."""
    folder = Path(args.output)
    keep = detectors.keep
    content = {
        "vocabulary": list(detectors.vocabulary),
        "detectors": list(detectors.predictors),
        "confidence_threshold": keep.score_threshold,
        "class_thresholds": dict(keep.class_thresholds),
        "top_k": keep.top_k,
        "images": entries[False],
        "videos": entries[True],
    }
    write_json(folder / "detections.json", content)
    if args.html:
        thresholds = ", ".join(f"{k}: {v}" for k, v in keep.class_thresholds.items())
        facts = {
            "Vocabulary": list_names(detectors.vocabulary),
            "Detector" if len(detectors.predictors) == 1 else "Detectors": ", ".join(
                detectors.predictors
            ),
            "Score threshold": f"{keep.score_threshold}" + (f"; {thresholds}" * bool(thresholds)),
        }
        write_page(folder / "index.html", shown, facts, embed=args.html == "one-file")
    count = sum(len(entry["detections"]) for entry in entries[False])
    count += sum(entry["num_detections"] for entry in entries[True])
    kinds = [
        _count(len(entries[moves]), noun)
        for moves, noun in ((False, "picture"), (True, "video"))
        if entries[moves] or (not moves and not entries[True])
    ]
    logger.info(
        "%s in %s: see %s",
        *(_count(count, "detection"), " and ".join(kinds)),
        folder / "index.html" if args.html else folder,
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + "s" * (number != 1)


def serve(args: argparse.Namespace, requests: Iterable[str], answers: TextIO) -> None:
    """Answer requests until there are no more."""
    detectors = load_detectors(args)
    logger.info("ready: a JSON object per line, e.g. %s", '{"image": "street.jpg"}')
    for line in answer_lines(detectors.main, requests, detectors.keep):
        answers.write(line + "\n")
        answers.flush()


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; errors of the user's end it with a message and status 1 or 2."""
    parser = get_parser()
    args = parser.parse_args(argv)
    answers = sys.stdout
    serving = args.input == [REQUESTS]
    if serving and isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")  # a bad line ends itself alone
    broken = 0
    # What libraries print must not get between the answers.
    with contextlib.redirect_stdout(sys.stderr) if serving else contextlib.nullcontext():
        setup_logger(name="hierkd", abbrev_name="hierkd")
        try:
            check_options(args)
            if serving:
                serve(args, sys.stdin, answers)
            else:
                broken = annotate(args)
        except (ValueError, OSError) as error:  # ConnectionError: an OSError
            parser.exit(2, f"demo.py: error: {error}\n")
    if broken:
        parser.exit(1, f"demo.py: {broken} of the inputs could not be read\n")


if __name__ == "__main__":
    main()
