"""COCO's official files: where they are from, whether they are whole, and whether they are it.

COCO published its 123,287 annotated pictures twice, divided into a training and a validation half
in one way in 2014 and in another in 2017. Files of the two years, of the two halves, and of boxes
and captions are easily mixed up: every reader says which it wants, and refuses the others.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hierkd.data.coco_json import (
    FieldTypes,
    check_annotation,
    check_file_name,
    get_box,
    get_entries,
    index_by_id,
    read_coco_json,
    shown,
)
from hierkd.data.splits import COCO_2017, CocoVariant

__all__ = [
    "Archive",
    "InputState",
    "annotation_files",
    "describe_inputs",
    "read_captions",
    "read_instances",
    "where_from",
]

JsonObject = dict[str, Any]

_ANNOTATIONS_URL = "http://images.cocodataset.org/annotations/annotations_trainval{year}.zip"
_IMAGES_URL = "http://images.cocodataset.org/zips/{folder}.zip"
_SIZES = {"train2014": "13 GB", "val2014": "6 GB", "train2017": "18 GB", "val2017": "1 GB"}

_TAIL_BYTES = 64  # how much of a JSON's end is searched for its last brace [ours]


_IMAGE_FIELDS: FieldTypes = {"id": int, "file_name": str, "height": int, "width": int}
_BOX_FIELDS: FieldTypes = {"id": int, "image_id": int, "category_id": int, "bbox": list}
_CAPTION_FIELDS: FieldTypes = {"id": int, "image_id": int, "caption": str}
_CATEGORY_FIELDS: FieldTypes = {"id": int, "name": str}


@dataclass(frozen=True)
class Archive:
    """A file to download, and to unpack in the folder ``coco``.

    Attributes:
        url: Where it is.
        size: About how large, for people.
    """

    url: str
    size: str


@dataclass(frozen=True)
class InputState:
    """What is at the place of a file or folder that COCO needs.

    Attributes:
        path: The place.
        state: ``"PARTIAL"`` is a JSON that is cut off, or a folder with fewer pictures than COCO
            has; which pictures is only known to the annotations.
        detail: The size of a file, the number of pictures in a folder, or what is wrong.
        archive: What has it.
    """

    path: Path
    state: Literal["found", "PARTIAL", "MISSING"]
    detail: str
    archive: Archive


def describe_inputs(
    root: str | os.PathLike[str], variant: CocoVariant = COCO_2017
) -> list[InputState]:
    """Look at every file and folder that COCO needs: at a JSON's two ends, and at a folder's list.

    Args:
        root: The folder that holds ``coco``.
        variant: Which COCO.
    """
    coco = Path(root) / "coco"
    annotations = [
        _state_of_json(coco / "annotations" / name) for name in annotation_files(variant)
    ]
    folders = [_state_of_folder(coco / name, full) for name, full in variant.num_images.items()]
    return annotations + folders


def _state_of_json(path: Path) -> InputState:
    """Return whether there is a JSON object at ``path``, judged by its first and last bytes."""
    archive = _archive_of(path)
    if not path.is_file():
        return InputState(path, "MISSING", "does not exist", archive)
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(1)
        file.seek(max(0, size - _TAIL_BYTES))
        last = file.read().rstrip()[-1:]
    if first != b"{":
        return InputState(path, "PARTIAL", f"{size:,} bytes, and no JSON object", archive)
    if last != b"}":
        return InputState(path, "PARTIAL", f"cut off after {size:,} bytes", archive)
    return InputState(path, "found", f"{size:,} bytes", archive)


def _state_of_folder(path: Path, full: int) -> InputState:
    """Return whether the folder ``path`` has as many pictures as COCO has, which is ``full``."""
    archive = _archive_of(path)
    if not path.is_dir():
        return InputState(path, "MISSING", "does not exist", archive)
    number = sum(name.endswith(".jpg") for name in os.listdir(path))
    detail = f"{number:,} of the {full:,} pictures of the whole COCO"
    return InputState(path, "found" if number >= full else "PARTIAL", detail, archive)


def annotation_files(variant: CocoVariant) -> tuple[str, ...]:
    """Names of the official files that are read."""
    return (
        f"instances_{variant.train}.json",
        f"instances_{variant.val}.json",
        f"captions_{variant.train}.json",
    )


def _archive_of(path: Path) -> Archive:
    """Return the archive that has the COCO file or image folder at ``path``."""
    if path.suffix == ".json":
        return Archive(_ANNOTATIONS_URL.format(year=path.stem[-4:]), "241 MB")
    return Archive(_IMAGES_URL.format(folder=path.name), _SIZES[path.name])


def where_from(path: Path) -> str:
    """Return how to obtain the COCO file or image folder at ``path``."""
    return f"Download {_archive_of(path).url} and unpack it so that {path} exists."


def _drop_segmentation(entry: JsonObject) -> JsonObject:
    """Remove the masks of an annotation while it is parsed: most of the file, never used."""
    entry.pop("segmentation", None)
    return entry


def _read_official(path: Path) -> JsonObject:
    """Read an official COCO annotation file."""
    return read_coco_json(path, missing_hint=where_from(path), object_hook=_drop_segmentation)


def read_instances(path: Path, folder: str) -> JsonObject:
    """Read and check ``instances_{train,val}<year>.json``, leaving out the masks.

    Args:
        path: The file.
        folder: Such as ``"train2017"``: what the file must be about.

    Returns:
        Its content, with unique image and annotation ids and no reference into the void.

    Raises:
        FileNotFoundError: There is no such file; says where it comes from.
        ValueError: It is broken, of another year, of the other half of COCO, a captions file, or
            its entries contradict each other or have fields that are no boxes or paths.
    """
    content = _read_official(path)
    _check_kind(content, path, wanted="bbox", other="caption")
    images = index_by_id(get_entries(content, "images", _IMAGE_FIELDS, path), "images", path)
    for image in content["images"]:
        check_file_name(image["file_name"], image["id"], path)
    _check_year_and_half(content, path, folder)
    boxes = get_entries(content, "annotations", _BOX_FIELDS, path)
    index_by_id(boxes, "annotations", path)
    categories = get_entries(content, "categories", _CATEGORY_FIELDS, path)
    category_ids = index_by_id(categories, "categories", path)
    for box in boxes:
        for key, known in (("image_id", images), ("category_id", category_ids)):
            if box[key] not in known:
                raise ValueError(
                    f"{path}: annotation {box['id']} has {key} {box[key]}, which the file does "
                    "not contain."
                )
        check_annotation(box, path)
        get_box(box, path)
    return content


def read_captions(path: Path, folder: str) -> dict[int, list[str]]:
    """Read and check ``captions_{train,val}<year>.json``.

    Args:
        path: The file.
        folder: Such as ``"train2017"``: what the file must be about.

    Returns:
        Image id -> its captions in the order of their ids, without surrounding white space and
        without empty ones.

    Raises:
        FileNotFoundError: There is no such file; says where it comes from.
        ValueError: It is broken, of another year, of the other half of COCO, or not of captions,
            or has one of an image that it does not contain.
    """
    content = _read_official(path)
    _check_kind(content, path, wanted="caption", other="bbox")
    images = get_entries(content, "images", _IMAGE_FIELDS, path)
    known = index_by_id(images, "images", path)
    _check_year_and_half(content, path, folder)
    entries = get_entries(content, "annotations", _CAPTION_FIELDS, path)
    index_by_id(entries, "annotations", path)
    captions: dict[int, list[str]] = defaultdict(list)
    for entry in sorted(entries, key=lambda each: each["id"]):
        if entry["image_id"] not in known:
            raise ValueError(
                f"{path}: caption {entry['id']} is of image {entry['image_id']}, which the file "
                "does not contain."
            )
        text = " ".join(entry["caption"].split())
        if text:
            captions[entry["image_id"]].append(text)
    return dict(captions)


def _check_kind(content: JsonObject, path: Path, *, wanted: str, other: str) -> None:
    """Raise ValueError if the annotations have the field ``other`` in place of ``wanted``."""
    annotations = content.get("annotations")
    first = annotations[0] if isinstance(annotations, list) and annotations else {}
    if isinstance(first, dict) and wanted not in first and other in first:
        kinds = {
            "bbox": "boxes (instances_*.json)",
            "caption": "captions (captions_*.json)",
        }
        raise ValueError(
            f"{path}: expected {kinds[wanted]}, found {kinds[other]}. Are the instances and the "
            "captions file swapped?"
        )


def _check_year_and_half(content: JsonObject, path: Path, folder: str) -> None:
    """Raise ValueError if the images are not those of ``folder``, as far as the file says."""
    wanted = int(folder[-4:])
    year = content["info"].get("year") if isinstance(content.get("info"), dict) else None
    if year not in (None, wanted):
        raise ValueError(
            f"{path}: expected COCO {wanted} ({folder}), found info.year {shown(year)}."
        )
    if not content["images"]:
        raise ValueError(f"{path}: 'images' is empty.")
    prefix = f"COCO_{folder}_" if wanted == 2014 else ""
    for image in content["images"]:
        name = image["file_name"]
        if not name.startswith(prefix) or (not prefix and name.startswith("COCO_")):
            raise ValueError(
                f"{path}: expected file names of COCO {wanted} such as {prefix}000000000139.jpg, "
                f"found {shown(name)}. Use the annotations of {wanted}."
            )
        # The files of 2014 were published with two kinds of URL; the older names no folder.
        url = str(image.get("coco_url", ""))
        if any(found != folder for found in re.findall(r"/((?:train|val|test)\d{4})/", url)):
            raise ValueError(f"{path}: expected images of {folder}, found {shown(url)}.")
