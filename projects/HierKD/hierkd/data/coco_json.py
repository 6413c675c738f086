"""Reading files in COCO's JSON layout, with errors that say where a file is wrong."""

from __future__ import annotations

import json
import math
import os
import posixpath
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = [
    "FieldTypes",
    "check_annotation",
    "check_file_name",
    "get_box",
    "get_entries",
    "index_by_id",
    "read_coco_json",
    "shown",
]

JsonObject = dict[str, Any]
FieldTypes = Mapping[str, type | tuple[type, ...]]
"""Field name -> the type or types that its value must have."""

_SHOWN_CHARACTERS = 200  # of a value in a message [ours]
_INT64 = range(-(2**63), 2**63)  # what the arrays of ids and sizes hold


def read_coco_json(
    path: str | os.PathLike[str],
    *,
    missing_hint: str = "",
    object_hook: Callable[[JsonObject], JsonObject] | None = None,
) -> JsonObject:
    """Read a JSON file whose top level is an object.

    Args:
        path: The file.
        missing_hint: What to do when the file does not exist; appended to the error.
        object_hook: Passed to :func:`json.loads`; sees every object as soon as it is parsed, so
            that fields nobody needs can be dropped before they fill the memory.

    Returns:
        The parsed object.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not UTF-8, not JSON (the position is named), nested without end, or
            not an object.
    """
    path = Path(path)
    if not path.is_file():
        found = "is a folder, not a file" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"Annotation file {path} {found}. {missing_hint}".rstrip())
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a UTF-8 text file: {error}.") from error
    try:
        content = json.loads(text, object_hook=object_hook)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno} "
            f"(character {error.pos:,} of {len(text):,}). Was it downloaded or written completely?"
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; [[[[[[...
        raise ValueError(f"{path} is not a usable JSON file: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path}: expected a JSON object with 'images', 'annotations' and 'categories', "
            f"found a {type(content).__name__} at the top level."
        )
    return content


def get_entries(
    content: Mapping[str, Any],
    key: str,
    required: FieldTypes,
    path: str | os.PathLike[str],
) -> list[JsonObject]:
    """Return the list of objects ``content[key]`` after checking each one's fields.

    Args:
        content: A parsed COCO file.
        key: ``"images"``, ``"annotations"`` or ``"categories"``.
        required: Field name to the type or types that its value must have. True and false are
            no numbers, and an integer has at most 64 bits.
        path: The file, for messages.

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
        if not isinstance(entry, dict):
            raise ValueError(
                f"{path}: {key}[{index}] must be an object, found a {type(entry).__name__}."
            )
        for field, types in required.items():
            if field not in entry:
                raise ValueError(
                    f"{path}: {key}[{index}] has no {field!r}; found {shown(sorted(entry))}."
                )
            value = entry[field]
            if not isinstance(value, types) or isinstance(value, bool):
                names = types.__name__ if isinstance(types, type) else _join(types)
                raise ValueError(
                    f"{path}: {key}[{index}][{field!r}] must be of type {names}, "
                    f"found {shown(value)}."
                )
            if isinstance(value, int) and value not in _INT64:
                raise ValueError(
                    f"{path}: {key}[{index}][{field!r}] must be an integer of at most 64 bits, "
                    f"found {shown(value)}."
                )
    return entries


def shown(value: object) -> str:
    """Return ``repr(value)`` for a message, its middle left out where it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write out integers of thousands of digits
        text = f"a {type(value).__name__} that is too long to show"
    if len(text) <= _SHOWN_CHARACTERS:
        return text
    half = _SHOWN_CHARACTERS // 2
    return f"{text[:half]}...{text[-half:]} ({len(text):,} characters)"


def _join(types: Iterable[type]) -> str:
    """Return the names of ``types`` for a message."""
    return " or ".join(each.__name__ for each in types)


def index_by_id(
    entries: Iterable[JsonObject], key: str, path: str | os.PathLike[str]
) -> dict[int | str, JsonObject]:
    """Return ``entries`` by their ``id``.

    Raises:
        ValueError: Two entries share an id; it and the list's name ``key`` are named.
    """
    indexed: dict[int | str, JsonObject] = {}
    for entry in entries:
        if entry["id"] in indexed:
            raise ValueError(f"{path}: id {shown(entry['id'])} occurs more than once in {key!r}.")
        indexed[entry["id"]] = entry
    return indexed


def check_file_name(file_name: str, image_id: object, path: str | os.PathLike[str]) -> None:
    """Raise ValueError unless an image's ``file_name`` stays inside the folder of the images.

    It must be relative, and no ``..`` may lead out of the folder. Links that lie inside the folder
    are followed: they were put there by its owner, and not by the JSON.

    Args:
        file_name: As in the JSON.
        image_id: Of the image, for the message.
        path: The JSON, for the message.
    """
    as_posix = file_name.replace("\\", "/")  # also a separator, on some systems
    steps = posixpath.normpath(as_posix).split("/")
    drive = os.path.splitdrive(file_name)[0]
    if not file_name or "\0" in file_name or as_posix[:1] == "/" or drive or steps[0] == "..":
        raise ValueError(
            f"{path}: 'file_name' of image {shown(image_id)} must be a path inside the folder of "
            f"the images, found {shown(file_name)}."
        )


def get_box(
    annotation: Mapping[str, Any], path: str | os.PathLike[str]
) -> tuple[float, float, float, float]:
    """Return an annotation's ``bbox`` as floats; integers beyond all floats become infinite.

    Raises:
        ValueError: It is not four numbers.
    """
    box = annotation["bbox"]
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        raise ValueError(
            f"{path}: 'bbox' of annotation {shown(annotation['id'])} must be four numbers "
            f"[x, y, width, height], found {shown(box)}."
        )
    x, y, width, height = (_as_float(value) for value in box)
    return x, y, width, height


def check_annotation(annotation: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Check the fields of a box that may be missing: ``iscrowd`` and ``area``.

    Raises:
        ValueError: ``iscrowd`` is not 0 or 1, or ``area`` is not a finite number. Null counts as
            missing for ``area``.
    """
    crowd, area = annotation.get("iscrowd", 0), annotation.get("area")
    if not isinstance(crowd, int) or crowd not in (0, 1):
        raise ValueError(
            f"{path}: 'iscrowd' of annotation {shown(annotation['id'])} must be 0 or 1, "
            f"found {shown(crowd)}."
        )
    if area is not None and not (_is_number(area) and math.isfinite(_as_float(area))):
        raise ValueError(
            f"{path}: 'area' of annotation {shown(annotation['id'])} must be a finite number, "
            f"found {shown(area)}."
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
