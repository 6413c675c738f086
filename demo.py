#!/usr/bin/env python
"""Detect any classes you can name in pictures.

    python demo.py --input street.jpg photos/ --vocabulary "cat,umbrella,traffic cone"
    python demo.py --config-file configs/hierkd_R50.yaml --input "photos/*.jpg" \
        --vocabulary coco_ovd_48_17_val_all --opts MODEL.WEIGHTS model.pth

Writes an annotated copy of each picture and one ``detections.json`` to ``--output``. Without
``--config-file`` and weights it uses the detector that ``make demo`` trained.
"""

from __future__ import annotations

import hierkd  # noqa: F401  (first: it quiets two deprecation warnings inside libraries)

# isort: split
import argparse
import glob
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from detectron2.utils.logger import setup_logger
from PIL import Image
from tqdm import tqdm

from hierkd.data.dataset_mapper import read_picture
from hierkd.engine.config import load_config
from hierkd.engine.predictor import OpenVocabularyPredictor, resolve_vocabulary
from hierkd.engine.visualization import draw_instances

logger = logging.getLogger("hierkd.demo")

DEFAULT_CONFIG = "output/demo/hierkd/config.yaml"
TRAINED_WEIGHTS = "model_final.pth"  # what detectron2's trainer calls its last checkpoint
PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm"}


def get_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="PATH", help="pictures, folders, or globs"
    )
    parser.add_argument(
        "--output", default="output/detections", metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument(
        "--vocabulary",
        metavar="NAMES",
        help="class names separated by commas, or a registered dataset's name; "
        "default: the largest vocabulary among the config's test datasets",
    )
    parser.add_argument(
        "--confidence-threshold",
        type=float,
        default=0.3,
        metavar="SCORE",
        help="detections below this score, 0 to 1, are left out; default: %(default)s",
    )
    parser.add_argument(
        "--config-file", default=DEFAULT_CONFIG, metavar="YAML", help="default: %(default)s"
    )
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="KEY VALUE",
        help="config overrides, last on the line, e.g. MODEL.WEIGHTS model.pth; without "
        f"MODEL.WEIGHTS, a {TRAINED_WEIGHTS} beside the config file is taken",
    )
    return parser


def find_pictures(inputs: Iterable[str]) -> list[Path]:
    """List the pictures that files, folders (not their subfolders) and globs name, each once.

    Raises:
        FileNotFoundError: One of them matches no picture; it is named.
    """
    found: dict[Path, None] = {}
    for text in inputs:
        path = Path(text)
        if path.is_file():
            matches = [path]
        elif path.is_dir():
            matches = [p for p in sorted(path.iterdir()) if p.suffix.lower() in PICTURE_SUFFIXES]
        else:
            matches = [Path(p) for p in sorted(glob.glob(text, recursive=True))]
            matches = [p for p in matches if p.is_file()]
        if not matches:
            raise FileNotFoundError(f"--input: no picture matches {text!r}")
        found.update(dict.fromkeys(matches))
    return list(found)


def name_outputs(pictures: Sequence[Path], folder: Path) -> list[Path]:
    """Choose a path in ``folder`` per picture; pictures of the same name are numbered."""
    taken: set[str] = set()
    outputs = []
    for picture in pictures:
        name, number = f"{picture.stem}.png", 1
        while name in taken:
            name, number = f"{picture.stem}_{number}.png", number + 1
        taken.add(name)
        outputs.append(folder / name)
    return outputs


def load_predictor(config_file: str, opts: Sequence[str]) -> OpenVocabularyPredictor:
    """Build the detector; a config without named weights finds its run's own beside it.

    Raises:
        FileNotFoundError: There is no such config, or no weights.
        ValueError: The config or the overrides are wrong.
    """
    if not Path(config_file).is_file() and config_file == DEFAULT_CONFIG:
        raise FileNotFoundError(
            f"--config-file: no file {config_file!r}; run `make demo` first, or name a config and "
            "its weights: --config-file YAML --opts MODEL.WEIGHTS FILE"
        )
    overrides = list(opts)
    trained = Path(config_file).parent / TRAINED_WEIGHTS
    if "MODEL.WEIGHTS" not in overrides[::2] and trained.is_file():
        overrides += ["MODEL.WEIGHTS", str(trained)]
    return OpenVocabularyPredictor(load_config(config_file, overrides))


def detect(
    predictor: OpenVocabularyPredictor, picture: Path, output: Path, threshold: float
) -> dict[str, Any]:
    """Detect in one picture and write its annotated copy.

    Returns:
        The picture's entry of ``detections.json``.

    Raises:
        ValueError: The picture cannot be decoded; it is named.
    """
    image = read_picture(str(picture))
    instances = predictor(image)
    instances = instances[instances.scores >= threshold]
    vocabulary = predictor.vocabulary
    drawn = draw_instances(image[:, :, ::-1], instances, vocabulary)
    Image.fromarray(drawn).save(output)
    return {
        "file_name": str(picture),
        "annotated": output.name,
        "height": image.shape[0],
        "width": image.shape[1],
        "detections": [
            {
                "class": vocabulary[index],
                "score": round(score, 4),
                "box_xyxy": [round(coordinate, 2) for coordinate in box],
            }
            for index, score, box in zip(
                instances.pred_classes.tolist(),
                instances.scores.tolist(),
                instances.pred_boxes.tensor.tolist(),
                strict=True,
            )
        ],
    }


def run(args: argparse.Namespace) -> int:
    """Detect in all pictures; a broken one is reported and does not stop the others.

    Returns:
        How many pictures could not be read.
    """
    if not 0 <= args.confidence_threshold <= 1:
        raise ValueError(f"--confidence-threshold must be 0 to 1, got {args.confidence_threshold}")
    pictures = find_pictures(args.input)
    vocabulary = None if args.vocabulary is None else resolve_vocabulary(args.vocabulary)
    predictor = load_predictor(args.config_file, args.opts)
    if vocabulary is not None:
        predictor.set_vocabulary(vocabulary)
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)

    entries, broken = [], 0
    outputs = name_outputs(pictures, folder)
    for picture, output in tqdm(list(zip(pictures, outputs, strict=True)), disable=None):
        try:
            entries.append(detect(predictor, picture, output, args.confidence_threshold))
        except ValueError as error:
            logger.error("%s", error)
            broken += 1
    content = {
        "vocabulary": list(predictor.vocabulary),
        "confidence_threshold": args.confidence_threshold,
        "images": entries,
    }
    (folder / "detections.json").write_text(json.dumps(content, indent=1))
    count = sum(len(entry["detections"]) for entry in entries)
    logger.info("%d detections in %d pictures: see %s", count, len(entries), folder)
    return broken


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; errors of the user's end it with a message and status 1 or 2."""
    parser = get_parser()
    args = parser.parse_args(argv)
    setup_logger(name="hierkd", abbrev_name="hierkd")
    try:
        broken = run(args)
    except (ValueError, FileNotFoundError, ConnectionError) as error:
        parser.exit(2, f"demo.py: error: {error}\n")
    if broken:
        parser.exit(1, f"demo.py: {broken} of the pictures could not be read\n")


if __name__ == "__main__":
    main()
