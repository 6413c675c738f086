"""From the official COCO annotations to the files of an open-vocabulary split (§4.1).

The recipe is OVR-CNN's (Zareian et al., CVPR 2021): keep the annotations of the wanted categories
and the images that have at least one of them, crowd regions counting. Images are *not* removed
for showing novel objects; in training these stay, without boxes. ``categories`` lists all
categories of the file in id order, also those without a box. COCO 2014 takes the rule of zero-shot
detection instead (:class:`hierkd.data.splits.CocoVariant`). Ours: training images carry their
captions, and fields that detection does not use are dropped, above all ``segmentation``.

COCO published its 123,287 annotated pictures twice, divided into a training and a validation half
in one way in 2014 and in another in 2017. Files of the two years, of the two halves, and of boxes
and captions are easily mixed up: every reader says which it wants, and refuses the others.
"""

from __future__ import annotations

import logging
import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

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
    "EXPECTED_BOXES",
    "EXPECTED_FULL_COCO",
    "Archive",
    "Figure",
    "InputState",
    "PartSummary",
    "build_part",
    "describe_inputs",
    "join_captions",
    "prepare_coco",
]

JsonObject = dict[str, Any]

_LOGGER = logging.getLogger(__name__)

_ANNOTATIONS_URL = "http://images.cocodataset.org/annotations/annotations_trainval{year}.zip"
_IMAGES_URL = "http://images.cocodataset.org/zips/{folder}.zip"
_SIZES = {"train2014": "13 GB", "val2014": "6 GB", "train2017": "18 GB", "val2017": "1 GB"}
_TAIL_BYTES = 64  # how much of a JSON's end is searched for its last brace [ours]


class Figure(NamedTuple):
    """A count that somebody else stated, and whose it is."""

    value: int
    source: str


# OVR-CNN's images: val, alirezazareian/ovr-cnn issue 17; train, the 6,736 iterations of 16 images
# that are an epoch in HierKD's release. Its boxes: often quoted, and verified by nobody we know.
_OVR_CNN, _QUOTED = "OVR-CNN's files", "a quoted, unverified figure"
# Counted in salman-h-khan/PL-ZSD_Release, MSCOCO/validation_coco_unseen_{all,seen_all_gzsd}.csv.
# These list boxes, crowd regions among them (image 255165), in whole pixels, and state no rule.
_PL_ZSD = "PL-ZSD's lists, which state no rule"

EXPECTED_FULL_COCO: dict[tuple[str, str], Figure] = {
    ("48_17", "train_base"): Figure(107_761, _OVR_CNN),
    ("48_17", "val_base"): Figure(4_533, _OVR_CNN),
    ("48_17", "val_novel"): Figure(2_064, _OVR_CNN),
    ("48_17", "val_all"): Figure(4_836, _OVR_CNN),
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


class PartSummary(NamedTuple):
    """What one written file holds, crowd regions included, beside what others count.

    They count nothing where the input is not the whole of COCO or nobody stated a figure.
    """

    split: str  # with the year unless it is 2017
    part: str
    path: Path
    num_images: int
    num_boxes: int
    num_captions: int
    expected_images: Figure | None
    expected_boxes: Figure | None
    changed: bool  # the file is new or differs from the one that was there


# ------------------------------------------------------------------------------ the official files


class Archive(NamedTuple):
    """A file to download, and to unpack in the folder ``coco``; its size is for people."""

    url: str
    size: str


class InputState(NamedTuple):
    """What is at the place of a file or folder that COCO needs, and the archive that has it.

    ``"PARTIAL"`` is a JSON that is cut off, or a folder with fewer pictures than COCO has; which
    pictures is only known to the annotations.
    """

    path: Path
    state: Literal["found", "PARTIAL", "MISSING"]
    detail: str
    archive: Archive


def describe_inputs(
    root: str | os.PathLike[str], variant: CocoVariant = COCO_2017
) -> list[InputState]:
    """Look at every file and folder that COCO needs below ``root``: no file is read as a whole."""
    coco = Path(root) / "coco"
    files = [_state_of_json(coco / "annotations" / name) for name in _annotation_files(variant)]
    folders = [_state_of_folder(coco / name, full) for name, full in variant.num_images.items()]
    return files + folders


def _state_of_json(path: Path) -> InputState:
    """Whether there is a JSON object at ``path``, judged by its first and last bytes."""
    archive = _archive_of(path)
    if not path.is_file():
        return InputState(path, "MISSING", "does not exist", archive)
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(1)
        file.seek(max(0, size - _TAIL_BYTES))
        last = file.read().rstrip()[-1:]
    if first != b"{":
        return InputState(path, "PARTIAL", f"{size:,} bytes, and no JSON object", archive)
    if last != b"}":
        return InputState(path, "PARTIAL", f"cut off after {size:,} bytes", archive)
    return InputState(path, "found", f"{size:,} bytes", archive)


def _state_of_folder(path: Path, full: int) -> InputState:
    """Whether the folder ``path`` has as many pictures as COCO has, which is ``full``."""
    if not path.is_dir():
        return InputState(path, "MISSING", "does not exist", _archive_of(path))
    number = sum(name.endswith(".jpg") for name in os.listdir(path))
    detail = f"{number:,} of the {full:,} pictures of the whole COCO"
    state: Literal["found", "PARTIAL"] = "found" if number >= full else "PARTIAL"
    return InputState(path, state, detail, _archive_of(path))


def _annotation_files(variant: CocoVariant) -> tuple[str, ...]:
    """Names of the official files that are read."""
    kinds = (("instances", variant.train), ("instances", variant.val), ("captions", variant.train))
    return tuple(f"{kind}_{folder}.json" for kind, folder in kinds)


def _archive_of(path: Path) -> Archive:
    """Return the archive that has the COCO file or image folder at ``path``."""
    if path.suffix == ".json":
        return Archive(_ANNOTATIONS_URL.format(year=path.stem[-4:]), "241 MB")
    return Archive(_IMAGES_URL.format(folder=path.name), _SIZES[path.name])


def _where_from(path: Path) -> str:
    """Return how to obtain the COCO file or image folder at ``path``."""
    return f"Download {_archive_of(path).url} and unpack it so that {path} exists."


def _read_official(path: Path, *, wanted: str, other: str) -> JsonObject:
    """Read an official file whose annotations have the field ``wanted``, not ``other``."""

    def drop_masks(entry: JsonObject) -> JsonObject:  # most of the file, never used
        entry.pop("segmentation", None)
        return entry

    content = read_coco_json(path, missing_hint=_where_from(path), object_hook=drop_masks)
    annotations = content.get("annotations")
    first = annotations[0] if isinstance(annotations, list) and annotations else {}
    if isinstance(first, dict) and wanted not in first and other in first:
        kinds = {"bbox": "boxes (instances_*.json)", "caption": "captions (captions_*.json)"}
        raise ValueError(
            f"{path}: expected {kinds[wanted]}, found {kinds[other]}. Are the instances and the "
            "captions file swapped?"
        )
    return content


def _read_instances(path: Path, folder: str) -> JsonObject:
    """Read and check ``instances_{train,val}<year>.json``, which must be about ``folder``."""
    content = _read_official(path, wanted="bbox", other="caption")
    check_annotations(content, path)
    _check_year_and_half(content, path, folder)
    return content


def _read_captions(path: Path, folder: str) -> dict[int, list[str]]:
    """Read and check captions: image id -> its captions, in the order of their ids, none empty."""
    content = _read_official(path, wanted="caption", other="bbox")
    images = get_entries(content, "images", {"id": int, "file_name": str}, path)
    known = index_by_id(images, "images", path)
    _check_year_and_half(content, path, folder)
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
    return dict(captions)


def _check_year_and_half(content: JsonObject, path: Path, folder: str) -> None:
    """Raise ValueError if the images are not those of ``folder``, as far as the file says."""
    wanted = int(folder[-4:])
    year = content["info"].get("year") if isinstance(content.get("info"), dict) else None
    if year not in (None, wanted):
        raise ValueError(f"{path}: expected COCO {wanted}, found info.year {shown(year)}.")
    prefix = f"COCO_{folder}_" if wanted == 2014 else ""
    for image in content["images"]:
        name = image["file_name"]
        if not name.startswith(prefix) or (not prefix and name.startswith("COCO_")):
            raise ValueError(
                f"{path}: expected file names of COCO {wanted} such as {prefix}000000000139.jpg, "
                f"found {shown(name)}. Use the annotations of {wanted}."
            )
        # The files of 2014 were published with two kinds of URL; the older names no folder.
        url = str(image.get("coco_url", ""))
        if any(found != folder for found in re.findall(r"/((?:train|val|test)\d{4})/", url)):
            raise ValueError(f"{path}: expected images of {folder}, found {shown(url)}.")


# ------------------------------------------------------------------------------ the recipe


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
        names = some(category.name for category in categories)
        raise ValueError(f"{path}: no image has a box of any of the categories {names}.")
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
        captions: Image id -> captions.
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
        What the files hold, in order.

    Raises:
        FileNotFoundError: Inputs do not exist; says which ones and where they come from.
        ValueError: An input is broken, of another year, of the other half of COCO, or boxes in
            place of captions; pictures are missing; an image is in both halves; or ``variant``
            does not define a split.
    """
    for split in splits:
        if split not in variant.splits():
            raise ValueError(f"COCO {variant.year} is prepared for 65_15 alone, not {split.name}.")
    annotations = Path(root) / "coco" / "annotations"
    output = annotations if output is None else Path(output)
    paths = [annotations / name for name in _annotation_files(variant)]
    if missing := [path for path in paths if not path.is_file()]:  # before a minute of parsing
        others = ", ".join(path.name for path in missing[1:])
        raise FileNotFoundError(
            f"{missing[0]} does not exist{f', nor do {others}' if others else ''}. "
            f"{_where_from(missing[0])}"
        )
    halves, captions = _read_inputs(paths)
    if check_pictures:
        for folder, content in halves.items():
            _check_pictures(Path(root) / "coco" / folder, content)
    parts = [
        (f"{split.name}{variant.suffix}", name, part)
        for split in splits
        for name, part in _build_parts(split, variant, halves, captions, paths).items()
    ]
    summaries = []
    for split_name, name, part in tqdm(parts, desc="writing", unit="file"):
        path = output / f"ovd_{split_name}" / f"{name}.json"
        folder = variant.train if name == "train_base" else variant.val
        is_full = len(halves[folder]["images"]) == variant.num_images[folder]
        summaries.append(
            PartSummary(
                split=split_name,
                part=name,
                path=path,
                num_images=len(part["images"]),
                num_boxes=len(part["annotations"]),
                num_captions=sum(len(image.get("captions", [])) for image in part["images"]),
                expected_images=EXPECTED_FULL_COCO.get((split_name, name)) if is_full else None,
                expected_boxes=EXPECTED_BOXES.get((split_name, name)) if is_full else None,
                changed=write_json_atomically(path, part),
            )
        )
    return summaries


def _read_inputs(paths: Sequence[Path]) -> tuple[dict[str, JsonObject], dict[int, list[str]]]:
    """Read the instances by image folder, and the training captions by image id."""
    halves: dict[str, JsonObject] = {}
    captions: dict[int, list[str]] = {}
    for path in tqdm(paths, desc="reading", unit="file"):
        kind, folder = path.stem.split("_")
        if kind == "captions":
            captions = _read_captions(path, folder)
        else:
            halves[folder] = _read_instances(path, folder)
    train, val = ({image["id"] for image in half["images"]} for half in halves.values())
    if in_both := train & val:
        raise ValueError(
            f"{paths[0]} and {paths[1].name} must have no image in common, found {len(in_both):,}, "
            f"among them image {min(in_both)}."
        )
    return halves, captions


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
    halves: Mapping[str, JsonObject],
    captions: Mapping[int, list[str]],
    paths: Sequence[Path],
) -> dict[str, JsonObject]:
    """Return the content of each of the four files of ``split``."""
    train, val = halves[variant.train], halves[variant.val]
    without = split.novel if variant.zero_shot else ()
    showing = split.novel if variant.zero_shot else None
    train_base = build_part(train, split.base, paths[0], without=without)
    return {
        "train_base": join_captions(train_base, captions, paths[2]),
        "val_base": build_part(val, split.base, paths[1]),
        "val_novel": build_part(val, split.novel, paths[1]),
        "val_all": build_part(val, split.all, paths[1], showing=showing),
    }
