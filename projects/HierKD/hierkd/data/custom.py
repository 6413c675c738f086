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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from iopath.common.file_io import file_lock

from hierkd.data.check import Report, count_contents, short_line, warnings_of
from hierkd.data.coco import register_ovd_dataset
from hierkd.data.coco_json import FieldTypes, get_entries, read_annotations, read_coco_json, some
from hierkd.data.definitions import Definition, Half, TrainHalf, caption_of, read_definition
from hierkd.data.prepare import build_part, join_captions
from hierkd.data.splits import Category
from hierkd.files import cache_root, write_json_atomically

__all__ = [
    "PreparedHalf",
    "describe_datasets",
    "has_no_captions",
    "prepare_half",
    "register_definitions",
]

logger = logging.getLogger(__name__)

JsonObject = dict[str, Any]

_VERSION = 3  # of what the cache holds: raised when the same input gives other files
_STAMP = "stamp.json"
_LVIS_FIELDS = ("neg_category_ids", "not_exhaustive_category_ids")


@dataclass(frozen=True)
class PreparedHalf:
    """A half of a dataset after the split.

    Attributes:
        folder: In the cache.
        vocabularies: Part ("train_base", "val_novel", ...) -> its categories in id order, by the
            names that CLIP is asked for.
        report: What the source holds, see :func:`hierkd.data.check.count_contents`.
    """

    folder: Path
    vocabularies: Mapping[str, Sequence[Category]]
    report: Report


# ------------------------------------------------------------------------------ registration


def register_definitions(paths: Iterable[str]) -> list[Definition]:
    """Prepare and register the datasets of YAML files.

    Those of ``name: fruit`` are called ``fruit_train_base``, ``fruit_val_base``,
    ``fruit_val_novel`` and ``fruit_val_all``: the parts that the YAML has names for. Metadata, on
    top of :func:`register_ovd_dataset`'s: ``definition`` (path of the YAML), ``fingerprint``,
    ``declares_split``, ``detections_per_image`` (None = the config's), ``num_captions`` of training
    sets; ``federated`` (LVIS). A dataset whose files do not exist here (a
    deployed detector) is registered by its names, and fails when it is asked for.

    Args:
        paths: Of the YAMLs. One that does not exist is skipped with a warning.

    Returns:
        What they say.

    Raises:
        ValueError: A YAML or a file it names is wrong, or a name is taken.
    """
    definitions: dict[str, Definition] = {}
    for path in paths:
        if not Path(path).expanduser().is_file():
            logger.warning("DATASETS.DEFINITIONS: no file %r: its datasets are unknown", path)
            continue
        definition = read_definition(path)
        if definition.name in definitions:
            other = definitions[definition.name].path
            raise ValueError(f"{other} and {path} have the same 'name': {definition.name!r}")
        definitions[definition.name] = definition
        for kind, half in (("train", definition.train), ("val", definition.val)):
            if half is not None:
                _register_half(definition, kind, half)
    return list(definitions.values())


def _register_half(definition: Definition, kind: str, half: Half) -> None:
    """Register the parts of one half."""
    if not half.json_file.is_file():
        logger.warning("%s: %s.json: no file %s", definition.path, kind, half.json_file)
        groups = {"base": definition.base} if kind == "train" else definition.groups
        for group, names in groups.items():
            if names:
                spoken = [definition.spoken(name) for name in names]
                _register(definition, f"{kind}_{group}", half, half.json_file, "", spoken)
        return
    prepared = prepare_half(definition, kind, half)
    for part, vocabulary in prepared.vocabularies.items():
        metadata = _register(
            *(definition, part, half, prepared.folder / f"{part}.json", prepared.folder.name),
            [category.name for category in vocabulary],
            [category.id for category in vocabulary],
        )
        metadata.report = prepared.report
        if kind == "train":
            metadata.num_captions = prepared.report["num_captions"]


def _register(
    definition: Definition,
    part: str,
    half: Half,
    json_file: Path,
    fingerprint: str,
    vocabulary: Sequence[str],
    category_ids: Sequence[int] | None = None,
) -> Any:
    """Register one dataset anew, or leave one of the same fingerprint; return its metadata."""
    name = f"{definition.name}_{part}"
    if name in DatasetCatalog.list():
        known = MetadataCatalog.get(name)
        if known.get("definition") is None:
            raise ValueError(
                f"{definition.path}: dataset {name!r} is this project's own; choose another 'name'"
            )
        if (known.definition, known.fingerprint) == (str(definition.path), fingerprint):
            return known
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
        fingerprint=fingerprint,
        declares_split=definition.has_split,
        detections_per_image=definition.detections_per_image,
        federated=definition.lvis,
    )


def describe_datasets(names: Iterable[str]) -> list[str]:
    """What the datasets of YAML files among ``names`` hold, and what is odd about them.

    Returns:
        Lines for a log: one per half of a dataset, and one per finding.
    """
    lines = []
    for name in names:
        if name in DatasetCatalog.list() and (report := MetadataCatalog.get(name).get("report")):
            metadata = MetadataCatalog.get(name)
            half = "train" if metadata.get("num_captions") is not None else "val"
            lines.append(short_line(metadata.definition, half, report))
            lines += [f"  check {text}" for text in warnings_of(half, report)]
    return list(dict.fromkeys(lines))


def has_no_captions(names: Iterable[str]) -> bool:
    """Whether these training datasets all come from a YAML and none has a single caption."""
    counts = [
        MetadataCatalog.get(name).get("num_captions") if name in DatasetCatalog.list() else None
        for name in names
    ]
    return bool(counts) and all(count == 0 for count in counts)


# ------------------------------------------------------------------------------ preparation


def prepare_half(definition: Definition, kind: str, half: Half) -> PreparedHalf:
    """Apply the split to one half, unless the cache holds the result.

    The cache is ``$HIERKD_CACHE/datasets``, by default in ``~/.cache/hierkd``.

    Args:
        definition: The dataset.
        kind: "train" or "val".
        half: ``definition.train`` or ``definition.val``.

    Raises:
        FileNotFoundError: A file does not exist.
        ValueError: A file is wrong or lacks a category; or the cache cannot be written.
    """
    cache = cache_root() / "datasets"
    folder = cache / f"{definition.name}-{kind}-{_fingerprint(definition, kind, half)}"
    try:
        if not (folder / _STAMP).is_file():
            cache.mkdir(parents=True, exist_ok=True)
            with file_lock(str(folder)):  # the other processes wait for the first
                if not (folder / _STAMP).is_file():
                    for name, content in _build_half(definition, kind, half).items():
                        write_json_atomically(folder / name, content)
        stamp = json.loads((folder / _STAMP).read_text(encoding="utf-8"))
    except OSError as error:
        if isinstance(error, FileNotFoundError) and str(cache) not in str(error):
            raise
        raise ValueError(
            f"{definition.path}: cannot keep the prepared dataset in {cache}: {error}. The "
            "environment variable HIERKD_CACHE names another folder."
        ) from error
    vocabularies = {
        part: [Category(*pair) for pair in pairs] for part, pairs in stamp["vocabularies"].items()
    }
    return PreparedHalf(folder, vocabularies, stamp["report"])


def _fingerprint(definition: Definition, kind: str, half: Half) -> str:
    """Hash of everything that decides what a half becomes."""
    files = []
    for path in (half.json_file, half.captions_file if isinstance(half, TrainHalf) else None):
        if path is not None and path.is_file():
            status = path.stat()
            files.append([str(path.resolve()), status.st_size, status.st_mtime_ns])
    said = definition.model_dump(exclude={"train", "val"})
    recipe = [_VERSION, kind, half.model_dump(), said, files]
    return hashlib.sha256(json.dumps(recipe, default=str).encode()).hexdigest()[:24]


def _build_half(definition: Definition, kind: str, half: Half) -> dict[str, JsonObject]:
    """File name -> content of all parts of a half, and of the stamp, which is the last."""
    path = half.json_file
    logger.info("%s: preparing %s", definition.path, path)
    content = read_annotations(path, encoding="utf-8-sig")
    if definition.lvis:
        _check_federated(content, path)
    found = sorted(Category(each["id"], each["name"]) for each in content["categories"])
    category_of = {category.name: category for category in found}
    known = {*category_of, *definition.base, *definition.novel}
    _check_known(definition.rename, known, definition, path)
    groups = {"base": definition.base} if kind == "train" else definition.groups
    vocabularies, files = {}, {}
    for group, names in groups.items():
        wanted = _find(names or list(category_of), category_of, definition, path)
        part = build_part(content, wanted, path)
        if not definition.has_split:  # images without an object count as well
            part["images"] = content["images"]
        elif definition.lvis:
            part["images"] = _annotated_images(content, wanted)
        part["categories"] = [
            {**each, "name": definition.spoken(each["name"])} for each in part["categories"]
        ]
        if isinstance(half, TrainHalf):
            part = _add_captions(part, definition.caption_template, half, content)
        vocabularies[f"{kind}_{group}"] = [(c["id"], c["name"]) for c in part["categories"]]
        files[f"{kind}_{group}.json"] = part
    report = count_contents(content, {c.id: _kind(n, definition) for n, c in category_of.items()})
    if kind == "train":
        images = files["train_base.json"]["images"]
        report["images_with_captions"] = sum(bool(each.get("captions")) for each in images)
        report["num_captions"] = sum(len(each.get("captions", [])) for each in images)
    stamp = {"vocabularies": vocabularies, "report": report, "source": str(path)}
    return {**files, _STAMP: stamp}


def _kind(category: str, definition: Definition) -> str:
    if not definition.has_split:
        return "all"
    if category in definition.base:
        return "base"
    return "novel" if category in definition.novel else "ignored"


def _check_federated(content: JsonObject, path: Path) -> None:
    """Check the fields by which LVIS says what is annotated where."""
    lacking = [
        f"image {image['id']!r} has no list {field!r}"
        for image in content["images"]
        for field in _LVIS_FIELDS
        if not isinstance(image.get(field), list)
    ] + [
        f"category {category['name']!r} has no 'frequency' r, c or f"
        for category in content["categories"]
        if category.get("frequency") not in ("r", "c", "f")
    ]
    if lacking:
        raise ValueError(f"{path}: {lacking[0]}, but the YAML says format: lvis")


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
    if half.captions_file is not None:
        captions = _read_captions(half.captions_file, content)
        return join_captions(part, captions, half.captions_file)
    own = {each["id"]: each["captions"] for each in content["images"] if each.get("captions")}
    if not own and not half.make_captions:
        return part
    name_of = {each["id"]: each["name"] for each in part["categories"]}
    shown: dict[Any, dict[str, None]] = defaultdict(dict)  # in the order of the boxes
    for annotation in part["annotations"] if half.make_captions else ():
        shown[annotation["image_id"]][name_of[annotation["category_id"]]] = None
    made = {image_id: [caption_of(list(names), template)] for image_id, names in shown.items()}
    captions = {**made, **own}
    images = [{**each, "captions": captions.get(each["id"], [])} for each in part["images"]]
    return {**part, "images": images}


def _read_captions(path: Path, content: JsonObject) -> dict[Any, list[str]]:
    """Image id -> captions, whose ids must be of the type that the ids of the images have."""
    captions: dict[Any, list[str]] = defaultdict(list)
    fields: FieldTypes = {"image_id": type(content["images"][0]["id"]), "caption": str}
    for entry in get_entries(
        read_coco_json(path, encoding="utf-8-sig"), "annotations", fields, path
    ):
        if entry["caption"].strip():
            captions[entry["image_id"]].append(entry["caption"].strip())
    return captions
