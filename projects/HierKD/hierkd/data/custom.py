"""Datasets of your own: from a YAML and plain COCO files to registered datasets.

The split is applied once, into a cache folder named after everything that decides the result (the
YAML's content, and path, size and time of each file), so that the loader, the evaluator and every
process read the same files, and an old result is never taken for a new one. A folder is made beside
its place and then moved there, so it is whole or not there at all.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import logging
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from iopath.common.file_io import file_lock

from hierkd.data.check import Report, count_contents, short_line, warnings_of
from hierkd.data.coco import register_ovd_dataset
from hierkd.data.coco_json import FieldTypes, get_entries, index_by_id, read_coco_json
from hierkd.data.definitions import Definition, Half, caption_of, read_definition
from hierkd.data.prepare import build_part, join_captions
from hierkd.data.splits import Category
from hierkd.files import cache_root
from hierkd.teachers.texts import as_clip_reads

__all__ = [
    "PreparedHalf",
    "describe_datasets",
    "has_no_captions",
    "prepare_half",
    "register_definitions",
]

logger = logging.getLogger(__name__)

JsonObject = dict[str, Any]

_VERSION = 2  # of what the cache holds: raised when the same input gives other files
_STAMP = "stamp.json"
_MAX_NAMED = 5

_IMAGES: FieldTypes = {"id": (int, str), "height": int, "width": int}
_ANNOTATIONS: FieldTypes = {"image_id": (int, str), "category_id": int, "bbox": list}
_CATEGORIES: FieldTypes = {"id": int, "name": str}
_CAPTIONS: FieldTypes = {"image_id": (int, str), "caption": str}
_LVIS_FIELDS = ("neg_category_ids", "not_exhaustive_category_ids")


@dataclasses.dataclass(frozen=True)
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

    def json_file(self, part: str) -> Path:
        """The annotations of a part."""
        return self.folder / f"{part}.json"


def cache_folder() -> Path:
    """Where prepared datasets lie: ``$HIERKD_CACHE/datasets``; ~/.cache/hierkd by default."""
    return cache_root() / "datasets"


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
    if not half.json.is_file():
        logger.warning("%s: %s.json: no file %s", definition.path, kind, half.json)
        groups = {"base": definition.base} if kind == "train" else definition.groups
        for group, names in groups.items():
            if names:
                spoken = [definition.spoken(name) for name in names]
                _register(definition, f"{kind}_{group}", half, half.json, "", spoken)
        return
    prepared = prepare_half(definition, kind, half)
    for part, vocabulary in prepared.vocabularies.items():
        metadata = _register(
            *(definition, part, half, prepared.json_file(part), prepared.folder.name),
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
    base, novel = (
        [definition.spoken(each) for each in names] for names in (definition.base, definition.novel)
    )
    register_ovd_dataset(
        name,
        json_file=str(json_file),
        image_root=str(half.images),
        vocabulary=vocabulary,
        base_classes=base,
        novel_classes=novel if definition.has_split else vocabulary,
        category_ids=category_ids,
        missing_hint=f"{definition.path} names it.",
    )
    metadata = MetadataCatalog.get(name)
    metadata.definition, metadata.fingerprint = str(definition.path), fingerprint
    metadata.declares_split = definition.has_split
    metadata.detections_per_image = definition.detections_per_image
    metadata.federated = definition.lvis
    return metadata


def describe_datasets(names: Iterable[str]) -> list[str]:
    """What the datasets of YAML files among ``names`` hold, and what is odd about them.

    Returns:
        Lines for a log: one per half of a dataset, and one per finding.

    Raises:
        ValueError: A name is not registered.
    """
    lines = []
    for name in names:
        if name not in DatasetCatalog.list():
            ours = [n for n in DatasetCatalog.list() if MetadataCatalog.get(n).get("definition")]
            raise ValueError(f"Unknown dataset {name!r}; DATASETS.DEFINITIONS has {sorted(ours)}.")
        metadata = MetadataCatalog.get(name)
        if metadata.get("report") is None:
            continue
        half = "train" if metadata.get("num_captions") is not None else "val"
        lines.append(short_line(metadata.definition, half, metadata.report))
        lines += [f"  check {text}" for text in warnings_of(half, metadata.report)]
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

    Args:
        definition: The dataset.
        kind: "train" or "val".
        half: ``definition.train`` or ``definition.val``.

    Raises:
        FileNotFoundError: A file does not exist.
        ValueError: A file is wrong or lacks a category; or the cache cannot be written.
    """
    folder = cache_folder() / f"{definition.name}-{kind}-{_fingerprint(definition, kind, half)}"
    try:
        if not (folder / _STAMP).is_file():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with file_lock(str(folder)):  # the other processes wait for the first
                if not (folder / _STAMP).is_file():
                    _write_half(folder, _build_half(definition, kind, half))
        stamp = json.loads((folder / _STAMP).read_text(encoding="utf-8"))
    except OSError as error:
        if isinstance(error, FileNotFoundError) and str(folder.parent) not in str(error):
            raise
        raise ValueError(
            f"{definition.path}: cannot keep the prepared dataset in {folder.parent}: {error}. The "
            "environment variable HIERKD_CACHE names another folder."
        ) from error
    vocabularies = {
        part: [Category(*pair) for pair in pairs] for part, pairs in stamp["vocabularies"].items()
    }
    return PreparedHalf(folder, vocabularies, stamp["report"])


def _fingerprint(definition: Definition, kind: str, half: Half) -> str:
    """Hash of everything that decides what a half becomes."""
    files = []
    for path in (half.json, half.captions):
        if path is not None and path.is_file():
            status = path.stat()
            files.append([str(path.resolve()), status.st_size, status.st_mtime_ns])
    said = dataclasses.asdict(dataclasses.replace(definition, train=None, val=None, path=Path()))
    recipe = [_VERSION, kind, dataclasses.astuple(half), said, files]
    return hashlib.sha256(json.dumps(recipe, default=str).encode()).hexdigest()[:24]


def _write_half(folder: Path, files: Mapping[str, JsonObject]) -> None:
    """Write the files of a half into a folder that appears at once."""
    making = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for name, content in files.items():
            (making / name).write_text(json.dumps(content, separators=(",", ":")), "utf-8")
        making.chmod(0o755)  # mkdtemp's is for its owner alone
        if folder.exists():  # without a stamp: not from here, but in the way
            shutil.rmtree(folder)
        making.rename(folder)
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _build_half(definition: Definition, kind: str, half: Half) -> dict[str, JsonObject]:
    """File name -> content of all parts of a half, and of the stamp."""
    logger.info("%s: preparing %s", definition.path, half.json)
    content = _read(half.json, lvis=definition.lvis)
    category_of = _categories_by_name(content["categories"], half.json)
    named = {*category_of, *definition.base, *definition.novel}
    if unknown := [name for name in definition.rename if name not in named]:
        raise _unknown_names(unknown, category_of, definition, half.json, "renames")
    groups = {"base": definition.base} if kind == "train" else definition.groups
    captions = _read_captions(half, content) if kind == "train" else {}
    vocabularies, files = {}, {}
    for group, names in groups.items():
        wanted = _find(names or tuple(category_of), category_of, definition, half.json)
        part = build_part(content, wanted, half.json)
        if not definition.has_split:  # images without an object count as well
            part = {**part, "images": content["images"]}
        elif definition.lvis:
            part = {**part, "images": _annotated_images(content, wanted)}
        if kind == "train":
            part = _add_captions(part, captions, definition, half)
        part = _rename(part, definition, content)
        vocabularies[f"{kind}_{group}"] = [
            [category["id"], category["name"]] for category in part["categories"]
        ]
        files[f"{kind}_{group}.json"] = part
    kind_of = {category.id: _kind(name, definition) for name, category in category_of.items()}
    report = count_contents(content, kind_of)
    if kind == "train":
        images = files["train_base.json"]["images"]
        report["images_used"] = len(images)
        report["images_with_captions"] = sum(bool(each.get("captions")) for each in images)
        report["num_captions"] = sum(len(each.get("captions", [])) for each in images)
    stamp = {"vocabularies": vocabularies, "report": report, "source": str(half.json)}
    return {**files, _STAMP: stamp}


def _kind(category: str, definition: Definition) -> str:
    if not definition.has_split:
        return "all"
    if category in definition.base:
        return "base"
    return "novel" if category in definition.novel else "ignored"


def _read(path: Path, *, lvis: bool) -> JsonObject:
    """Read annotations and check what the split relies on; the loader checks the rest."""
    content = read_coco_json(path)
    images = get_entries(content, "images", _IMAGES, path)
    get_entries(content, "annotations", _ANNOTATIONS, path)
    index_by_id(get_entries(content, "categories", _CATEGORIES, path), "categories", path)
    for image in images:
        if "file_name" not in image and isinstance(image.get("coco_url"), str):
            # LVIS v1 names a picture by its address on COCO's server: .../val2017/000000000139.jpg
            image["file_name"] = "/".join(image["coco_url"].split("/")[-2:])
        for field in _LVIS_FIELDS if lvis else ():
            if not isinstance(image.get(field), list):
                raise ValueError(
                    f"{path}: image {image['id']!r} has no list {field!r}, but the YAML says "
                    "format: lvis"
                )
    for category in content["categories"] if lvis else ():
        if category.get("frequency") not in ("r", "c", "f"):
            raise ValueError(
                f"{path}: 'frequency' of category {category['name']!r} must be r, c or f, found "
                f"{category.get('frequency')!r}"
            )
    return content


def _categories_by_name(categories: Sequence[JsonObject], path: Path) -> dict[str, Category]:
    """The categories in id order, by name; ValueError if two share one."""
    ids = defaultdict(list)
    for category in categories:
        ids[category["name"]].append(category["id"])
    for name, found in ids.items():
        if len(found) > 1:
            raise ValueError(f"{path}: categories {sorted(found)} are all called {name!r}")
    found = sorted(Category(category["id"], category["name"]) for category in categories)
    return {category.name: category for category in found}


def _find(
    names: Sequence[str], category_of: Mapping[str, Category], definition: Definition, path: Path
) -> list[Category]:
    """The categories called ``names``, in id order."""
    missing = [name for name in names if name not in category_of]
    if missing:
        raise _unknown_names(missing, category_of, definition, path, "names")
    wanted = sorted(category_of[name] for name in names)
    spoken: dict[str, str] = {}
    for category in wanted:
        read = as_clip_reads(definition.spoken(category.name))
        other = spoken.setdefault(read, category.name)
        if other != category.name:
            raise ValueError(
                f"{definition.path}: categories {other!r} and {category.name!r} of {path} are both "
                f"read as {read!r}; 'rename' one of them"
            )
    return wanted


def _unknown_names(
    names: Sequence[str],
    category_of: Mapping[str, Category],
    definition: Definition,
    path: Path,
    verb: str,
) -> ValueError:
    """The error for names in a YAML that its annotations do not have."""
    close = difflib.get_close_matches(names[0], category_of, 1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return ValueError(
        f"{path}: {definition.path} {verb} {list(names[:_MAX_NAMED])}, which 'categories' does not "
        f"have{hint} It has {len(category_of)}: {list(category_of)[:20]}"
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


def _rename(part: JsonObject, definition: Definition, content: JsonObject) -> JsonObject:
    """Call categories as CLIP is asked for them; keep what federated evaluation needs."""
    categories = [
        {**each, "name": definition.spoken(each["name"])}
        for each in sorted(part["categories"], key=lambda each: int(each["id"]))
    ]
    if not definition.lvis:
        return {**part, "categories": categories}
    known = {image["id"]: image for image in content["images"]}
    images = [
        {**image, **{field: known[image["id"]][field] for field in (*_LVIS_FIELDS, "file_name")}}
        for image in part["images"]
    ]
    return {**part, "categories": categories, "images": images}


def _read_captions(half: Half, content: JsonObject) -> dict[Any, list[str]]:
    """Image id -> captions, from the captions file or else from the images themselves."""
    if half.captions is None:
        return {each["id"]: each["captions"] for each in content["images"] if "captions" in each}
    captions: dict[Any, list[str]] = defaultdict(list)
    entries = get_entries(read_coco_json(half.captions), "annotations", _CAPTIONS, half.captions)
    for entry in entries:
        if entry["caption"].strip():
            captions[entry["image_id"]].append(entry["caption"].strip())
    return captions


def _add_captions(
    part: JsonObject, captions: dict[Any, list[str]], definition: Definition, half: Half
) -> JsonObject:
    """Give training images their captions, or captions made of their base classes' names."""
    if half.captions is not None:
        part = join_captions(part, captions, half.captions)
    elif captions or half.make_captions:
        images = [{**each, "captions": captions.get(each["id"], [])} for each in part["images"]]
        part = {**part, "images": images}
    if not half.make_captions:
        return part
    name_of = {each["id"]: definition.spoken(each["name"]) for each in part["categories"]}
    shown: dict[Any, dict[str, None]] = defaultdict(dict)  # in the order of the boxes
    for annotation in part["annotations"]:
        shown[annotation["image_id"]][name_of[annotation["category_id"]]] = None
    images = [
        image
        if image["captions"]
        else {
            **image,
            "captions": [caption_of(list(shown[image["id"]]), definition.caption_template)],
        }
        for image in part["images"]
    ]
    return {**part, "images": images}
