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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hierkd.data.coco_json import (
    FieldTypes,
    get_entries,
    index_by_id,
    read_coco_json,
    write_json_atomically,
)
from hierkd.data.splits import COCO_2017, Category, CocoVariant, Split

__all__ = [
    "EXPECTED_BOXES",
    "EXPECTED_FULL_COCO",
    "InputState",
    "PartSummary",
    "build_part",
    "describe_inputs",
    "join_captions",
    "prepare_coco",
    "read_captions",
    "read_instances",
]

JsonObject = dict[str, Any]

_LOGGER = logging.getLogger(__name__)

_ANNOTATIONS_URL = "http://images.cocodataset.org/annotations/annotations_trainval{year}.zip"
_IMAGES_URL = "http://images.cocodataset.org/zips/{folder}.zip"

# Images that the recipe makes of the whole of COCO. 48/17: OVR-CNN's own files (val:
# alirezazareian/ovr-cnn issue 17; train: 6,736 iterations of 16 in HierKD's release). 65/15 on COCO
# 2014: counted in PL-ZSD's own lists.
EXPECTED_FULL_COCO: dict[tuple[str, str], int] = {
    ("48_17", "train_base"): 107_761,
    ("48_17", "val_base"): 4_533,
    ("48_17", "val_novel"): 2_064,
    ("48_17", "val_all"): 4_836,
    ("65_15_2014", "val_novel"): 10_098,
    ("65_15_2014", "val_all"): 10_098,
}
"""Images per (split, part) when the input is the whole of COCO."""

EXPECTED_BOXES: dict[tuple[str, str], int] = {
    ("48_17", "train_base"): 665_387,
    ("48_17", "val_base"): 28_538,
    ("48_17", "val_novel"): 4_614,
    ("48_17", "val_all"): 33_152,
    ("65_15_2014", "val_novel"): 16_388,
    ("65_15_2014", "val_all"): 68_169,
}
"""Boxes likewise. Those of 48/17 are quoted, not verified, and those of PL-ZSD may leave out crowd
regions: a difference is said and is no error."""

_IMAGE_FIELDS: FieldTypes = {"id": int, "file_name": str, "height": int, "width": int}
_BOX_FIELDS: FieldTypes = {"id": int, "image_id": int, "category_id": int, "bbox": list}
_CAPTION_FIELDS: FieldTypes = {"id": int, "image_id": int, "caption": str}
_CATEGORY_FIELDS: FieldTypes = {"id": int, "name": str}

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
        expected_images: Images that the official recipe gives, ``None`` when the input is not the
            whole of COCO or no figure is published for the split.
        expected_boxes: Boxes likewise; see :data:`EXPECTED_BOXES`.
        changed: Whether the file is new or differs from the one that was there.
    """

    split: str
    part: str
    path: Path
    num_images: int
    num_boxes: int
    num_captions: int
    expected_images: int | None
    expected_boxes: int | None
    changed: bool

    @property
    def is_as_expected(self) -> bool:
        """Whether the image count is the published one, where there is one to compare with."""
        return self.expected_images in (None, self.num_images)


@dataclass(frozen=True)
class InputState:
    """What is at the place of a file or folder that COCO needs.

    Attributes:
        path: The place.
        found: Whether it is there, and whole as far as the number of its pictures tells.
        detail: The number of pictures in a folder; "" for a file.
        where_from: How to obtain it.
    """

    path: Path
    found: bool
    detail: str
    where_from: str


def describe_inputs(
    root: str | os.PathLike[str], variant: CocoVariant = COCO_2017
) -> list[InputState]:
    """Look at every file and folder that COCO needs; nothing large is read.

    Args:
        root: The folder that holds ``coco``.
        variant: Which COCO.
    """
    coco = Path(root) / "coco"
    inputs = []
    for name in _annotation_files(variant):
        path = coco / "annotations" / name
        inputs.append(InputState(path, path.is_file(), "", _where_from(path)))
    for folder, full in variant.num_images.items():
        path = coco / folder
        number = sum(name.endswith(".jpg") for name in os.listdir(path)) if path.is_dir() else 0
        detail = f"{number:,} of the {full:,} pictures of the whole COCO" if path.is_dir() else ""
        inputs.append(InputState(path, number > 0, detail, _where_from(path)))
    return inputs


def _annotation_files(variant: CocoVariant) -> tuple[str, ...]:
    """Names of the official files that are read."""
    return (
        f"instances_{variant.train}.json",
        f"instances_{variant.val}.json",
        f"captions_{variant.train}.json",
    )


def _where_from(path: Path) -> str:
    """Return how to obtain the COCO file or image folder at ``path``."""
    if path.suffix == ".json":
        url = _ANNOTATIONS_URL.format(year=path.stem[-4:])
    else:
        url = _IMAGES_URL.format(folder=path.name)
    return f"Download {url} and unpack it so that {path} exists."


def _drop_segmentation(entry: JsonObject) -> JsonObject:
    """Remove the masks of an annotation while it is parsed: most of the file, never used."""
    entry.pop("segmentation", None)
    return entry


def _read_official(path: Path) -> JsonObject:
    """Read an official COCO annotation file."""
    return read_coco_json(path, missing_hint=_where_from(path), object_hook=_drop_segmentation)


def read_instances(path: Path, folder: str) -> JsonObject:
    """Read and check ``instances_{train,val}<year>.json``, leaving out the masks.

    Args:
        path: The file.
        folder: Such as ``"train2017"``: what the file must be about.

    Returns:
        Its content, with unique image and annotation ids and no reference into the void.

    Raises:
        FileNotFoundError: There is no such file; says where it comes from.
        ValueError: It is broken, of another year, of the other half of COCO, a captions file, or
            its entries contradict each other.
    """
    content = _read_official(path)
    _check_kind(content, path, wanted="bbox", other="caption")
    images = index_by_id(get_entries(content, "images", _IMAGE_FIELDS, path), "images", path)
    _check_year_and_half(content, path, folder)
    boxes = get_entries(content, "annotations", _BOX_FIELDS, path)
    index_by_id(boxes, "annotations", path)
    categories = get_entries(content, "categories", _CATEGORY_FIELDS, path)
    category_ids = index_by_id(categories, "categories", path)
    for box in boxes:
        for key, known in (("image_id", images), ("category_id", category_ids)):
            if box[key] not in known:
                raise ValueError(
                    f"{path}: annotation {box['id']} has {key} {box[key]}, which the file does "
                    "not contain."
                )
    return content


def read_captions(path: Path, folder: str) -> dict[int, list[str]]:
    """Read and check ``captions_{train,val}<year>.json``.

    Args:
        path: The file.
        folder: Such as ``"train2017"``: what the file must be about.

    Returns:
        Image id -> its captions in the order of their ids, without surrounding white space and
        without empty ones.

    Raises:
        FileNotFoundError: There is no such file; says where it comes from.
        ValueError: It is broken, of another year, of the other half of COCO, or not of captions.
    """
    content = _read_official(path)
    _check_kind(content, path, wanted="caption", other="bbox")
    get_entries(content, "images", _IMAGE_FIELDS, path)
    _check_year_and_half(content, path, folder)
    entries = get_entries(content, "annotations", _CAPTION_FIELDS, path)
    index_by_id(entries, "annotations", path)
    captions: dict[int, list[str]] = defaultdict(list)
    for entry in sorted(entries, key=lambda each: each["id"]):
        text = " ".join(entry["caption"].split())
        if text:
            captions[entry["image_id"]].append(text)
    return dict(captions)


def _check_kind(content: JsonObject, path: Path, *, wanted: str, other: str) -> None:
    """Raise ValueError if the annotations have the field ``other`` in place of ``wanted``."""
    annotations = content.get("annotations")
    first = annotations[0] if isinstance(annotations, list) and annotations else {}
    if isinstance(first, dict) and wanted not in first and other in first:
        kinds = {
            "bbox": "boxes (instances_*.json)",
            "caption": "captions (captions_*.json)",
        }
        raise ValueError(
            f"{path}: expected {kinds[wanted]}, found {kinds[other]}. Are the instances and the "
            "captions file swapped?"
        )


def _check_year_and_half(content: JsonObject, path: Path, folder: str) -> None:
    """Raise ValueError if the images are not those of ``folder``, as far as the file says."""
    wanted = int(folder[-4:])
    year = content["info"].get("year") if isinstance(content.get("info"), dict) else None
    if year not in (None, wanted):
        raise ValueError(f"{path}: expected COCO {wanted} ({folder}), found info.year {year}.")
    if not content["images"]:
        raise ValueError(f"{path}: 'images' is empty.")
    prefix = f"COCO_{folder}_" if wanted == 2014 else ""
    for image in content["images"]:
        name = image["file_name"]
        if not name.startswith(prefix) or (not prefix and name.startswith("COCO_")):
            raise ValueError(
                f"{path}: expected file names of COCO {wanted} such as {prefix}000000000139.jpg, "
                f"found {name!r}. Use the annotations of {wanted}."
            )
        url = image.get("coco_url", "")
        if url and f"/{folder}/" not in url:
            raise ValueError(f"{path}: expected images of {folder}, found {url}.")


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
                f"{'nothing' if found is None else repr(found)} under this id."
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
        FileNotFoundError: An input does not exist; says where it comes from.
        ValueError: An input is wrong, see :func:`read_instances` and :func:`read_captions`, or
            pictures are missing, or ``variant`` does not define a split.
    """
    for split in splits:
        if split not in variant.splits():
            raise ValueError(f"COCO {variant.year} is prepared for 65_15 alone, not {split.name}.")
    annotations = Path(root) / "coco" / "annotations"
    output = annotations if output is None else Path(output)
    files = _annotation_files(variant)
    for name in files:  # all of them before minutes of parsing
        path = annotations / name
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist. {_where_from(path)}")
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
            f"list, first {missing[0]}: a partial download? {_where_from(folder)}"
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
    if not summary.is_as_expected:
        _LOGGER.warning(
            "%s holds %d images, but the official annotations give %d: the input differs from "
            "COCO as published.",
            path, summary.num_images, summary.expected_images,
        )  # fmt: skip
    return summary
