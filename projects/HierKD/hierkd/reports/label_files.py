"""Detections as labels for tools in which people correct them: COCO, YOLO and Label Studio."""

from __future__ import annotations

import os
import shutil
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import yaml

from hierkd.files import replacing, write_json_atomically
from hierkd.reports.annotated import name_outputs

__all__ = ["LABEL_FORMATS", "write_labels"]

Entry = Mapping[str, Any]


def write_labels(
    folder: Path, formats: Iterable[str], vocabulary: Sequence[str], entries: Sequence[Entry]
) -> None:
    """Write labels of pictures.

    - ``coco``: ``coco.json``, whose ``file_name`` begin at the folder that holds all pictures;
      annotations have a ``score`` beside COCO's keys. [COCO]
    - ``yolo``: ``yolo/data.yaml``, ``yolo/images`` (links to the pictures, or copies where a file
      system has no links) and ``yolo/labels``, a line "class x y w h" per box: its middle and its
      sides as shares of the picture. [Ultralytics]
    - ``label-studio``: ``label_studio.json``, tasks with predictions, and ``label_studio.xml``, the
      labelling interface. Pictures are local files under the document root "/". [Label Studio]

    Args:
        folder: Where the files go.
        formats: Of `LABEL_FORMATS`.
        vocabulary: Class names.
        entries: ``images`` of detections.json.

    Raises:
        OSError: Something cannot be written.
        ValueError: A picture lies where a link to it would be.
    """
    for name in formats:
        LABEL_FORMATS[name](folder, vocabulary, entries)


def _boxes(entry: Entry) -> Iterator[tuple[str, float, list[float]]]:
    """Class name, score and XYWH in pixels of each detection."""
    for each in entry["detections"]:
        x0, y0, x1, y1 = each["box_xyxy"]
        yield each["class"], each["score"], [x0, y0, round(x1 - x0, 2), round(y1 - y0, 2)]


def _write_coco(folder: Path, vocabulary: Sequence[str], entries: Sequence[Entry]) -> None:
    paths = [Path(entry["file_name"]).absolute() for entry in entries]
    root = os.path.commonpath([path.parent for path in paths]) if paths else ""
    images: list[Entry] = []
    annotations: list[Entry] = []
    for number, (path, entry) in enumerate(zip(paths, entries, strict=True), start=1):
        size = {key: entry[key] for key in ("width", "height")}
        images.append({"id": number, "file_name": path.relative_to(root).as_posix(), **size})
        for name, score, box in _boxes(entry):
            of = {"image_id": number, "category_id": vocabulary.index(name) + 1, "iscrowd": 0}
            place = {"bbox": box, "area": round(box[2] * box[3], 2), "score": score}
            annotations.append({"id": len(annotations) + 1, **of, **place})
    categories = [{"id": number, "name": name} for number, name in enumerate(vocabulary, start=1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    write_json_atomically(folder / "coco.json", content)


def _write_yolo(folder: Path, vocabulary: Sequence[str], entries: Sequence[Entry]) -> None:
    folder = folder / "yolo"
    for part in ("images", "labels"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    sources = [Path(entry["file_name"]).absolute() for entry in entries]
    for link in (folder / "images").absolute().iterdir():
        if link.is_symlink() and link not in sources:  # of an earlier call
            link.unlink()
    suffixes = [source.suffix for source in sources]
    links = name_outputs(sources, folder / "images", suffixes)
    for source, link, entry in zip(sources, links, entries, strict=True):
        link.unlink(missing_ok=True)
        try:
            link.symlink_to(source)
        except OSError:
            shutil.copy(source, link)
        width, height = entry["width"], entry["height"]
        lines = [
            f"{vocabulary.index(name)} {(x + w / 2) / width:.6f} {(y + h / 2) / height:.6f} "
            f"{w / width:.6f} {h / height:.6f}\n"
            for name, _, (x, y, w, h) in _boxes(entry)
        ]
        with replacing(folder / "labels" / f"{link.stem}.txt") as making:
            making.write_text("".join(lines))
    content = {"train": "images", "val": "images", "names": dict(enumerate(vocabulary))}
    with replacing(folder / "data.yaml") as making:
        text = yaml.safe_dump(content, allow_unicode=True, sort_keys=False)
        making.write_text(text, encoding="utf-8")


def _write_label_studio(folder: Path, vocabulary: Sequence[str], entries: Sequence[Entry]) -> None:
    tasks = []
    for entry in entries:
        width, height = entry["width"], entry["height"]
        kind = {"from_name": "label", "to_name": "image", "type": "rectanglelabels"}
        size = {"original_width": width, "original_height": height}
        result = []
        for name, score, (x, y, w, h) in _boxes(entry):
            value = {"x": x / width, "y": y / height, "width": w / width, "height": h / height}
            percent = {key: 100 * share for key, share in value.items()}
            labelled = {**percent, "rotation": 0, "rectanglelabels": [name]}
            result.append({**kind, **size, "score": score, "value": labelled})
        path = Path(entry["file_name"]).absolute().as_posix().lstrip("/")
        image = f"/data/local-files/?d={urllib.parse.quote(path)}"
        predictions = [{"model_version": "hierkd", "result": result}]
        tasks.append({"data": {"image": image}, "predictions": predictions})
    write_json_atomically(folder / "label_studio.json", tasks)
    labels = "".join(f"    <Label value={quoteattr(name)}/>\n" for name in vocabulary)
    view = f"""<View>
  <Image name="image" value="$image"/>
  <RectangleLabels name="label" toName="image">
{labels}  </RectangleLabels>
</View>
"""
    with replacing(folder / "label_studio.xml") as making:
        making.write_text(view, encoding="utf-8")


LABEL_FORMATS = {"coco": _write_coco, "yolo": _write_yolo, "label-studio": _write_label_studio}
"""Name of a format -> what writes it."""
