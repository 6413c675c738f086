#!/usr/bin/env python
"""Score heat maps over pictures, per class and level (Figure 4).

    python tools/plot_heat_maps.py --config-file configs/hierkd_R50.yaml --input street.jpg \\
        --classes "cat,umbrella" --opts MODEL.WEIGHTS model.pth
    python tools/plot_heat_maps.py --config-file configs/hierkd_R50.yaml --input photos/*.jpg \\
        --classes "traffic cone" --vocabulary "traffic cone,car,person" \\
        --output output/figure4 --opts MODEL.WEIGHTS model.pth

Writes one PNG per picture to --output. The classes of the vocabulary compete with each other; those
of --classes are drawn.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from hierkd.command import run_command

logger = logging.getLogger("hierkd.plot_heat_maps")


def get_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    # fmt: off
    add("--config-file", required=True, metavar="YAML")
    add("--input", nargs="+", required=True, type=Path, metavar="PICTURE")
    add("--classes", required=True, metavar="NAMES",
        help="classes to draw: names separated by commas, or a registered dataset's name")
    add("--vocabulary", metavar="NAMES",
        help="classes that compete, likewise; default: the largest vocabulary among the config's "
        "test datasets, with --classes added to it")
    add("--output", type=Path, default="output/figure4", metavar="DIR", help="%(default)s")
    add("--panel-px", type=int, default=400, metavar="N",
        help="longer side of a panel; %(default)s")
    add("--opts", nargs=argparse.REMAINDER, default=[], metavar="KEY VALUE",
        help="config overrides, last on the line, e.g. MODEL.WEIGHTS model.pth")
    # fmt: on
    return parser


def run(args: argparse.Namespace) -> None:
    """Draw all pictures."""
    from tqdm import tqdm

    from hierkd.data.mapper import read_picture
    from hierkd.evaluation.heat_maps import score_heat_maps
    from hierkd.inference.predictor import OpenVocabularyPredictor, resolve_vocabulary
    from hierkd.load_config import load_config
    from hierkd.reports.charts import draw_heat_map_sheet
    from hierkd.reports.drawing import save_picture

    if missing := [str(path) for path in args.input if not path.is_file()]:
        raise FileNotFoundError(f"--input: no such files: {missing}")
    outputs = [args.output / f"{path.stem}.png" for path in args.input]
    if repeated := sorted({path.stem for path in outputs if outputs.count(path) > 1}):
        raise ValueError(f"--input: several pictures are called {repeated}: draw them apart")
    classes = resolve_vocabulary(args.classes)
    vocabulary = None if args.vocabulary is None else resolve_vocabulary(args.vocabulary)
    if vocabulary and (unknown := [name for name in classes if name not in vocabulary]):
        raise ValueError(f"--classes: {unknown} are not in --vocabulary {list(vocabulary)}")
    pictures = [read_picture(str(path)) for path in args.input]
    predictor = OpenVocabularyPredictor(load_config(args.config_file, args.opts))
    predictor.set_vocabulary(vocabulary or list(dict.fromkeys([*predictor.vocabulary, *classes])))
    for output, picture in tqdm(list(zip(outputs, pictures, strict=True)), unit="picture"):
        maps = score_heat_maps(predictor.model, predictor.prepare(picture), classes)
        sheet = draw_heat_map_sheet(picture[:, :, ::-1], maps, panel_px=args.panel_px)
        save_picture(output, sheet)
    logger.info("wrote %s", ", ".join(map(str, outputs)))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; errors of the user's end it with a message and status 2."""
    parser = get_parser()
    args = parser.parse_args(argv)
    if args.panel_px < 64:
        parser.error(f"--panel-px must be at least 64, got {args.panel_px}")
    from detectron2.utils.logger import setup_logger

    setup_logger(name="hierkd", abbrev_name="hierkd")
    try:
        run(args)
    except (ValueError, FileNotFoundError, ConnectionError) as error:
        parser.exit(2, f"plot_heat_maps.py: error: {error}\n")


if __name__ == "__main__":
    run_command(main)
