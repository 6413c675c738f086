"""From the official COCO annotations to the files of an open-vocabulary split (§4.1).

The recipe is OVR-CNN's (Zareian et al., CVPR 2021): keep the annotations of the wanted categories
and the images that have at least one of them, crowd regions counting. Images are *not* removed
for showing novel objects; in training these stay, without boxes. ``categories`` lists all
categories of the file in id order, also those without a box. COCO 2014 takes the rule of zero-shot
detection instead (:class:`hierkd.data.splits.CocoVariant`). Ours: training images carry their
captions, and fields that detection does not use are dropped, above all ``segmentation``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hierkd.data.coco_json import shown
from hierkd.data.official_coco import (
    annotation_files,
    read_captions,
    read_instances,
    where_from,
)
from hierkd.data.splits import COCO_2017, Category, CocoVariant, Split
from hierkd.files import write_json_atomically

__all__ = [
    "EXPECTED_BOXES",
    "EXPECTED_FULL_COCO",
    "Figure",
    "PartSummary",
    "build_part",
    "join_captions",
    "prepare_coco",
]

JsonObject = dict[str, Any]

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Figure:
    """A count that somebody else stated.

    Attributes:
        value: The count.
        source: Whose it is.
        is_certain: Whether another count shows that the input is not COCO as published. Otherwise
            the two are set side by side, and no more.
    """

    value: int
    source: str
    is_certain: bool = False


# OVR-CNN's images: val, alirezazareian/ovr-cnn issue 17; train, the 6,736 iterations of 16 images
# that are an epoch in HierKD's release. Its boxes: often quoted, and verified by nobody we know.
_OVR_CNN, _QUOTED = "OVR-CNN's files", "a quoted, unverified figure"
# Counted in salman-h-khan/PL-ZSD_Release, MSCOCO/validation_coco_unseen_{all,seen_all_gzsd}.csv.
# These list boxes, crowd regions among them (image 255165), in whole pixels, and state no rule.
_PL_ZSD = "PL-ZSD's lists, which state no rule"

EXPECTED_FULL_COCO: dict[tuple[str, str], Figure] = {
    ("48_17", "train_base"): Figure(107_761, _OVR_CNN, is_certain=True),
    ("48_17", "val_base"): Figure(4_533, _OVR_CNN, is_certain=True),
    ("48_17", "val_novel"): Figure(2_064, _OVR_CNN, is_certain=True),
    ("48_17", "val_all"): Figure(4_836, _OVR_CNN, is_certain=True),
    ("65_15_2014", "val_novel"): Figure(10_098, _PL_ZSD),
    ("65_15_2014", "val_all"): Figure(10_098, _PL_ZSD),
}
"""Images per (split, part) when the input is the whole of COCO."""

EXPECTED_BOXES: dict[tuple[str, str], Figure] = {
    ("48_17", "train_base"): Figure(665_387, _QUOTED),
    ("48_17", "val_base"): Figure(28_538, _QUOTED),
    ("48_17", "val_novel"): Figure(4_614, _QUOTED),
    ("48_17", "val_all"): Figure(33_152, _QUOTED),
    ("65_15_2014", "val_novel"): Figure(16_388, _PL_ZSD),
    ("65_15_2014", "val_all"): Figure(68_169, _PL_ZSD),
}
"""Boxes, crowd regions included, likewise."""

_KEPT_IMAGE_FIELDS = ("id", "file_name", "height", "width", "license", "flickr_url")
_KEPT_BOX_FIELDS = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")


@dataclass(frozen=True)
class PartSummary:
    """What one written file holds.

    Attributes:
        split: Name of the split, with the year unless it is 2017.
        part: ``train_base``, ``val_base``, ``val_novel`` or ``val_all``.
        path: The file.
        num_images: Images in it.
        num_boxes: Annotations in it, crowd regions included.
        num_captions: Captions in it; 0 for validation files.
        expected_images: What others count; ``None`` when the input is not the whole of COCO or
            nobody stated a figure for the split.
        expected_boxes: Likewise; see :data:`EXPECTED_BOXES`.
        changed: Whether the file is new or differs from the one that was there.
    """

    split: str
    part: str
    path: Path
    num_images: int
    num_boxes: int
    num_captions: int
    expected_images: Figure | None
    expected_boxes: Figure | None
    changed: bool


def build_part(
    instances: Mapping[str, Any],
    categories: Sequence[Category],
    path: Path | str,
    *,
    without: Sequence[Category] = (),
    showing: Sequence[Category] | None = None,
) -> JsonObject:
    """Keep the annotations of ``categories`` and the images that have one.

    Args:
        instances: Content of an official instances file; not changed.
        categories: What the result's ``categories`` list, in this order.
        path: Where ``instances`` came from, for messages.
        without: An image that has an annotation of one of these is left out.
        showing: An image must have an annotation of one of these; by default of ``categories``.

    Returns:
        A file in COCO's layout: images and annotations in their original order.

    Raises:
        ValueError: ``instances`` has no category of that id and name, or nothing remains.
    """
    official = {entry["id"]: entry for entry in instances["categories"]}
    for category in categories:
        found = official.get(category.id, {}).get("name")
        if found != category.name:
            raise ValueError(
                f"{path}: expected category {category.id} to be {category.name!r}, found "
                f"{'nothing' if found is None else shown(found)} under this id."
            )
    wanted = {category.id for category in categories}
    used = _images_with(instances, categories if showing is None else showing)
    used -= _images_with(instances, without)
    annotations = [
        {field: box[field] for field in _KEPT_BOX_FIELDS if field in box}
        for box in instances["annotations"]
        if box["category_id"] in wanted and box["image_id"] in used
    ]
    images = [
        {field: image[field] for field in _KEPT_IMAGE_FIELDS if field in image}
        for image in instances["images"]
        if image["id"] in used
    ]
    if not images:
        raise ValueError(f"{path}: no image has a box of any of the {len(wanted)} categories.")
    return {
        "info": instances.get("info", {}),
        "licenses": instances.get("licenses", []),
        "images": images,
        "annotations": annotations,
        "categories": [official[category.id] for category in categories],
    }


def _images_with(instances: Mapping[str, Any], categories: Sequence[Category]) -> set[int]:
    """Ids of the images that have an annotation of one of ``categories``."""
    wanted = {category.id for category in categories}
    return {box["image_id"] for box in instances["annotations"] if box["category_id"] in wanted}


def join_captions(
    part: JsonObject, captions: Mapping[int, list[str]], path: Path | str
) -> JsonObject:
    """Return ``part`` with each image's ``captions``; images without any are logged.

    Args:
        part: Result of :func:`build_part`; not changed.
        captions: Image id -> captions, see :func:`read_captions`.
        path: Where ``captions`` came from, for messages.

    Raises:
        ValueError: No image of ``part`` has a caption.
    """
    without = [image["file_name"] for image in part["images"] if not captions.get(image["id"])]
    if len(without) == len(part["images"]):
        raise ValueError(f"{path}: holds no caption of any of the {len(without):,} images.")
    if without:
        _LOGGER.warning(
            "%s holds no caption of %d of %d training images, first %s; training with "
            "MODEL.GKD.LOSS_WEIGHT > 0 will refuse them.",
            path, len(without), len(part["images"]), without[0],
        )  # fmt: skip
    images = [{**image, "captions": captions.get(image["id"], [])} for image in part["images"]]
    return {**part, "images": images}


def prepare_coco(
    root: str | os.PathLike[str],
    splits: Sequence[Split],
    *,
    output: str | os.PathLike[str] | None = None,
    variant: CocoVariant = COCO_2017,
    check_pictures: bool = True,
) -> list[PartSummary]:
    """Write the annotation files of ``splits``.

    Reads ``<root>/coco/annotations/{instances_train,instances_val,captions_train}<year>`` and
    writes ``<output>/ovd_<split>/{train_base,val_base,val_novel,val_all}.json``, each one whole or
    not at all. The same input gives the same bytes, and a file that is right already is left
    alone. Nothing is written before all input has been read and checked.

    Args:
        root: The folder that holds ``coco``.
        splits: Which splits.
        output: Folder for the results; ``<root>/coco/annotations`` unless given.
        variant: Which COCO, and how the splits are made of it.
        check_pictures: Refuse a folder of pictures that lacks some of those that its annotations
            list. A folder that is not there at all is only logged.

    Returns:
        What the files hold, in order. One whose image count is not the published one (see
        :data:`EXPECTED_FULL_COCO`) is also logged as a warning.

    Raises:
        FileNotFoundError: Inputs do not exist; says which ones and where they come from.
        ValueError: An input is wrong, see :func:`hierkd.data.official_coco.read_instances` and
            ``read_captions``; pictures are missing; an image is in both halves; or ``variant``
            does not define a split.
    """
    for split in splits:
        if split not in variant.splits():
            raise ValueError(f"COCO {variant.year} is prepared for 65_15 alone, not {split.name}.")
    annotations = Path(root) / "coco" / "annotations"
    output = annotations if output is None else Path(output)
    files = annotation_files(variant)
    _check_files_exist([annotations / name for name in files])
    with tqdm(total=len(files) + 4 * len(splits), unit="file") as progress:
        instances, captions = _read_inputs(annotations, variant, progress)
        if check_pictures:
            for folder, content in instances.items():
                _check_pictures(Path(root) / "coco" / folder, content)
        parts = [
            (split, name, folder, content)
            for split in splits
            for name, folder, content in _build_parts(
                split, variant, instances, captions, annotations
            )
        ]
        summaries = []
        for split, name, folder, content in parts:
            full_name = f"{split.name}{variant.suffix}"
            path = output / f"ovd_{full_name}" / f"{name}.json"
            progress.set_description(f"writing {path.name}")
            changed = write_json_atomically(path, content)
            progress.update()
            is_full = len(instances[folder]["images"]) == variant.num_images[folder]
            summaries.append(_summarise(full_name, name, path, content, is_full, changed))
    return summaries


def _check_files_exist(paths: Sequence[Path]) -> None:
    """Raise FileNotFoundError for all that are missing, before a minute of parsing."""
    missing = [path for path in paths if not path.is_file()]
    if missing:
        others = ", ".join(path.name for path in missing[1:])
        raise FileNotFoundError(
            f"{missing[0]} does not exist{f', nor do {others}' if others else ''}. "
            f"{where_from(missing[0])}"
        )


def _read_inputs(
    annotations: Path, variant: CocoVariant, progress: tqdm
) -> tuple[dict[str, JsonObject], dict[int, list[str]]]:
    """Read the instances by image folder, and the training captions by image id."""
    instances = {}
    for folder in (variant.train, variant.val):
        name = f"instances_{folder}.json"
        progress.set_description(f"reading {name}")
        instances[folder] = read_instances(annotations / name, folder)
        progress.update()
    in_both = set.intersection(*({i["id"] for i in half["images"]} for half in instances.values()))
    if in_both:
        raise ValueError(
            f"{annotations}: instances_{variant.train}.json and instances_{variant.val}.json must "
            f"have no image in common, found {len(in_both):,}, among them image {min(in_both)}."
        )
    name = f"captions_{variant.train}.json"
    progress.set_description(f"reading {name}")
    captions = read_captions(annotations / name, variant.train)
    progress.update()
    return instances, captions


def _check_pictures(folder: Path, instances: JsonObject) -> None:
    """Raise ValueError if the folder lacks pictures that the annotations list."""
    if not folder.is_dir():
        _LOGGER.warning("%s does not exist: the pictures are not checked.", folder)
        return
    present = set(os.listdir(folder))
    names = [image["file_name"] for image in instances["images"]]
    missing = [name for name in names if name not in present]
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing):,} of the {len(names):,} pictures that its annotations "
            f"list, first {missing[0]}: a partial download? {where_from(folder)}"
        )


def _build_parts(
    split: Split,
    variant: CocoVariant,
    instances: Mapping[str, JsonObject],
    captions: Mapping[int, list[str]],
    annotations: Path,
) -> list[tuple[str, str, JsonObject]]:
    """Return the name, image folder and content of each of the four files of ``split``."""
    train = annotations / f"instances_{variant.train}.json"
    val = annotations / f"instances_{variant.val}.json"
    train_base = build_part(
        instances[variant.train],
        split.base,
        train,
        without=split.novel if variant.zero_shot else (),
    )
    train_base = join_captions(train_base, captions, annotations / f"captions_{variant.train}.json")
    val_all = build_part(
        instances[variant.val], split.all, val, showing=split.novel if variant.zero_shot else None
    )
    return [
        ("train_base", variant.train, train_base),
        ("val_base", variant.val, build_part(instances[variant.val], split.base, val)),
        ("val_novel", variant.val, build_part(instances[variant.val], split.novel, val)),
        ("val_all", variant.val, val_all),
    ]


def _summarise(
    split: str, name: str, path: Path, part: JsonObject, is_full: bool, changed: bool
) -> PartSummary:
    """Count what ``part`` holds; warn if the input is all of COCO and the count is not right."""
    summary = PartSummary(
        split=split,
        part=name,
        path=path,
        num_images=len(part["images"]),
        num_boxes=len(part["annotations"]),
        num_captions=sum(len(image.get("captions", [])) for image in part["images"]),
        expected_images=EXPECTED_FULL_COCO.get((split, name)) if is_full else None,
        expected_boxes=EXPECTED_BOXES.get((split, name)) if is_full else None,
        changed=changed,
    )
    expected = summary.expected_images
    if expected is not None and expected.is_certain and expected.value != summary.num_images:
        _LOGGER.warning(
            "%s holds %d images, but the official annotations give %d: the input differs from "
            "COCO as published.",
            path, summary.num_images, expected.value,
        )  # fmt: skip
    return summary
