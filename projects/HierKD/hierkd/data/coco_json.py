"""Reading and writing files in COCO's JSON layout, with errors that say where a file is wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from hierkd.atomic_files import replacing

__all__ = ["FieldTypes", "get_entries", "index_by_id", "read_coco_json", "write_json_atomically"]

JsonObject = dict[str, Any]
FieldTypes = Mapping[str, type | tuple[type, ...]]
"""Field name -> the type or types that its value must have."""


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
        ValueError: The file is not UTF-8, not JSON (the position is named), or not an object.
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
        required: Field name to the type or types that its value must have.
        path: The file, for messages.

    Raises:
        ValueError: ``key`` is missing or not a list, or an entry is not an object, lacks a field
            or has a field of another type. The first such entry is named.
    """
    if key not in content:
        raise ValueError(f"{path}: key {key!r} is missing; found {sorted(content)}.")
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
                raise ValueError(f"{path}: {key}[{index}] has no {field!r}; found {sorted(entry)}.")
            if not isinstance(entry[field], types):
                names = types.__name__ if isinstance(types, type) else _join(types)
                raise ValueError(
                    f"{path}: {key}[{index}][{field!r}] must be of type {names}, "
                    f"found {entry[field]!r}."
                )
    return entries


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
            raise ValueError(f"{path}: id {entry['id']!r} occurs more than once in {key!r}.")
        indexed[entry["id"]] = entry
    return indexed


def write_json_atomically(path: str | os.PathLike[str], content: object) -> bool:
    """Write ``content`` as compact JSON so that ``path`` holds the old or the new file, whole.

    Missing parent folders are made. An interrupted call leaves ``path`` as it was, and so does one
    that has nothing new to say.

    Returns:
        Whether the file is new or has changed.
    """
    data = (json.dumps(content, separators=(",", ":")) + "\n").encode()
    path = Path(path)
    if path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data:
        return False
    with replacing(path) as temporary:
        temporary.write_bytes(data)
    return True
