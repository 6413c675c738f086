#!/usr/bin/env python
"""Look at a dataset of your own before training on it.

    python tools/check_dataset.py output/mydata/mydata.yaml
    python tools/check_dataset.py output/mydata/mydata.yaml --output output/mydata/check \\
        --config-file output/mydata/training.yaml

Prints how many boxes each class has, and a table of what is odd about boxes, pictures, captions and
names: two examples each, what training does about it, and how to mend it. Draws some training
pictures with the boxes and a caption that training will see. Whether CLIP tells the names apart is
asked of the config's teacher; without --config-file that is left out. docs/custom_data.md explains
the YAML. Ends with status 0, 1 if a finding costs labels or stops a training, or 2 if the dataset
cannot be used as it is.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hierkd.command import one_line_errors, run_command

if TYPE_CHECKING:
    from hierkd.data.check import Finding

COLUMNS, PANEL_PX = 3, 480


def get_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", metavar="YAML", help="of the dataset")
    parser.add_argument(
        "--config-file", default="", metavar="YAML", help="of the training, for its CLIP and prompt"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("output/check_dataset"),
        metavar="FOLDER",
        help="of the pictures; default: %(default)s",
    )
    parser.add_argument(
        "--pictures", type=int, default=9, metavar="N", help="to draw; default: %(default)s"
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="pictures to open of each half; default: all"
    )
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="KEY VALUE",
        help="config overrides, last on the line",
    )
    return parser


def check_names(names: Sequence[str], cfg: Any, *, embed: bool) -> tuple[list[Finding], list[str]]:
    """Findings about the class names, and notes on what was left out."""
    from hierkd.data.check import check_embeddings, check_tokens
    from hierkd.teachers.clip import build_teacher
    from hierkd.teachers.openai_clip import CONTEXT_LENGTH, count_tokens

    text = cfg.MODEL.TEXT_CLASSIFIER
    templates = tuple(text.TEMPLATES) or (text.TEMPLATE,)
    found = check_tokens(names, templates, count_tokens, CONTEXT_LENGTH)
    why = "no --config-file"
    if embed:
        try:
            embeddings = build_teacher(cfg).encode_classes(names).cpu()
            return found + check_embeddings(names, embeddings), []
        except (OSError, ValueError) as error:
            why = str(error)
    return found, [f"(not asked whether CLIP tells them apart: {why})"]


def draw_samples(dataset: str, number: int, path: Path) -> None:
    """Draw ``number`` images of a dataset, evenly spread, with boxes and the first caption."""
    import numpy as np
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from PIL import Image

    from hierkd.data.mapper import read_picture
    from hierkd.files import replacing
    from hierkd.inference.drawing import SheetRow, class_color, draw_boxes, draw_sheet, fit

    records = DatasetCatalog.get(dataset)
    vocabulary = MetadataCatalog.get(dataset).thing_classes
    chosen = np.unique(np.linspace(0, len(records) - 1, min(number, len(records))).astype(int))
    panels, titles = [], []
    for index in chosen:
        record = records[index]
        picture, factor = fit(read_picture(record["file_name"], "RGB"), PANEL_PX)
        boxes = np.array([each["bbox"] for each in record["annotations"]], float).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]  # XYWH -> XYXY
        classes = [each["category_id"] for each in record["annotations"]]
        labels = [vocabulary[k] for k in classes]
        colors = [class_color(k) for k in classes]
        panels.append(draw_boxes(picture, boxes * factor, labels, colors, min_long_side=PANEL_PX))
        titles.append((record.get("captions") or [Path(record["file_name"]).name])[0])
    rows = [
        SheetRow(panels[i : i + COLUMNS], titles[i : i + COLUMNS])
        for i in range(0, len(panels), COLUMNS)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet = draw_sheet(rows, panel_px=PANEL_PX, title_px=20)
    with replacing(path) as temporary:
        Image.fromarray(sheet).save(temporary, format="PNG")


def run(args: argparse.Namespace) -> bool:
    """Print everything; return whether a finding costs labels. An error: it cannot be used."""
    from detectron2.data import DatasetCatalog, MetadataCatalog

    from hierkd.data.check import check_pictures, class_table, finding_table, findings_of
    from hierkd.data.custom import register_definitions
    from hierkd.data.definitions import read_definition
    from hierkd.load_config import load_config

    definition = read_definition(args.dataset)
    cfg = load_config(args.config_file, args.opts)
    keep_empty = not cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    register_definitions([args.dataset], keep_empty=keep_empty)
    halves = ("train_base", "val_base", "val_novel", "val_all")
    parts = [f"{definition.name}_{half}" for half in halves]
    vocabularies, counts, reports = {}, {}, {}
    pictures: dict[str, dict[str, Any]] = {}
    for name in [part for part in parts if part in DatasetCatalog.list()]:
        metadata, half = MetadataCatalog.get(name), name.rsplit("_", 2)[1]
        if not metadata.get("empty"):
            records = DatasetCatalog.get(name)
            counts[name] = (len(records), sum(len(each["annotations"]) for each in records))
            pictures.setdefault(half, {}).update({each["image_id"]: each for each in records})
        vocabularies[name], reports[half] = metadata.thing_classes, metadata.report
    findings = [found for half, report in reports.items() for found in findings_of(half, report)]
    findings += check_pictures({k: list(each.values()) for k, each in pictures.items()}, args.limit)
    largest = max(vocabularies, key=lambda name: len(vocabularies[name]))
    about_names, notes = check_names(vocabularies[largest], cfg, embed=bool(args.config_file))
    findings += about_names
    shown = parts[0] if parts[0] in counts else largest
    if args.json:
        content = {"halves": reports, "findings": [asdict(each) for each in findings]}
        print(json.dumps(content | {"notes": notes}, indent=1))
        return any(each.costs for each in findings)
    print(f"{class_table(reports)}\n")
    for name, (images, boxes) in counts.items():
        print(f"{name}: {images:,} images, {boxes:,} boxes of {len(vocabularies[name])} classes")
    if shown == parts[0]:
        with_captions = reports["train"]["images_with_captions"]
        print(f"Captions: {with_captions:,} of {counts[shown][0]:,} training images have one")
    print(f"\nLook at:\n{finding_table(findings)}" if findings else "\nNothing odd was found.")
    print("\n".join(notes))
    path = args.output / f"{shown}.png"
    try:
        draw_samples(shown, args.pictures, path)
    except ValueError as error:  # an unreadable picture, or no object: among the findings
        print(f"\nNo pictures are drawn: {error}")
    else:
        print(f"\n{path}: {min(args.pictures, counts[shown][0])} pictures of {shown}")
    return any(each.costs for each in findings)


@one_line_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 1 where the dataset has errors."""
    parser = get_parser()
    args = parser.parse_args(argv)
    if args.pictures < 1:
        parser.error(f"--pictures must be at least 1, got {args.pictures}")
    if args.limit is not None and args.limit < 0:
        parser.error(f"--limit must not be negative, got {args.limit}")
    from detectron2.utils.logger import setup_logger

    if not args.json:  # the log goes to where the JSON goes
        setup_logger(name="hierkd", abbrev_name="hierkd")
    return int(run(args))


if __name__ == "__main__":
    run_command(main)
