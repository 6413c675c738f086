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
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from hierkd.data.coco_json import (
    check_annotations,
    get_entries,
    index_by_id,
    read_coco_json,
    shown,
    some,
)
from hierkd.data.splits import COCO_2017, Category, CocoVariant, Split
from hierkd.files import write_json_atomically

__all__ = [
    "EXPECTED",
    "EXPECTED_BY",
    "PartSummary",
    "archive_of",
    "build_part",
    "describe_inputs",
    "join_captions",
    "prepare_coco",
]

JsonObject = dict[str, Any]

_LOGGER = logging.getLogger(__name__)

_URL = "http://images.cocodataset.org"
_SIZES = {"train2014": "13 GB", "val2014": "6 GB", "train2017": "18 GB", "val2017": "1 GB"}
_TAIL_BYTES = 64  # how much of a JSON's end is searched for its last brace [ours]

EXPECTED: dict[tuple[str, str], tuple[int, int]] = {
    ("48_17", "train_base"): (107_761, 665_387),
    ("48_17", "val_base"): (4_533, 28_538),
    ("48_17", "val_novel"): (2_064, 4_614),
    ("48_17", "val_all"): (4_836, 33_152),
    ("65_15_2014", "val_novel"): (10_098, 16_388),
    ("65_15_2014", "val_all"): (10_098, 68_169),
}
"""Images and boxes, crowd regions included, per (split, part) when the input is all of COCO."""

# OVR-CNN's images: val, alirezazareian/ovr-cnn issue 17; train, the 6,736 iterations of 16 images
# that are an epoch in HierKD's release. Its boxes: often quoted, and verified by nobody we know.
# PL-ZSD's are counted in salman-h-khan/PL-ZSD_Release,
# MSCOCO/validation_coco_unseen_{all,seen_all_gzsd}.csv. These list boxes, crowd regions among them
# (image 255165), in whole pixels.
_PL_ZSD = "PL-ZSD's lists, which state no rule"
EXPECTED_BY = {
    "48_17": ("OVR-CNN's files", "a quoted, unverified figure"),
    "65_15_2014": (_PL_ZSD, _PL_ZSD),
}
"""Who states the images and the boxes of a split."""

_KEPT_IMAGE_FIELDS = ("id", "file_name", "height", "width", "license", "flickr_url")
_KEPT_BOX_FIELDS = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")


class PartSummary(NamedTuple):
    """What one written file holds, crowd regions included."""

    split: str  # with the year unless it is 2017
    path: Path
    num_images: int
    num_boxes: int
    num_captions: int
    expected: tuple[int, int] | None  # images and boxes; None: of a part of COCO, or not stated
    changed: bool  # the file is new or differs from the one that was there


# ------------------------------------------------------------------------------ the official files


def describe_inputs(root: Path, variant: CocoVariant) -> Iterator[tuple[Path, str, str]]:
    """Look at every file and folder that COCO needs below ``root``: no file is read as a whole.

    Yields:
        Path, state and detail. The state is "found", "MISSING", or "PARTIAL": a JSON that is cut
        off, or a folder with fewer pictures than COCO has.
    """
    for path in _annotation_files(root, variant):
        yield path, *_state_of_json(path)
    for folder, full in variant.num_images.items():
        path = root / "coco" / folder
        if path.is_dir():
            number = sum(name.endswith(".jpg") for name in os.listdir(path))
            detail = f"{number:,} of the {full:,} pictures of the whole COCO"
            yield path, "found" if number >= full else "PARTIAL", detail
        else:
            yield path, "MISSING", "does not exist"


def _state_of_json(path: Path) -> tuple[str, str]:
    """State and detail of what should be a JSON object, judged by its first and last bytes."""
    if not path.is_file():
        return "MISSING", "does not exist"
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(1)
        file.seek(max(0, size - _TAIL_BYTES))
        last = file.read().rstrip()[-1:]
    if first != b"{":
        return "PARTIAL", f"{size:,} bytes, and no JSON object"
    return (
        ("found", f"{size:,} bytes")
        if last == b"}"
        else ("PARTIAL", f"cut off after {size:,} bytes")
    )


def _annotation_files(root: Path, variant: CocoVariant) -> list[Path]:
    """The official files that are read: boxes of both halves, captions of the training half."""
    train, val = variant.num_images
    names = (f"instances_{train}", f"instances_{val}", f"captions_{train}")
    return [root / "coco" / "annotations" / f"{name}.json" for name in names]


def archive_of(path: Path) -> tuple[str, str]:
    """Address and size of the archive that has the COCO file or image folder at ``path``."""
    if path.suffix == ".json":
        return f"{_URL}/annotations/annotations_trainval{path.stem[-4:]}.zip", "241 MB"
    return f"{_URL}/zips/{path.name}.zip", _SIZES[path.name]


def _where_from(path: Path) -> str:
    """Return how to obtain the COCO file or image folder at ``path``."""
    return f"Download {archive_of(path)[0]} and unpack it so that {path} exists."


def _read_instances(path: Path) -> JsonObject:
    """Read and check ``instances_{train,val}<year>.json``."""
    content = read_coco_json(path)
    check_annotations(content, path)
    return content


def _read_captions(path: Path) -> dict[int, list[str]]:
    """Read and check captions: image id -> its captions, in the order of their ids, none empty."""
    content = read_coco_json(path)
    images = get_entries(content, "images", {"id": int, "file_name": str}, path)
    known = index_by_id(images, "images", path)
    fields = {"id": int, "image_id": int, "caption": str}
    entries = get_entries(content, "annotations", fields, path)
    index_by_id(entries, "annotations", path)
    captions: dict[int, list[str]] = defaultdict(list)
    for entry in sorted(entries, key=lambda each: each["id"]):
        if entry["image_id"] not in known:
            raise ValueError(
                f"{path}: caption {entry['id']} is of image {entry['image_id']}, which the file "
                "does not contain."
            )
        if text := " ".join(entry["caption"].split()):
            captions[entry["image_id"]].append(text)
    return captions


def _check_pictures(folder: Path, instances: JsonObject) -> None:
    """Raise ValueError if the folder lacks pictures that the annotations list."""
    if not folder.is_dir():
        _LOGGER.warning("%s does not exist: the pictures are not checked.", folder)
        return
    present = set(os.listdir(folder))
    names = [image["file_name"] for image in instances["images"]]
    if missing := [name for name in names if name not in present]:
        raise ValueError(
            f"{folder} lacks {len(missing):,} of the {len(names):,} pictures that its annotations "
            f"list, first {missing[0]}: a partial download? {_where_from(folder)}"
        )


# ------------------------------------------------------------------------------ the recipe


def build_part(
    instances: JsonObject,
    categories: Sequence[Category],
    path: Path,
    *,
    without: Sequence[Category] = (),
    showing: Sequence[Category] | None = None,
) -> JsonObject:
    """Keep the annotations of ``categories`` and the images that have one.

    Args:
        instances: Content of an official instances file, from ``path``; not changed.
        categories: What the result's ``categories`` list, in this order.
        path: For messages.
        without: An image that has an annotation of one of these is left out.
        showing: An image must have an annotation of one of these; by default of ``categories``.

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
        names = some(category.name for category in categories)
        raise ValueError(f"{path}: no image has a box of any of the categories {names}.")
    return {
        "info": instances.get("info", {}),
        "licenses": instances.get("licenses", []),
        "images": images,
        "annotations": annotations,
        "categories": [official[category.id] for category in categories],
    }


def _images_with(instances: JsonObject, categories: Sequence[Category]) -> set[int]:
    """Ids of the images that have an annotation of one of ``categories``."""
    wanted = {category.id for category in categories}
    return {box["image_id"] for box in instances["annotations"] if box["category_id"] in wanted}


def join_captions(part: JsonObject, captions: Mapping[int, list[str]], path: Path) -> JsonObject:
    """Return ``part`` with each image's ``captions``, by image id; images without are logged.

    Raises:
        ValueError: No image of ``part`` has a caption; ``path``, where they are from, is named.
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
    root: Path,
    splits: Sequence[Split],
    *,
    output: Path | None = None,
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
        splits: What to make.
        output: Folder for the results; ``<root>/coco/annotations`` unless given.
        variant: Which COCO.
        check_pictures: Refuse a folder of pictures that lacks some of those that its annotations
            list. A folder that is not there at all is only logged.

    Raises:
        FileNotFoundError: Inputs do not exist; says which ones and where they come from.
        ValueError: An input is broken or another one than its name says, pictures are missing, an
            image is in both halves, or ``variant`` does not define a split.
    """
    for split in splits:
        if split not in variant.splits():
            raise ValueError(f"COCO {variant.year} is prepared for 65_15 alone, not {split.name}.")
    paths = _annotation_files(root, variant)
    if missing := [path for path in paths if not path.is_file()]:  # before a minute of parsing
        others = ", ".join(path.name for path in missing[1:])
        raise FileNotFoundError(
            f"{missing[0]} does not exist{f', nor do {others}' if others else ''}. "
            f"{_where_from(missing[0])}"
        )
    train, val, captions = _read_inputs(paths)
    if check_pictures:
        for folder, content in zip(variant.num_images, (train, val), strict=True):
            _check_pictures(root / "coco" / folder, content)
    parts = {
        (f"{split.name}{variant.suffix}", part): content
        for split in splits
        for part, content in _build_parts(split, variant, train, val, captions, paths).items()
    }
    num_train, num_val = variant.num_images.values()
    is_full = {"train": len(train["images"]) == num_train, "val": len(val["images"]) == num_val}
    summaries = []
    for (name, part), content in tqdm(parts.items(), desc="writing", unit="file"):
        path = (output or paths[0].parent) / f"ovd_{name}" / f"{part}.json"
        summaries.append(
            PartSummary(
                split=name,
                path=path,
                num_images=len(content["images"]),
                num_boxes=len(content["annotations"]),
                num_captions=sum(len(image.get("captions", [])) for image in content["images"]),
                expected=EXPECTED.get((name, part)) if is_full[part.split("_")[0]] else None,
                changed=write_json_atomically(path, content),
            )
        )
    return summaries


def _read_inputs(paths: Sequence[Path]) -> tuple[JsonObject, JsonObject, dict[int, list[str]]]:
    """Read the boxes of both halves, and the training captions by image id."""
    readers = (_read_instances, _read_instances, _read_captions)
    steps = tqdm(zip(readers, paths, strict=True), total=3, desc="reading", unit="file")
    train, val, captions = (read(path) for read, path in steps)
    if in_both := {each["id"] for each in train["images"]} & {each["id"] for each in val["images"]}:
        raise ValueError(
            f"{paths[0]} and {paths[1].name} must have no image in common, found {len(in_both):,}, "
            f"among them image {min(in_both)}."
        )
    return train, val, captions


def _build_parts(
    split: Split,
    variant: CocoVariant,
    train: JsonObject,
    val: JsonObject,
    captions: Mapping[int, list[str]],
    paths: Sequence[Path],
) -> dict[str, JsonObject]:
    """Return the content of each of the four files of ``split``."""
    without, showing = (split.novel, split.novel) if variant.zero_shot else ((), None)
    train_base = build_part(train, split.base, paths[0], without=without)
    return {
        "train_base": join_captions(train_base, captions, paths[2]),
        "val_base": build_part(val, split.base, paths[1]),
        "val_novel": build_part(val, split.novel, paths[1]),
        "val_all": build_part(val, split.all, paths[1], showing=showing),
    }
