"""Annotation files in COCO's layout, read and checked, with errors that say where one is wrong.

:func:`read_annotations` is the one place where boxes come in: from a user's file, from COCO's own,
and from the files that this project makes of them. No label is lost here without a word.
"""

from __future__ import annotations

import json
import math
import os
import posixpath
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = [
    "FieldTypes",
    "check_annotation",
    "check_annotations",
    "get_box",
    "get_entries",
    "index_by_id",
    "read_annotations",
    "read_coco_json",
    "shown",
    "some",
]

JsonObject = dict[str, Any]
FieldTypes = Mapping[str, type | tuple[type, ...]]
"""Field name -> the type or types that its value must have."""

_MAX_NAMED = 5  # how many offenders a message names before it only counts them [ours]
_SHOWN_CHARACTERS = 200  # of a value in a message [ours]
_INT64 = range(-(2**63), 2**63)  # what the arrays of ids and sizes hold

_SIZE_FIELDS: FieldTypes = {"id": (int, str), "height": int, "width": int}
_IMAGE_FIELDS: FieldTypes = {"file_name": str}
_CATEGORY_FIELDS: FieldTypes = {"id": int, "name": str}
_ANNOTATION_FIELDS: FieldTypes = {
    "id": (int, str), "image_id": (int, str), "category_id": int, "bbox": list,
}  # fmt: skip


def read_annotations(path: str | os.PathLike[str], missing_hint: str = "") -> JsonObject:
    """Read an annotation file as :func:`read_coco_json` does, and :func:`check_annotations`."""
    content = read_coco_json(path, missing_hint)
    check_annotations(content, path)
    return content


def read_coco_json(path: str | os.PathLike[str], missing_hint: str = "") -> JsonObject:
    """Read a JSON file whose top level is an object; ``segmentation``, most of COCO's, is left out.

    Raises:
        FileNotFoundError: There is no such file; ``missing_hint`` says what to do.
        ValueError: The file is not UTF-8, not JSON (the position is named), or not an object.
    """
    path = Path(path)
    if not path.is_file():
        found = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise FileNotFoundError(
            f"Annotation file {path.absolute()} {found}. {missing_hint}".rstrip()
        )

    def drop_mask(entry: JsonObject) -> JsonObject:  # before masks fill the memory
        entry.pop("segmentation", None)
        return entry

    try:
        content = json.loads(path.read_text("utf-8-sig"), object_hook=drop_mask)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a UTF-8 text file: {error}.") from error
    except (ValueError, RecursionError) as error:
        asked = "Was it downloaded or written completely?"
        if "Extra data" in str(error):
            asked = "Expected one object in COCO's layout: no JSON Lines, no text of YOLO's."
        raise ValueError(f"{path} is not valid JSON: {error}. {asked}") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}: expected a JSON object with 'images', 'annotations' and 'categories', "
            f"found a {type(content).__name__} at the top level."
        )
    return content


def check_annotations(content: JsonObject, path: str | os.PathLike[str]) -> None:
    """Check all that training and evaluation rely on in a parsed annotation file.

    Whole numbers that are written as 128.0 become integers. LVIS v1 names a picture by its address
    on COCO's server alone: it gets the ``file_name`` that this ends with.

    Args:
        content: ``images`` (``id``, ``file_name``, ``height``, ``width``, perhaps ``captions``),
            ``annotations`` (``id``, ``image_id``, ``category_id``, ``bbox``, perhaps ``iscrowd``
            and ``area``) and ``categories`` (``id``, ``name``).
        path: Where it is from, for messages.

    Raises:
        ValueError: Something is missing, of another type, repeated, unknown or makes no sense: the
            list, the entry, and what was found are named.
    """
    for image in get_entries(content, "images", _SIZE_FIELDS, path):
        if "file_name" not in image and isinstance(image.get("coco_url"), str):
            image["file_name"] = "/".join(image["coco_url"].split("/")[-2:])  # val2017/0...139.jpg
    images = index_by_id(get_entries(content, "images", _IMAGE_FIELDS, path), "images", path)
    if not images:
        raise ValueError(f"{path}: 'images' is empty.")
    if len(kinds := {type(image_id): image_id for image_id in images}) > 1:
        raise ValueError(
            f"{path}: the ids of 'images' must all be numbers or all be strings, found "
            f"{some(kinds.values())}."
        )
    for image in content["images"]:
        _check_image(image, path)
    found = get_entries(content, "categories", _CATEGORY_FIELDS, path)
    categories = index_by_id(found, "categories", path)
    if not categories:
        raise ValueError(f"{path}: 'categories' is empty.")
    names = Counter(category["name"] for category in found)
    if repeated := [name for name, count in names.items() if count > 1]:
        raise ValueError(f"{path}: several 'categories' are called {some(repeated)}.")
    annotations = get_entries(content, "annotations", _ANNOTATION_FIELDS, path)
    index_by_id(annotations, "annotations", path)
    for annotation in annotations:
        for key, known in (("image_id", images), ("category_id", categories)):
            if (value := annotation[key]) not in known:
                twins = [each for each in known if str(each) == str(value)]  # "1" beside 1
                hint = f"; it contains {twins[0]!r}, which is of another type" if twins else ""
                raise ValueError(
                    f"{path}: annotation {shown(annotation['id'])} has {key} {shown(value)}, "
                    f"which the file does not contain{hint}."
                )
        check_annotation(annotation, path)
        get_box(annotation, path)


def get_entries(
    content: Mapping[str, Any], key: str, required: FieldTypes, path: str | os.PathLike[str]
) -> list[JsonObject]:
    """Return the list of objects ``content[key]`` after checking each one's ``required`` fields.

    True and false are no numbers, an integer has at most 64 bits, and 128.0 becomes 128.

    Raises:
        ValueError: ``key`` is missing or not a list, or an entry is not an object, lacks a field
            or has a field of another type. The first such entry is named.
    """
    if key not in content:
        raise ValueError(f"{path}: key {key!r} is missing; found {shown(sorted(content))}.")
    entries = content[key]
    if not isinstance(entries, list):
        raise ValueError(f"{path}: {key!r} must be a list, found a {type(entries).__name__}.")
    for index, entry in enumerate(entries):
        if problem := _problem(entry, required):
            raise ValueError(f"{path}: {key}[{index}]{problem}.")
    return entries


def _problem(entry: Any, required: FieldTypes) -> str:
    """What is wrong with an entry; empty if nothing is."""
    if not isinstance(entry, dict):
        return f" must be an object, found {shown(entry)}"
    for field, types in required.items():
        if field not in entry:
            return f" has no {field!r}; found {shown(sorted(entry))}"
        value = entry[field]
        if isinstance(value, float) and value.is_integer():
            value = entry[field] = int(value)
        if not isinstance(value, types) or isinstance(value, bool):
            kinds = types if isinstance(types, tuple) else (types,)
            names = " or ".join(each.__name__ for each in kinds)
            return f"[{field!r}] must be of type {names}, found {shown(value)}"
        if isinstance(value, int) and value not in _INT64:
            return f"[{field!r}] must be an integer of at most 64 bits, found {shown(value)}"
    return ""


def index_by_id(
    entries: Iterable[JsonObject], key: str, path: str | os.PathLike[str]
) -> dict[int | str, JsonObject]:
    """Return ``entries`` by their ``id``; ValueError if two share one."""
    indexed: dict[int | str, JsonObject] = {}
    for entry in entries:
        if entry["id"] in indexed:
            raise ValueError(f"{path}: id {shown(entry['id'])} occurs more than once in {key!r}.")
        indexed[entry["id"]] = entry
    return indexed


def _check_image(image: JsonObject, path: str | os.PathLike[str]) -> None:
    """Check size, captions, and that ``file_name`` stays inside its folder.

    Links that lie inside the folder are followed: its owner put them there, not the JSON.
    """
    name, where = image["file_name"], f"of image {shown(image['id'])}"
    as_posix = name.replace("\\", "/")  # also a separator, on some systems
    leads_out = posixpath.normpath(as_posix).split("/")[0] == ".."
    is_absolute = as_posix[:1] == "/" or os.path.splitdrive(name)[0] != ""
    if not name or "\0" in name or is_absolute or leads_out:
        raise ValueError(
            f"{path}: 'file_name' {where} must be a path inside the folder of the images, found "
            f"{shown(name)}."
        )
    if image["width"] <= 0 or image["height"] <= 0:
        raise ValueError(
            f"{path}: width and height {where} must be positive, found {image['width']} x "
            f"{image['height']}."
        )
    captions = image.get("captions", [])
    if not isinstance(captions, list) or not all(isinstance(each, str) for each in captions):
        raise ValueError(
            f"{path}: 'captions' {where} must be a list of strings, found {shown(captions)}."
        )


def get_box(
    annotation: Mapping[str, Any], path: str | os.PathLike[str]
) -> tuple[float, float, float, float]:
    """Return an annotation's ``bbox`` as floats; ValueError if it is not four numbers."""
    box = annotation["bbox"]
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        raise ValueError(
            f"{path}: 'bbox' of annotation {shown(annotation['id'])} must be four numbers "
            f"[x, y, width, height], found {shown(box)}."
        )
    x, y, width, height = map(float, box)
    return x, y, width, height


def check_annotation(annotation: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Check the fields of a box that may be missing.

    Raises:
        ValueError: ``iscrowd`` is not 0 or 1, or ``area`` is neither a finite number nor null.
    """
    crowd, area = annotation.get("iscrowd", 0), annotation.get("area")
    if crowd not in (0, 1):
        expected = f"'iscrowd' must be 0 or 1, found {shown(crowd)}"
    elif area is not None and not (_is_number(area) and math.isfinite(area)):
        expected = f"'area' must be a finite number, found {shown(area)}"
    else:
        return
    raise ValueError(f"{path}: annotation {shown(annotation['id'])}: {expected}.")


def _is_number(value: object) -> bool:
    """Whether ``value`` is a number that a float can hold; true and false are none."""
    return isinstance(value, float) or (type(value) is int and value in _INT64)


def shown(value: object) -> str:
    """Return ``repr(value)`` for a message, its middle left out where it is long."""
    text = repr(value)
    if len(text) <= _SHOWN_CHARACTERS:
        return text
    half = _SHOWN_CHARACTERS // 2
    return f"{text[:half]}...{text[-half:]} ({len(text):,} characters)"


def some(values: Iterable[object], most: int = _MAX_NAMED) -> str:
    """Return the first ``most`` of ``values`` for a message, and how many more there are."""
    listed = list(values)
    text = ", ".join(map(shown, listed[:most]))
    return f"{text} and {len(listed) - most:,} more" if len(listed) > most else text
