"""Open-vocabulary detection datasets in COCO's JSON layout, for detectron2's catalogs (§4.1).

A dataset is a JSON file, a folder of images and three lists of names: its *vocabulary* (the
categories of the file, in id order; the class index used everywhere else is the position in it)
and the *base* and *novel* names of its split.

detectron2's ``load_coco_json`` leaves out boxes whose mask has fewer than three points.
"""

from __future__ import annotations

import logging
import math
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from hierkd.data.coco_json import get_box, read_annotations, shown, some
from hierkd.data.splits import COCO_2014, COCO_2017, Category

__all__ = [
    "check_captions",
    "check_datasets",
    "check_registered",
    "check_training_sets",
    "clip_box",
    "datasets_root",
    "images_without_caption",
    "load_ovd_json",
    "register_coco_ovd",
    "register_ovd_dataset",
]

DatasetDict = dict[str, Any]

_LOGGER = logging.getLogger(__name__)

# COCO rounds coordinates to 0.01 px, so x + w may pass the image's edge by that much. Such boxes
# are clipped like any other but not counted as reaching outside [ours].
_ROUNDING_PX = 0.02


def datasets_root() -> str:
    """Return the folder that holds all datasets: ``$DETECTRON2_DATASETS``, else ``datasets``."""
    return os.getenv("DETECTRON2_DATASETS", "datasets")


def register_ovd_dataset(
    name: str,
    *,
    json_file: str,
    image_root: str,
    vocabulary: Sequence[str],
    base_classes: Sequence[str],
    novel_classes: Sequence[str],
    category_ids: Sequence[int] | None = None,
    missing_hint: str = "",
) -> None:
    """Register a dataset with detectron2's catalogs; nothing is read before it is asked for.

    Args:
        name: In both catalogs.
        json_file: Annotations in COCO's layout; training files also carry ``captions``.
        image_root: Folder that ``file_name`` in the JSON is relative to.
        vocabulary: Names of the file's categories in category id order.
        base_classes: Names with boxes in training, of the whole split.
        novel_classes: Names without boxes in training, of the whole split.
        category_ids: The ids of ``vocabulary`` in the file, ascending. Without them
            ``thing_dataset_id_to_contiguous_id`` is set when the file is first loaded.
        missing_hint: How to obtain the files, for the error when one does not exist.

    Raises:
        ValueError: A name is both base and novel, or one of the vocabulary is neither.
    """
    base, novel = set(base_classes), set(novel_classes)
    problems = {
        "both base and novel": base & novel,
        "neither base nor novel": set(vocabulary) - base - novel,
    }
    for problem, names in problems.items():
        if names:
            raise ValueError(f"Dataset {name!r}: {problem}: {some(sorted(names))}.")
    loader = partial(
        load_ovd_json,
        json_file,
        image_root,
        vocabulary,
        category_ids=category_ids,
        missing_hint=missing_hint,
        dataset_name=name,
    )
    DatasetCatalog.register(name, loader)
    metadata = MetadataCatalog.get(name).set(
        json_file=json_file,
        image_root=image_root,
        evaluator_type="split_coco",
        thing_classes=list(vocabulary),
        base_classes=list(base_classes),
        novel_classes=list(novel_classes),
    )
    if category_ids is not None:
        positions = {each: index for index, each in enumerate(category_ids)}
        metadata.thing_dataset_id_to_contiguous_id = positions


def load_ovd_json(
    json_file: str,
    image_root: str,
    vocabulary: Sequence[str],
    *,
    category_ids: Sequence[int] | None = None,
    missing_hint: str = "",
    dataset_name: str | None = None,
) -> list[DatasetDict]:
    """Load and check a detection dataset in COCO's JSON layout.

    Boxes are clipped to their image; boxes without area, with a non-finite number or wholly
    outside their image are dropped. One log line with the file's name counts them.

    Args: as of :func:`register_ovd_dataset`. Every image must exist; none is opened.

    Returns:
        detectron2 dataset dicts sorted by image id: ``file_name``, ``height``, ``width`` (px),
        ``image_id``, ``annotations`` (each with the file's ``id``, ``bbox``, absolute px of the
        stored image in ``bbox_mode`` XYWH_ABS, ``category_id``, an index into ``vocabulary``, and
        ``iscrowd``) and, where the file has them, ``captions``.

    Raises:
        FileNotFoundError: The JSON file, the image folder or images in it do not exist.
        ValueError: The file is wrong, or its categories are not ``vocabulary``.
    """
    content = read_annotations(json_file, missing_hint)
    class_index = _match_categories(content["categories"], vocabulary, category_ids, json_file)
    names = [each["file_name"] for each in content["images"]]
    stored_as = dict(zip(names, _find_images(names, image_root, missing_hint), strict=True))
    records: dict[int | str, DatasetDict] = {
        image["id"]: {
            "file_name": os.path.join(image_root, stored_as[image["file_name"]]),
            "height": image["height"],
            "width": image["width"],
            "image_id": image["id"],
            "annotations": [],
            **({"captions": image["captions"]} if "captions" in image else {}),
        }
        for image in sorted(content["images"], key=lambda image: image["id"])
    }
    counts: Counter[str] = Counter()
    for annotation in content["annotations"]:
        record = records[annotation["image_id"]]
        box = get_box(annotation, json_file)
        clipped, verdict = clip_box(box, record["width"], record["height"])
        counts[verdict] += 1
        if clipped is not None:
            record["annotations"].append(
                {
                    "id": annotation["id"],
                    "bbox": clipped,
                    "bbox_mode": BoxMode.XYWH_ABS,
                    "category_id": class_index[annotation["category_id"]],
                    "iscrowd": int(annotation.get("iscrowd", 0)),
                }
            )
    dropped = {verdict: counts[verdict] for verdict in ("without area", "outside", "non-finite")}
    _LOGGER.log(
        logging.WARNING if any(dropped.values()) else logging.INFO,
        "Loaded %d images with %d boxes from %s; clipped %d boxes to their image, dropped %d (%s).",
        len(records),
        counts["kept"] + counts["clipped"],
        MetadataCatalog.get(dataset_name).get("source", json_file) if dataset_name else json_file,
        counts["clipped"],
        sum(dropped.values()),
        ", ".join(f"{count} {verdict}" for verdict, count in dropped.items()),
    )
    if dataset_name is not None:
        MetadataCatalog.get(dataset_name).thing_dataset_id_to_contiguous_id = class_index
    return list(records.values())


def _match_categories(
    categories: Sequence[dict[str, Any]],
    vocabulary: Sequence[str],
    category_ids: Sequence[int] | None,
    json_file: str,
) -> dict[int, int]:
    """Return category id -> index into ``vocabulary``; ValueError unless the two agree."""
    found = sorted(Category(category["id"], category["name"]) for category in categories)
    names, ids = [category.name for category in found], [category.id for category in found]
    if names != list(vocabulary):
        missing = [name for name in vocabulary if name not in names]
        unexpected = [name for name in names if name not in vocabulary]
        raise ValueError(
            f"{json_file}: 'categories' in id order must be the dataset's vocabulary, expected "
            f"{shown(list(vocabulary))}, found {shown(names)}; missing: {some(missing) or 'none'}; "
            f"unexpected: {some(unexpected) or 'none'}."
        )
    if category_ids is not None and ids != list(category_ids):
        raise ValueError(
            f"{json_file}: the categories {shown(names)} must have the ids {list(category_ids)}, "
            f"found {ids}."
        )
    return {category_id: index for index, category_id in enumerate(ids)}


def _find_images(file_names: Sequence[str], image_root: str, missing_hint: str) -> list[str]:
    """Return the names under which ``file_names`` are stored in ``image_root``.

    A backslash may separate folders, and accents may be composed in another way (NFC, NFD).

    Raises:
        FileNotFoundError: ``image_root`` or a file in it does not exist.
    """
    if not os.path.isdir(image_root):
        found = "is no folder" if os.path.exists(image_root) else "does not exist"
        raise FileNotFoundError(f"Image folder {image_root} {found}. {missing_hint}".rstrip())
    listed: dict[str, dict[str, str]] = {}  # a list of a folder is one request to its server

    def find(name: str) -> str | None:
        folder = ""
        if name.split("/")[-1] in ("", ".", ".."):
            return None
        for part in name.split("/"):
            if folder not in listed:
                path = os.path.join(image_root, folder)
                entries = os.listdir(path) if os.path.isdir(path) else []
                listed[folder] = {unicodedata.normalize("NFC", each): each for each in entries}
                listed[folder] |= {each: each for each in entries}
            if part in ("", ".", ".."):
                stored: str | None = part
            else:
                names = listed[folder]
                stored = names.get(part) or names.get(unicodedata.normalize("NFC", part))
            if stored is None:
                return None
            folder = os.path.join(folder, stored)
        return folder

    stored = [find(name) or find(name.replace("\\", "/")) for name in file_names]
    if missing := [name for name, each in zip(file_names, stored, strict=True) if each is None]:
        raise FileNotFoundError(
            f"{len(missing):,} of {len(file_names):,} images do not exist in {image_root}: "
            f"{some(sorted(missing))}{_near(min(missing), image_root)}. {missing_hint}".rstrip()
        )
    return [each for each in stored if each is not None]


def _near(name: str, image_root: str) -> str:
    """Say under which name an image is there whose folder, suffix or capitals are others."""
    stem = os.path.splitext(os.path.basename(name.replace("\\", "/")))[0].casefold()
    for folder, _, files in os.walk(image_root):
        for each in files:
            if os.path.splitext(each)[0].casefold() == stem:
                there = os.path.relpath(os.path.join(folder, each), image_root)
                return f"; in place of {shown(name)} there is {shown(there)}"
    return ""


def clip_box(box: Sequence[float], width: int, height: int) -> tuple[list[float] | None, str]:
    """Clip an XYWH box to its image, all in pixels.

    Returns:
        The box, None if it is dropped; and what was done: "kept", "clipped", or why it is dropped,
        "non-finite", "without area" or "outside".
    """
    x, y, box_width, box_height = box
    if not all(map(math.isfinite, box)):
        return None, "non-finite"
    if box_width <= 0 or box_height <= 0:
        return None, "without area"
    x0, y0 = max(x, 0.0), max(y, 0.0)
    x1, y1 = min(x + box_width, float(width)), min(y + box_height, float(height))
    if x1 <= x0 or y1 <= y0:
        return None, "outside"
    overshoot = max(x0 - x, y0 - y, x + box_width - x1, y + box_height - y1)
    if overshoot <= 0:
        return list(box), "kept"
    return [x0, y0, x1 - x0, y1 - y0], "clipped" if overshoot > _ROUNDING_PX else "kept"


def images_without_caption(images: Iterable[Mapping[str, Any]]) -> list[str]:
    """The ``file_name`` of each image without ``captions``, or with a blank one among them."""
    return [
        image["file_name"]
        for image in images
        if not image.get("captions") or not all(text.strip() for text in image["captions"])
    ]


def check_captions(dataset_dicts: Iterable[Mapping[str, Any]], json_file: str) -> None:
    """Raise ValueError if a training image has no caption, which global distillation needs."""
    if without := images_without_caption(dataset_dicts):
        raise ValueError(
            f"{json_file}: {len(without):,} images have no caption or an empty one, but global "
            f"distillation needs one for each: {some(without)}. Add 'captions' (a list of "
            "strings) to these images, or switch it off with MODEL.GKD.LOSS_WEIGHT 0.0."
        )


def check_datasets(names: Sequence[str]) -> list[DatasetDict]:
    """Load datasets once, so that a file missing for evaluation is noticed before training.

    Returns:
        The images of all of them, each file once.
    """
    check_registered(names)
    images: dict[str, DatasetDict] = {}
    for name in names:
        images |= {record["file_name"]: record for record in DatasetCatalog.get(name)}
    return list(images.values())


def check_registered(names: Iterable[str]) -> None:
    """Raise ValueError, with the names there are, if one is not in ``DatasetCatalog``."""
    registered = DatasetCatalog.list()
    for name in names:
        if name not in registered:
            close = [f" (did you mean {each!r}?)" for each in get_close_matches(name, registered)]
            ours = [n for n in registered if MetadataCatalog.get(n).get("base_classes") is not None]
            raise ValueError(
                f"Unknown dataset {name!r}{''.join(close[:1])}; expected one of {sorted(ours)}."
            )


def check_training_sets(names: Sequence[str]) -> None:
    """Raise ValueError if a training set is unknown, or two have other classes."""
    check_registered(names)
    for other in names[1:]:
        first, second = (MetadataCatalog.get(each).thing_classes for each in (names[0], other))
        if first != second:
            alone = [
                f"{name!r} alone has {some(sorted(differing))}"
                for name, differing in (
                    (names[0], set(first) - set(second)),
                    (other, set(second) - set(first)),
                )
                if differing
            ]
            raise ValueError(
                f"DATASETS.TRAIN: {names[0]!r} and {other!r} must have the same classes in the "
                f"same order: {'; '.join(alone) or 'only their order differs'}. Join their "
                "annotations in one file, or give both YAMLs the same 'base' (and 'rename')."
            )


def register_coco_ovd() -> None:
    """Register ``coco_ovd_{48_17,65_15,65_15_2014}_{train_base,val_base,val_novel,val_all}``.

    Annotations are expected at ``<root>/coco/annotations/ovd_<split>/<part>.json``, images in
    ``<root>/coco/{train,val}2017`` (2014 for ``65_15_2014``); root is :func:`datasets_root`.
    """
    root = datasets_root()
    coco = os.path.join(root, "coco")
    for variant, split in [(v, split) for v in (COCO_2017, COCO_2014) for split in v.splits()]:
        folder, year = f"{split.name}{variant.suffix}", str(variant.year)
        command = f"python datasets/prepare_coco.py --split {split.name} --coco-year {year}"
        for part, vocabulary in split.parts.items():
            register_ovd_dataset(
                f"coco_ovd_{folder}_{part}",
                json_file=os.path.join(coco, "annotations", f"ovd_{folder}", f"{part}.json"),
                image_root=os.path.join(coco, part.split("_")[0] + year),
                vocabulary=[category.name for category in vocabulary],
                base_classes=[category.name for category in split.base],
                novel_classes=[category.name for category in split.novel],
                category_ids=[category.id for category in vocabulary],
                missing_hint=(
                    f"Make the annotations with `{command}` after downloading COCO {year} (its "
                    "--dry-run says what is missing). The environment variable "
                    "DETECTRON2_DATASETS names the folder that holds coco/; it was "
                    f"{root!r} when hierkd was imported."
                ),
            )
