"""Datasets of your own: from a YAML and plain COCO files to registered datasets.

The split is applied once, into a cache folder named after everything that decides the result (the
YAML's content, and path, size and time of each file), so that the loader, the evaluator and every
process read the same files, and an old result is never taken for a new one. The stamp is written
last: a folder without one is not finished.
"""

from __future__ import annotations

import hashlib
import json
import logging
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from detectron2.data import DatasetCatalog, MetadataCatalog
from iopath.common.file_io import file_lock

from hierkd.data.check import count_contents, findings_of, short_line
from hierkd.data.coco import images_without_caption, register_ovd_dataset
from hierkd.data.coco_json import (
    FieldTypes,
    get_entries,
    read_annotations,
    read_coco_json,
    shown,
    some,
)
from hierkd.data.definitions import Definition, Half, TrainHalf, caption_of, read_definition
from hierkd.data.prepare import build_part, join_captions
from hierkd.data.splits import Category
from hierkd.files import cache_root, write_json_atomically

__all__ = ["describe_datasets", "has_no_captions", "register_definitions"]

logger = logging.getLogger(__name__)

JsonObject = dict[str, Any]

_VERSION = 5  # of what the cache holds: raised when the same input gives other files
_STAMP = "stamp.json"
_LVIS_FIELDS = ("neg_category_ids", "not_exhaustive_category_ids")


def register_definitions(paths: Iterable[str], *, keep_empty: bool = False) -> None:
    """Prepare and register the datasets of YAML files.

    Those of ``name: fruit`` are called ``fruit_train_base``, ``fruit_val_base``,
    ``fruit_val_novel`` and ``fruit_val_all``: the parts that the YAML has names for. Metadata, on
    top of :func:`register_ovd_dataset`'s: ``definition`` (path of the YAML), ``declares_split``,
    ``detections_per_image`` (None = the config's), ``federated`` (LVIS) and ``report`` (of
    :func:`hierkd.data.check.count_contents`). A dataset whose files do not exist here (a deployed
    detector) is registered by its names, and fails when it is asked for.

    Args:
        paths: Of the YAMLs. One that does not exist is skipped with a warning.
        keep_empty: Whether a training set holds pictures without a box of a base class, too:
            detectron2's ``DATALOADER.FILTER_EMPTY_ANNOTATIONS`` decides what becomes of them.

    Raises:
        ValueError: A YAML or a file it names is wrong, or a name is taken.
    """
    known: dict[str, Path] = {}
    for path in paths:
        if not Path(path).expanduser().is_file():
            logger.warning("DATASETS.DEFINITIONS: no file %r: its datasets are unknown", path)
            continue
        definition = read_definition(path)
        if other := known.get(definition.name):
            raise ValueError(f"{other} and {path} have the same 'name': {definition.name!r}")
        known[definition.name] = definition.path
        if definition.train is not None:
            _register_half(definition, "train", definition.train, keep_empty)
        if definition.val is not None:
            _register_half(definition, "val", definition.val)


def _register_half(definition: Definition, kind: str, half: Half, keep_empty: bool = False) -> None:
    """Register the parts of one half."""
    if half.json_file.is_file():
        folder, stamp = _prepare_half(definition, kind, half, keep_empty)
        for part, categories in stamp["vocabularies"].items():
            ids, vocabulary = zip(*categories, strict=True)
            metadata = _register(definition, part, half, folder / f"{part}.json", vocabulary, ids)
            metadata.report = stamp["report"]
            metadata.source = str(half.json_file)
            if part in stamp["empty"]:
                DatasetCatalog.remove(metadata.name)
                DatasetCatalog.register(metadata.name, partial(_refuse, stamp["empty"][part]))
                metadata.empty = True
        return
    logger.warning("%s: %s.json: no file %s", definition.path, kind, half.json_file)
    for part, names in definition.parts(kind).items():
        if names:
            _register(definition, part, half, half.json_file, list(map(definition.spoken, names)))


def _refuse(message: str) -> NoReturn:
    raise ValueError(message)


def _register(
    definition: Definition,
    part: str,
    half: Half,
    json_file: Path,
    vocabulary: Sequence[str],
    category_ids: Sequence[int] | None = None,
) -> Any:
    """Register one dataset anew; return its metadata."""
    name = f"{definition.name}_{part}"
    if name in DatasetCatalog.list():
        if MetadataCatalog.get(name).get("definition") is None:
            raise ValueError(
                f"{definition.path}: dataset {name!r} is this project's own; choose another 'name'"
            )
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    novel = [definition.spoken(each) for each in definition.novel]
    register_ovd_dataset(
        name,
        json_file=str(json_file),
        image_root=str(half.images),
        vocabulary=vocabulary,
        base_classes=[definition.spoken(each) for each in definition.base],
        novel_classes=novel if definition.has_split else vocabulary,
        category_ids=category_ids,
        missing_hint=f"{definition.path} names it.",
    )
    return MetadataCatalog.get(name).set(
        definition=str(definition.path),
        declares_split=definition.has_split,
        detections_per_image=definition.detections_per_image,
        federated=definition.lvis,
    )


def describe_datasets(names: Iterable[str]) -> list[str]:
    """Lines for a log: what the datasets of YAML files among ``names`` hold, and what is odd."""
    lines = []
    for metadata in map(MetadataCatalog.get, names):
        if report := metadata.get("report"):
            half = "train" if "num_captions" in report else "val"
            lines.append(short_line(metadata.definition, half, report))
            lines += [f"  check {text}" for text in findings_of(half, report)]
    return list(dict.fromkeys(lines))


def has_no_captions(names: Iterable[str]) -> bool:
    """Whether these training datasets all come from a YAML and none has a single caption."""
    reports = [MetadataCatalog.get(name).get("report", {}) for name in names]
    return bool(reports) and all(report.get("num_captions") == 0 for report in reports)


# ------------------------------------------------------------------------------ preparation


def _prepare_half(
    definition: Definition, kind: str, half: Half, keep_empty: bool
) -> tuple[Path, JsonObject]:
    """Apply the split to one half, unless the cache holds the result.

    Returns:
        A folder, and its stamp: ``vocabularies``, part -> (id, name that CLIP is asked for) of its
        categories in id order, and ``report``.
    """
    cache = cache_root() / "datasets"
    name = f"{definition.name}-{kind}{'-empty' * keep_empty}"
    folder = cache / f"{name}-{_fingerprint(definition, kind, half)}"
    try:
        if not (folder / _STAMP).is_file():
            cache.mkdir(parents=True, exist_ok=True)
            with file_lock(str(folder)):  # the other processes wait for the first
                if not (folder / _STAMP).is_file():
                    files = _build_half(definition, kind, half, keep_empty)
                    for file, content in files.items():
                        write_json_atomically(folder / file, content)
        return folder, json.loads((folder / _STAMP).read_text(encoding="utf-8"))
    except OSError as error:
        if isinstance(error, FileNotFoundError) and str(cache) not in str(error):
            raise
        raise ValueError(
            f"{definition.path}: cannot keep the prepared dataset in {cache}: {error}. The "
            "environment variable HIERKD_CACHE names another folder."
        ) from error


def _fingerprint(definition: Definition, kind: str, half: Half) -> str:
    """Hash of everything that decides what a half becomes."""
    files = []
    for path in (half.json_file, getattr(half, "captions", None)):
        if path is not None and path.is_file():
            status = path.stat()
            files.append([str(path.resolve()), status.st_size, status.st_mtime_ns])
    said = definition.model_dump(exclude={"train", "val"})
    recipe = [_VERSION, kind, half.model_dump(), said, files]
    return hashlib.sha256(json.dumps(recipe, default=str).encode()).hexdigest()[:24]


def _build_half(
    definition: Definition, kind: str, half: Half, keep_empty: bool
) -> dict[str, JsonObject]:
    """File name -> content of all parts of a half, and of the stamp, which is the last."""
    path = half.json_file
    logger.info("%s: preparing %s", definition.path, path)
    content = read_annotations(path)
    if definition.lvis:  # it says what is annotated where
        get_entries(content, "images", dict.fromkeys(_LVIS_FIELDS, list), path)
        for each in get_entries(content, "categories", {"frequency": str}, path):
            if each["frequency"] not in ("r", "c", "f"):
                raise ValueError(
                    f"{path}: category {shown(each['name'])} has no 'frequency' r, c or f"
                )
    found = sorted(Category(each["id"], each["name"]) for each in content["categories"])
    category_of = {category.name: category for category in found}
    known = {*category_of, *definition.base, *definition.novel}
    _check_known(definition.rename, known, definition, path)
    groups = set() if definition.has_split else _grouping(content)
    everything = [name for name in category_of if name not in groups]
    boxed = {each["category_id"] for each in content["annotations"]}
    vocabularies, files, empty = {}, {}, {}
    for name, categories in definition.parts(kind).items():
        wanted = _find(categories or everything, category_of, definition, path)
        if kind == "val" and boxed and not boxed.intersection(each.id for each in wanted):
            spoken = [definition.spoken(each.name) for each in wanted]
            vocabularies[name] = list(zip([each.id for each in wanted], spoken, strict=True))
            empty[name] = (
                f"{path}: no image has a box of {some(categories)}: {definition.name}_{name} of "
                f"{definition.path} cannot be evaluated. Add pictures that show them, or leave it "
                "out of DATASETS.TEST."
            )
            continue
        part = build_part(content, wanted, path)
        if keep_empty or not definition.has_split:  # images without an object count as well
            part["images"] = content["images"]
        elif definition.lvis:
            part["images"] = _annotated_images(content, wanted)
        part["categories"] = [
            {**each, "name": definition.spoken(each["name"])} for each in part["categories"]
        ]
        if isinstance(half, TrainHalf):
            part = _add_captions(part, definition.caption_template, half, content)
        vocabularies[name] = [(each["id"], each["name"]) for each in part["categories"]]
        files[f"{name}.json"] = part
    kinds = {c.id: _kind(n, definition, groups) for n, c in category_of.items()}
    report = count_contents(content, kinds, kind, path)
    if kind == "train":
        images = files["train_base.json"]["images"]
        captions = [each.get("captions", []) for each in images]
        report["images_with_captions"] = sum(map(bool, captions))
        report["num_captions"] = sum(map(len, captions))
        if any(captions) and (silent := images_without_caption(images)):
            names = [{"file": str(path), "where": "images", "value": name} for name in silent[:2]]
            report["findings"]["no_caption"] = {"count": len(silent), "examples": names}
    return {**files, _STAMP: {"vocabularies": vocabularies, "report": report, "empty": empty}}


def _grouping(content: JsonObject) -> set[str]:
    """The category without a box that is the supercategory of all others (Roboflow's id 0)."""
    boxed = {each["category_id"] for each in content["annotations"]}
    return {
        group["name"]
        for group in content["categories"]
        if group["id"] not in boxed and len(content["categories"]) > 1
        if all(c is group or c.get("supercategory") == group["name"] for c in content["categories"])
        if group.get("supercategory") != group["name"]
    }


def _kind(category: str, definition: Definition, groups: set[str]) -> str:
    if category in groups:
        return "grouping"
    if not definition.has_split:
        return "all"
    if category in definition.base:
        return "base"
    return "novel" if category in definition.novel else "ignored"


def _find(
    names: Sequence[str], category_of: Mapping[str, Category], definition: Definition, path: Path
) -> list[Category]:
    """The categories called ``names``, in id order; no two may be one name to CLIP."""
    _check_known(names, category_of, definition, path)
    wanted = sorted(category_of[name] for name in names)
    first: dict[str, str] = {}
    for category in wanted:
        spoken = unicodedata.normalize("NFC", definition.spoken(category.name)).lower()
        read = " ".join(spoken.split())  # CLIP sees no capitals and no number of blanks
        other = first.setdefault(read, category.name)
        if other != category.name:
            raise ValueError(
                f"{definition.path}: categories {other!r} and {category.name!r} of {path} are both "
                f"read as {read!r}; 'rename' one of them"
            )
    return wanted


def _check_known(
    names: Iterable[str], known: Iterable[str], definition: Definition, path: Path
) -> None:
    """Raise ValueError if the YAML has names that its annotations do not have."""
    known = list(known)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"{path}: 'categories' does not have {some(unknown)}, which {definition.path} names; "
            f"it has {some(known, 20)}"
        )


def _annotated_images(content: JsonObject, categories: Sequence[Category]) -> list[JsonObject]:
    """The images of LVIS that are annotated with one of ``categories``, be it as absent.

    In those without a box every detection of an absent class counts as wrong.
    """
    wanted = {category.id for category in categories}
    boxed = {box["image_id"] for box in content["annotations"] if box["category_id"] in wanted}
    return [
        image
        for image in content["images"]
        if image["id"] in boxed or any(wanted.intersection(image[field]) for field in _LVIS_FIELDS)
    ]


def _add_captions(
    part: JsonObject, template: str, half: TrainHalf, content: JsonObject
) -> JsonObject:
    """Give training images their captions, or captions made of their base classes' names."""
    if half.captions is not None and not half.make_captions:
        return join_captions(part, _read_captions(half, content), half.captions)
    captions = {each["id"]: each["captions"] for each in content["images"] if each.get("captions")}
    if half.make_captions:
        name_of = {each["id"]: each["name"] for each in part["categories"]}
        names: dict[Any, dict[str, None]] = defaultdict(dict)  # in the order of the boxes
        for box in part["annotations"]:
            names[box["image_id"]][name_of[box["category_id"]]] = None
        captions = {
            key: [caption_of(list(each), template)] for key, each in names.items()
        } | captions
    if not captions:
        return part
    images = [{**each, "captions": captions.get(each["id"], [])} for each in part["images"]]
    return {**part, "images": images}


def _read_captions(half: TrainHalf, content: JsonObject) -> dict[Any, list[str]]:
    """Image id -> captions, whose ids must be of the type that the ids of the images have."""
    path: Any = half.captions
    captions: dict[Any, list[str]] = defaultdict(list)
    fields: FieldTypes = {"image_id": (int, str), "caption": str}
    known = content["images"][0]["id"]
    for index, entry in enumerate(get_entries(read_coco_json(path), "annotations", fields, path)):
        if type(entry["image_id"]) is not type(known):
            raise ValueError(
                f"{path}: annotations[{index}]['image_id'] is {shown(entry['image_id'])}, but "
                f"{half.json_file} has ids of another type, such as {shown(known)}."
            )
        if entry["caption"].strip():
            captions[entry["image_id"]].append(entry["caption"].strip())
    return captions
