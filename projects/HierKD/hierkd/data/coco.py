"""Open-vocabulary detection datasets in COCO's JSON layout, for detectron2's catalogs (§4.1).

A dataset is a JSON file, a folder of images and three lists of names: its *vocabulary* (the
categories of the file, in id order; the class index used everywhere else is the position in it)
and the *base* and *novel* names of its split. The vocabulary of the training file is the base
names; the validation files hold the base, the novel, or all images and categories.

Bad files are refused here, before a run starts, with the file and the entry in the message.
"""

from __future__ import annotations

import logging
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

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
from hierkd.data.splits import COCO_2014, COCO_2017, Category, CocoVariant, Split

__all__ = [
    "check_captions",
    "check_datasets",
    "check_registered",
    "closest_dataset",
    "datasets_root",
    "load_ovd_json",
    "register_coco_ovd",
    "register_ovd_dataset",
]

DatasetDict = dict[str, Any]

_LOGGER = logging.getLogger(__name__)

_MAX_NAMED = 5  # how many offenders a message names before it only counts them [ours]

# COCO rounds coordinates to 0.01 px, so x + w may pass the image's edge by that much. Such boxes
# are clipped like any other but not counted as reaching outside [ours].
_ROUNDING_PX = 0.02

_IMAGE_FIELDS: FieldTypes = {"id": (int, str), "file_name": str, "height": int, "width": int}
_ANNOTATION_FIELDS: FieldTypes = {
    "id": (int, str), "image_id": (int, str), "category_id": int, "bbox": list,
}  # fmt: skip
_CATEGORY_FIELDS: FieldTypes = {"id": int, "name": str}


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
    """Register a dataset with detectron2's ``DatasetCatalog`` and ``MetadataCatalog``.

    Nothing is read before the dataset is asked for. The metadata carries ``json_file``,
    ``image_root``, ``evaluator_type="split_coco"``, ``thing_classes`` (the vocabulary),
    ``base_classes``, ``novel_classes`` and ``thing_dataset_id_to_contiguous_id``.

    Args:
        name: Name in both catalogs.
        json_file: Annotations in COCO's layout; training files also carry ``captions``.
        image_root: Folder that ``file_name`` in the JSON is relative to.
        vocabulary: Names of the file's categories in category id order.
        base_classes: Names with boxes in training, of the whole split.
        novel_classes: Names without boxes in training, of the whole split.
        category_ids: The ids of ``vocabulary`` in the file, ascending. Without them
            ``thing_dataset_id_to_contiguous_id`` is set when the file is first loaded.
        missing_hint: How to obtain the files, for the error when one does not exist.

    Raises:
        ValueError: ``name`` is taken; the vocabulary is empty, has duplicates or names outside
            base and novel; base and novel overlap; ids and names do not pair up.
    """
    _check_names(name, vocabulary, base_classes, novel_classes, category_ids)
    if name in DatasetCatalog.list():
        raise ValueError(f"Dataset {name!r} is already registered.")
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
        metadata.thing_dataset_id_to_contiguous_id = {
            category_id: index for index, category_id in enumerate(category_ids)
        }


def _check_names(
    name: str,
    vocabulary: Sequence[str],
    base_classes: Sequence[str],
    novel_classes: Sequence[str],
    category_ids: Sequence[int] | None,
) -> None:
    """Raise ValueError if the name lists of dataset ``name`` contradict each other."""
    if not vocabulary:
        raise ValueError(f"Dataset {name!r}: the vocabulary is empty.")
    repeated = [each for each, count in Counter(vocabulary).items() if count > 1]
    if repeated:
        raise ValueError(f"Dataset {name!r}: the vocabulary repeats {_some(repeated)}.")
    both = sorted(set(base_classes) & set(novel_classes))
    if both:
        raise ValueError(f"Dataset {name!r}: both base and novel: {_some(both)}.")
    neither = [each for each in vocabulary if each not in {*base_classes, *novel_classes}]
    if neither:
        raise ValueError(f"Dataset {name!r}: neither base nor novel: {_some(neither)}.")
    if category_ids is not None and (
        len(category_ids) != len(vocabulary) or sorted(set(category_ids)) != list(category_ids)
    ):
        raise ValueError(
            f"Dataset {name!r}: expected {len(vocabulary)} ascending category ids, one for each "
            f"name of the vocabulary, found {list(category_ids)}."
        )


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

    Args:
        json_file: The annotations. An image entry may carry ``captions``, a list of strings.
        image_root: Folder that ``file_name`` is relative to, and may not leave. Every image must
            exist in it; the folder is listed once, no image is opened.
        vocabulary: The names of the file's categories in id order, no more and no fewer.
        category_ids: The ids these must have; ``None`` accepts any.
        missing_hint: How to obtain the files, for the error when one does not exist.
        dataset_name: If given, ``thing_dataset_id_to_contiguous_id`` of this dataset's metadata
            is set to what the file says.

    Returns:
        detectron2 dataset dicts sorted by image id: ``file_name``, ``height``, ``width`` (px),
        ``image_id``, ``annotations`` (each with the file's ``id``, ``bbox``, absolute px of the
        stored image in ``bbox_mode`` XYWH_ABS, ``category_id``, an index into ``vocabulary``, and
        ``iscrowd``) and, where the file has them, ``captions``.

    Raises:
        FileNotFoundError: The JSON file, the image folder or images in it do not exist.
        ValueError: The file is broken, lacks a key, repeats an id, mixes numbers and strings as
            image ids, refers to an image or category that it does not hold or to a file outside
            ``image_root``, or its categories are not ``vocabulary``.
    """
    content = read_coco_json(json_file, missing_hint=missing_hint)
    images = get_entries(content, "images", _IMAGE_FIELDS, json_file)
    annotations = get_entries(content, "annotations", _ANNOTATION_FIELDS, json_file)
    categories = get_entries(content, "categories", _CATEGORY_FIELDS, json_file)
    class_index = _match_categories(categories, vocabulary, category_ids, json_file)
    records = _make_records(images, image_root, json_file)
    _check_images_exist([image["file_name"] for image in images], image_root, missing_hint)
    counts = _add_annotations(records, annotations, class_index, json_file)
    _log_counts(counts, len(records), json_file)
    if dataset_name is not None:
        MetadataCatalog.get(dataset_name).thing_dataset_id_to_contiguous_id = class_index
    return [records[image_id] for image_id in sorted(records, key=_id_order)]


def _id_order(image_id: int | str) -> tuple[bool, int | str]:
    """Sort key of an image id: numbers before strings."""
    return isinstance(image_id, str), image_id


def _some(values: Iterable[object]) -> str:
    """Return the first few of ``values`` for a message, and how many more there are."""
    listed = list(values)
    text = ", ".join(shown(value) for value in listed[:_MAX_NAMED])
    more = len(listed) - _MAX_NAMED
    return f"{text} and {more:,} more" if more > 0 else text


def _match_categories(
    categories: Sequence[dict[str, Any]],
    vocabulary: Sequence[str],
    category_ids: Sequence[int] | None,
    json_file: str,
) -> dict[int, int]:
    """Return category id -> index into ``vocabulary``; ValueError unless the two agree."""
    index_by_id(categories, "categories", json_file)
    found = sorted(Category(category["id"], category["name"]) for category in categories)
    names = [category.name for category in found]
    missing = [name for name in vocabulary if name not in set(names)]
    if missing:
        raise ValueError(
            f"{json_file}: the dataset's vocabulary has {_some(missing)}, but 'categories' does "
            f"not; expected {len(vocabulary)} names, found {len(names)}: {shown(names)}."
        )
    unexpected = [name for name in names if name not in set(vocabulary)]
    if unexpected:
        raise ValueError(
            f"{json_file}: 'categories' has {_some(unexpected)}, but the dataset's vocabulary "
            f"does not; expected {len(vocabulary)} names, found {len(names)}."
        )
    if names != list(vocabulary):
        raise ValueError(
            f"{json_file}: 'categories' in id order must be the vocabulary, expected "
            f"{shown(list(vocabulary))}, found {shown(names)}."
        )
    if category_ids is not None:
        for category, expected in zip(found, category_ids, strict=True):
            if category.id != expected:
                raise ValueError(
                    f"{json_file}: category {category.name!r} must have id {expected}, "
                    f"found {category.id}."
                )
    return {category.id: index for index, category in enumerate(found)}


def _make_records(
    images: Sequence[dict[str, Any]], image_root: str, json_file: str
) -> dict[int | str, DatasetDict]:
    """Return one dataset dict without annotations per image, by image id."""
    if not images:
        raise ValueError(f"{json_file}: 'images' is empty.")
    records: dict[int | str, DatasetDict] = {}
    kinds = {type(image["id"]): image["id"] for image in images}
    if len(kinds) > 1:
        raise ValueError(
            f"{json_file}: the ids of 'images' must all be numbers or all be strings, found "
            f"{_some(kinds.values())}."
        )
    for image_id, image in index_by_id(images, "images", json_file).items():
        check_file_name(image["file_name"], image_id, json_file)
        if image["width"] <= 0 or image["height"] <= 0:
            raise ValueError(
                f"{json_file}: image {shown(image_id)} must have a positive width and height, "
                f"found {image['width']} x {image['height']}."
            )
        record: DatasetDict = {
            "file_name": os.path.join(image_root, image["file_name"]),
            "height": image["height"],
            "width": image["width"],
            "image_id": image_id,
            "annotations": [],
        }
        if "captions" in image:
            captions = image["captions"]
            if not isinstance(captions, list) or not all(isinstance(c, str) for c in captions):
                raise ValueError(
                    f"{json_file}: 'captions' of image {shown(image_id)} must be a list of "
                    f"strings, found {shown(captions)}."
                )
            record["captions"] = captions
        records[image_id] = record
    return records


def _check_images_exist(file_names: Iterable[str], image_root: str, missing_hint: str) -> None:
    """Raise FileNotFoundError if ``image_root`` or a file in it does not exist."""
    if not os.path.isdir(image_root):
        raise FileNotFoundError(
            f"Image folder {image_root} does not exist. {missing_hint}".rstrip()
        )
    wanted: dict[str, set[str]] = defaultdict(set)
    for file_name in file_names:
        folder, base_name = os.path.split(file_name)
        wanted[folder].add(base_name)
    missing: list[str] = []
    for folder, base_names in wanted.items():
        path = os.path.join(image_root, folder)
        if os.path.isdir(path):
            with os.scandir(path) as entries:
                present = {entry.name for entry in entries}
            base_names = base_names - present
        missing += [os.path.join(folder, base_name) for base_name in base_names]
    if missing:
        total = sum(len(base_names) for base_names in wanted.values())
        raise FileNotFoundError(
            f"{len(missing):,} of {total:,} images do not exist in {image_root}: "
            f"{_some(sorted(missing))}. {missing_hint}".rstrip()
        )


def _add_annotations(
    records: Mapping[int | str, DatasetDict],
    annotations: Sequence[dict[str, Any]],
    class_index: Mapping[int, int],
    json_file: str,
) -> Counter[str]:
    """Append each annotation to its image's record; return how many were kept, clipped, dropped."""
    index_by_id(annotations, "annotations", json_file)
    for annotation in annotations:
        check_annotation(annotation, json_file)
    counts: Counter[str] = Counter()
    for annotation in annotations:
        record = records.get(annotation["image_id"])
        if record is None:
            raise ValueError(
                f"{json_file}: annotation {shown(annotation['id'])} refers to image "
                f"{shown(annotation['image_id'])}, which is not in 'images'."
            )
        category = class_index.get(annotation["category_id"])
        if category is None:
            raise ValueError(
                f"{json_file}: annotation {shown(annotation['id'])} refers to category "
                f"{annotation['category_id']!r}, which is not in 'categories'."
            )
        box, verdict = _clip_box(annotation, record["width"], record["height"], json_file)
        counts[verdict] += 1
        if box is not None:
            record["annotations"].append(
                {
                    "id": annotation["id"],
                    "bbox": box,
                    "bbox_mode": BoxMode.XYWH_ABS,
                    "category_id": category,
                    "iscrowd": annotation.get("iscrowd", 0),
                }
            )
    return counts


def _clip_box(
    annotation: Mapping[str, Any], width: int, height: int, json_file: str
) -> tuple[list[float] | None, str]:
    """Clip an annotation's XYWH box (absolute px) to its ``width`` x ``height`` image.

    Returns:
        The clipped XYWH box, or ``None`` if it is to be dropped, and what was done:
        ``"kept"``, ``"clipped"``, ``"non-finite"``, ``"without area"`` or ``"outside"``.

    Raises:
        ValueError: ``bbox`` is not four numbers.
    """
    box = get_box(annotation, json_file)
    if not all(math.isfinite(value) for value in box):
        return None, "non-finite"
    x, y, box_width, box_height = box
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


def _log_counts(counts: Mapping[str, int], num_images: int, json_file: str) -> None:
    """Log in one line what was loaded; a warning if boxes were dropped."""
    dropped = {
        verdict: counts.get(verdict, 0) for verdict in ("without area", "outside", "non-finite")
    }
    _LOGGER.log(
        logging.WARNING if any(dropped.values()) else logging.INFO,
        "Loaded %d images with %d boxes from %s; clipped %d boxes to their image, dropped %d (%s).",
        num_images,
        counts.get("kept", 0) + counts.get("clipped", 0),
        json_file,
        counts.get("clipped", 0),
        sum(dropped.values()),
        ", ".join(f"{count} {verdict}" for verdict, count in dropped.items()),
    )


def check_captions(dataset_dicts: Iterable[Mapping[str, Any]], json_file: str) -> None:
    """Check that every image has a caption, as global distillation (§3.3) needs in training.

    Args:
        dataset_dicts: The training images, as :func:`load_ovd_json` returns them.
        json_file: Where they came from, for the message.

    Raises:
        ValueError: An image has no caption, or an empty one. The first few are named.
    """
    without = [
        record["file_name"]
        for record in dataset_dicts
        if not record.get("captions") or not all(text.strip() for text in record["captions"])
    ]
    if without:
        raise ValueError(
            f"{json_file}: {len(without):,} images have no caption or an empty one, but global "
            f"distillation needs one for each: {_some(without)}. Add 'captions' (a list of "
            "strings) to these images, or switch it off with MODEL.GKD.LOSS_WEIGHT 0.0."
        )


def check_datasets(names: Iterable[str]) -> list[DatasetDict]:
    """Load every dataset once, so that a file missing for evaluation is noticed before training.

    Args:
        names: Names in detectron2's ``DatasetCatalog``, for example ``cfg.DATASETS.TEST``.

    Returns:
        The images of all of them, each file once.

    Raises:
        ValueError: A name is not registered, or a file is wrong (see :func:`load_ovd_json`).
        FileNotFoundError: A file or folder does not exist.
    """
    names = list(names)
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
            close = closest_dataset(name)
            ours = sorted(each for each in registered if "_ovd_" in each)
            raise ValueError(
                f"Unknown dataset {name!r}{f' (did you mean {close!r}?)' if close else ''}; "
                f"this project registers {ours}."
            )


def closest_dataset(name: str, least: float = 0.6) -> str | None:
    """The registered dataset whose name is most like ``name``; None if none is ``least`` alike.

    Args:
        name: What was typed.
        least: difflib's ratio, 0..1; its own default.
    """
    return next(iter(get_close_matches(name, DatasetCatalog.list(), n=1, cutoff=least)), None)


def register_coco_ovd(root: str | None = None) -> None:
    """Register ``coco_ovd_{48_17,65_15,65_15_2014}_{train_base,val_base,val_novel,val_all}``.

    Annotations are expected at ``<root>/coco/annotations/ovd_<split>/<part>.json``, images in
    ``<root>/coco/{train,val}2017`` (2014 for ``65_15_2014``). Names that are registered already are
    left alone.

    Args:
        root: The folder that holds ``coco``; :func:`datasets_root` unless given.
    """
    coco = os.path.join(datasets_root() if root is None else root, "coco")
    for variant in (COCO_2017, COCO_2014):
        for split in variant.splits():
            vocabularies = {
                "train_base": split.base,
                "val_base": split.base,
                "val_novel": split.novel,
                "val_all": split.all,
            }
            for part, vocabulary in vocabularies.items():
                _register_coco_part(coco, variant, split, part, vocabulary)


def _register_coco_part(
    coco: str, variant: CocoVariant, split: Split, part: str, vocabulary: Sequence[Category]
) -> None:
    """Register one COCO dataset; ``part`` is the stem of its file and starts train_ or val_."""
    full_name = f"{split.name}{variant.suffix}"
    name = f"coco_ovd_{full_name}_{part}"
    if name in DatasetCatalog.list():
        return
    command = f"python datasets/prepare_coco.py --split {split.name}"
    if variant is not COCO_2017:
        command += f" --coco-year {variant.year}"
    register_ovd_dataset(
        name,
        json_file=os.path.join(coco, "annotations", f"ovd_{full_name}", f"{part}.json"),
        image_root=os.path.join(coco, variant.train if part == "train_base" else variant.val),
        vocabulary=[category.name for category in vocabulary],
        base_classes=[category.name for category in split.base],
        novel_classes=[category.name for category in split.novel],
        category_ids=[category.id for category in vocabulary],
        missing_hint=(
            f"Make the annotations with `{command}` after downloading COCO {variant.year} (its "
            "--dry-run says what is missing). The environment variable DETECTRON2_DATASETS names "
            f"the folder that holds coco/; it was {os.path.dirname(coco) or '.'!r} when hierkd was "
            "imported."
        ),
    )
