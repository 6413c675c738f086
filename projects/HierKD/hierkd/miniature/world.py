"""The miniature: a rendered open-vocabulary world in COCO's layout.

Small pictures of icon glyphs on coloured backgrounds. Every training picture has boxes of the base
classes only; novel classes appear in training pictures too, without a box, but captions name them:
the situation of HierKD on COCO, in a size that two CPU cores can train in minutes. The glyphs come
from the icon fonts of the package ``qtawesome`` (Font Awesome, Material Design, Phosphor, Elusive),
whose files are read without importing it, so Qt is not needed.

Frame: boxes are XYXY (XYWH in the JSON), absolute pixels of the stored picture.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from hierkd.data.coco import datasets_root, register_ovd_dataset
from hierkd.data.definitions import caption_of
from hierkd.files import write_json_atomically

__all__ = ["MINIATURE_BASE", "MINIATURE_CLASSES", "MINIATURE_NOVEL", "MiniatureSpec", "Scene"]
__all__ += ["ensure_miniature", "make_captions", "miniature_root", "register_miniature"]
__all__ += ["render_scene"]

logger = logging.getLogger(__name__)

_Mask = npt.NDArray[np.float32]

_FONTS = {
    "fa": "fontawesome6-solid-webfont",
    "md": "materialdesignicons6-webfont",
    "ph": "phosphor",
    "el": "elusiveicons-webfont",
}

# Designs of each class: font and glyph name.
_GLYPHS: dict[str, tuple[str, ...]] = {
    "airplane": ("fa.plane", "ph.airplane-fill"),
    "apple": ("fa.apple-whole", "md.food-apple"),
    "bell": ("fa.bell", "md.bell"),
    "bicycle": ("fa.bicycle", "ph.bicycle-fill"),
    "book": ("fa.book", "fa.book-open"),
    "burger": ("fa.burger", "md.hamburger"),
    "bus": ("fa.bus", "md.bus-side"),
    "cake": ("fa.cake-candles", "md.cake-variant"),
    "camera": ("fa.camera", "fa.camera-retro"),
    "car": ("fa.car-side", "md.car-side"),
    "cat": ("fa.cat", "md.cat"),
    "chair": ("fa.chair", "md.chair-rolling"),
    "clock": ("fa.clock", "ph.alarm-fill"),
    "couch": ("fa.couch", "md.sofa"),
    "cow": ("fa.cow", "md.cow"),
    "cup": ("fa.mug-hot", "md.coffee"),
    "dog": ("fa.dog", "md.dog-side"),
    "duck": ("md.duck",),
    "elephant": ("fa.republican", "md.elephant"),
    "fish": ("fa.fish", "fa.fish-fins"),
    "horse": ("fa.horse", "md.horse"),
    "key": ("fa.key", "md.key"),
    "laptop": ("fa.laptop", "el.laptop"),
    "pig": ("md.pig", "md.pig-variant"),
    "pizza": ("fa.pizza-slice", "md.pizza"),
    "rocket": ("fa.rocket", "md.rocket"),
    "scissors": ("fa.scissors", "ph.scissors-fill"),
    "spider": ("fa.spider", "md.spider"),
    "train": ("fa.train", "md.train"),
    "tree": ("fa.tree", "ph.tree-fill"),
    "truck": ("fa.truck", "fa.truck-pickup"),
    "umbrella": ("fa.umbrella", "ph.umbrella-fill"),
}

# In id order (ids are 1, 2, ...), which is alphabetical: base and novel alternate as on COCO.
MINIATURE_CLASSES: tuple[str, ...] = tuple(sorted(_GLYPHS))
MINIATURE_NOVEL: tuple[str, ...] = (
    *("airplane", "bus", "cake", "cat", "cup", "elephant", "scissors", "umbrella"),
)
MINIATURE_BASE: tuple[str, ...] = tuple(c for c in MINIATURE_CLASSES if c not in MINIATURE_NOVEL)

_SPLITS = ("train", "val", "test")
_VOCABULARIES = {"base": MINIATURE_BASE, "novel": MINIATURE_NOVEL, "all": MINIATURE_CLASSES}
_GLYPH_PX = 160  # glyphs are rendered once at this size, then resized

_CAPTIONS = (
    "a photo of {}.",
    "a picture of {}.",
    "there is {} in the picture.",
    "this picture shows {}.",
    "{} on a colorful background.",
    "an image with {}.",
)


@dataclass(frozen=True)
class MiniatureSpec:
    """What a world is made of. Two worlds of equal specs are the same to the byte."""

    seed: int = 0
    train_images: int = 1200
    val_images: int = 200
    test_images: int = 400
    size: int = 128  # px
    min_objects: int = 2
    max_objects: int = 4
    min_object_px: int = 28  # longer side
    max_object_px: int = 70
    novel_probability: float = 0.4  # of an object beyond the first, in training pictures
    captions_per_image: int = 5
    named_probability: float = 0.75  # of a class of the picture, in each caption
    version: int = 1  # of the renderer: raised when the same spec gives other pictures


class Scene(NamedTuple):
    """A rendered picture and what is in it."""

    picture: npt.NDArray[np.uint8]  # (H, W, 3) RGB
    names: list[str]  # class of each object
    boxes: npt.NDArray[np.float64]  # (M, 4) XYXY, tight around the glyph's pixels


# ------------------------------------------------------------------------------ rendering


@cache
def _font(key: str) -> tuple[ImageFont.FreeTypeFont, dict[str, str]]:
    """The font file and its glyph name -> hexadecimal code point table."""
    spec = importlib.util.find_spec("qtawesome")
    folder = Path(spec.origin or "").parent / "fonts" if spec else Path()
    tables = sorted(folder.glob(f"{_FONTS[key]}-charmap-*.json"))
    if not tables:
        raise ModuleNotFoundError(
            f"the miniature world is drawn with the icon fonts of the package qtawesome; no "
            f"{_FONTS[key]}-charmap-*.json in {folder}: pip install -e '.[miniature]'"
        )
    version = tables[-1].stem.rsplit("-", 1)[1]
    font = ImageFont.truetype(str(folder / f"{_FONTS[key]}-{version}.ttf"), _GLYPH_PX)
    return font, json.loads(tables[-1].read_text())


@cache
def _glyph(design: str) -> _Mask:
    """A design as a mask in [0, 1], cropped to its ink."""
    key, name = design.split(".", 1)
    font, table = _font(key)
    canvas = Image.new("L", (2 * _GLYPH_PX, 2 * _GLYPH_PX))
    character = chr(int(table[name], 16))
    ImageDraw.Draw(canvas).text((_GLYPH_PX // 2, _GLYPH_PX // 2), character, 255, font)
    return np.asarray(canvas.crop(canvas.getbbox())).astype(np.float32) / np.float32(255)


def _object_mask(name: str, longer_side: int, rng: np.random.Generator) -> _Mask:
    """One design of a class, flipped and turned at random, at its final size."""
    designs = _GLYPHS[name]
    mask = _glyph(designs[rng.integers(len(designs))])
    if rng.random() < 0.5:
        mask = mask[:, ::-1]
    height, width = mask.shape
    turn = cv2.getRotationMatrix2D((width / 2, height / 2), rng.uniform(-15, 15), 1.0)
    margin = max(height, width) // 4  # room for the corners
    turn[:, 2] += margin
    turned = cv2.warpAffine(
        np.ascontiguousarray(mask), turn, (width + 2 * margin, height + 2 * margin)
    )
    rows, columns = (turned > 0.5).any(axis=1).nonzero()[0], (turned > 0.5).any(axis=0).nonzero()[0]
    turned = turned[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = longer_side / max(turned.shape)
    size = [max(1, round(side * scale)) for side in turned.shape[::-1]]
    return np.asarray(cv2.resize(turned, size, interpolation=cv2.INTER_AREA), dtype=np.float32)


def _background(size: int, rng: np.random.Generator) -> npt.NDArray[np.float32]:
    """Soft colour fields with faint lines and discs."""
    field = rng.uniform(70, 205) + rng.uniform(-38, 38, (3, 3, 3))  # muted: objects are colourful
    picture = cv2.resize(field.astype(np.float32), (size, size), interpolation=cv2.INTER_CUBIC)
    clutter = picture.copy()
    for _ in range(rng.integers(4, 9)):
        colour = tuple(float(c) for c in rng.uniform(40, 215, 3))
        x0, y0, x1, y1 = (int(v) for v in rng.integers(0, size, 4))
        if rng.random() < 0.5:
            cv2.line(clutter, (x0, y0), (x1, y1), colour, int(rng.integers(1, 4)), cv2.LINE_AA)
        else:
            cv2.circle(clutter, (x0, y0), int(rng.integers(3, 16)), colour, -1, cv2.LINE_AA)
    blended: npt.NDArray[np.float32] = np.float32(0.65) * picture + np.float32(0.35) * clutter
    return blended


def _paint(picture: npt.NDArray[np.float32], mask: _Mask, x: int, y: int, rng: Any) -> None:
    """Fill the mask with a colour gradient that stands out from what lies under it."""
    height, width = mask.shape
    window = picture[y : y + height, x : x + width]
    under = window.mean(axis=(0, 1))
    colours = rng.uniform(0, 255, (24, 3))
    far = colours[np.abs(colours - under).sum(axis=1) > 230]
    colours = far if len(far) >= 2 else np.stack([255 - under, (under < 128) * 255.0])
    ramp = np.linspace(0, 1, height)[:, None, None]
    fill = colours[0] * (1 - ramp) + (0.7 * colours[0] + 0.3 * colours[1]) * ramp
    window[:] = window * (1 - mask[..., None]) + fill * mask[..., None]


def render_scene(names: Sequence[str], spec: MiniatureSpec, rng: np.random.Generator) -> Scene:
    """Draw a picture with one object per name of :data:`MINIATURE_CLASSES`, which may repeat.

    An object that finds no free place is left out; the first one always finds one.
    """
    picture = _background(spec.size, rng)
    drawn: list[str] = []
    boxes: list[tuple[int, int, int, int]] = []
    for name in names:
        longer_side = int(rng.integers(spec.min_object_px, spec.max_object_px + 1))
        mask = _object_mask(name, min(longer_side, spec.size), rng)
        height, width = mask.shape
        for _ in range(30):
            x = int(rng.integers(0, spec.size - width + 1))
            y = int(rng.integers(0, spec.size - height + 1))
            if all(
                x >= x1 or x + width <= x0 or y >= y1 or y + height <= y0
                for x0, y0, x1, y1 in boxes
            ):
                _paint(picture, mask, x, y, rng)
                drawn.append(name)
                boxes.append((x, y, x + width, y + height))
                break
    noisy = picture + rng.normal(0, 5, picture.shape)
    return Scene(noisy.clip(0, 255).astype(np.uint8), drawn, np.asarray(boxes, dtype=np.float64))


def make_captions(
    names: Sequence[str], number: int, named_probability: float, rng: np.random.Generator
) -> list[str]:
    """Captions from templates, each naming every class with the given probability, at least one."""
    classes = list(dict.fromkeys(names))
    captions = []
    for _ in range(number):
        named = [name for name in classes if rng.random() < named_probability]
        named = named or [classes[rng.integers(len(classes))]]
        rng.shuffle(named)
        captions.append(caption_of(named, _CAPTIONS[rng.integers(len(_CAPTIONS))]))
    return captions


def _draw_names(spec: MiniatureSpec, split: str, rng: np.random.Generator) -> list[str]:
    """Classes of a picture: in training the first is base; elsewhere half of them are novel."""
    number = int(rng.integers(spec.min_objects, spec.max_objects + 1))
    novel = rng.random(number) < (spec.novel_probability if split == "train" else 0.5)
    novel[0] &= split != "train"
    return [str(rng.choice(MINIATURE_NOVEL if is_novel else MINIATURE_BASE)) for is_novel in novel]


# ------------------------------------------------------------------------------ files


def miniature_root() -> Path:
    """Where the world lies: ``$DETECTRON2_DATASETS/miniature``."""
    return Path(datasets_root()) / "miniature"


def ensure_miniature(root: Path, spec: MiniatureSpec) -> None:
    """Render the world into ``root``, unless a complete one of the same spec is there.

    It is written next to its place and then moved, so an interrupted call leaves the old world or
    none. Other files in ``root`` (the teacher, the warm start) stay.
    """
    stamp = root / "annotations" / "spec.json"
    if (
        stamp.is_file()
        and json.loads(stamp.read_text()) == asdict(spec)
        and all(
            len(list((root / split).glob("*.jpg"))) == getattr(spec, f"{split}_images")
            for split in _SPLITS
        )
    ):
        logger.info("The miniature world in %s is up to date", root)
        return
    root.mkdir(parents=True, exist_ok=True)
    making = root / f".making-{os.getpid()}"
    shutil.rmtree(making, ignore_errors=True)  # of a killed process that had this id
    try:
        for split in _SPLITS:
            _write_split(making, split, spec)
        write_json_atomically(making / "annotations" / "spec.json", asdict(spec))
        # Annotations go last: without their spec.json a world counts as missing.
        shutil.rmtree(root / "annotations", ignore_errors=True)
        for name in (*_SPLITS, "annotations"):
            shutil.rmtree(root / name, ignore_errors=True)
            os.replace(making / name, root / name)
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _write_split(folder: Path, split: str, spec: MiniatureSpec) -> None:
    """Render one split and write its annotation files: a part's boxes and their pictures."""
    (folder / split).mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    number = getattr(spec, f"{split}_images")
    for index in tqdm(range(number), desc=f"rendering the world: {split}", unit="picture"):
        rng = np.random.default_rng((spec.seed, _SPLITS.index(split), index))
        scene = render_scene(_draw_names(spec, split, rng), spec, rng)
        file_name = f"{index:05d}.jpg"
        Image.fromarray(scene.picture).save(folder / split / file_name, quality=92)
        image = {"id": index + 1, "file_name": file_name, "width": spec.size, "height": spec.size}
        captions = make_captions(scene.names, spec.captions_per_image, spec.named_probability, rng)
        images.append(image | {"captions": captions})
        for name, (x0, y0, x1, y1) in zip(scene.names, scene.boxes.tolist(), strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": MINIATURE_CLASSES.index(name) + 1,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                    "iscrowd": 0,
                }
            )
    for part in _parts(split):
        ids = {MINIATURE_CLASSES.index(name) + 1: name for name in _VOCABULARIES[part]}
        kept = [annotation for annotation in annotations if annotation["category_id"] in ids]
        with_box = {annotation["image_id"] for annotation in kept}
        content = {
            "info": {"description": "HierKD miniature"},
            "categories": [{"id": i, "name": name} for i, name in ids.items()],
            "images": [image for image in images if image["id"] in with_box],
            "annotations": kept,
        }
        write_json_atomically(folder / "annotations" / f"{split}_{part}.json", content)


def _parts(split: str) -> tuple[str, ...]:
    """Whose boxes there are files of: in training of the base classes alone."""
    return ("base",) if split == "train" else tuple(_VOCABULARIES)


def register_miniature(root: str | None = None) -> None:
    """Register ``miniature_ovd_train_base`` and ``miniature_ovd_{val,test}_{base,novel,all}``.

    ``root`` holds the folder ``miniature``; by default it is :func:`datasets_root`.
    """
    folder = os.path.join(root or datasets_root(), "miniature")
    for split, part in [(each, part) for each in _SPLITS for part in _parts(each)]:
        vocabulary = _VOCABULARIES[part]
        register_ovd_dataset(
            f"miniature_ovd_{split}_{part}",
            json_file=os.path.join(folder, "annotations", f"{split}_{part}.json"),
            image_root=os.path.join(folder, split),
            vocabulary=vocabulary,
            base_classes=MINIATURE_BASE,
            novel_classes=MINIATURE_NOVEL,
            category_ids=[MINIATURE_CLASSES.index(c) + 1 for c in vocabulary],
            missing_hint="`python tools/prepare_miniature.py` makes the miniature.",
        )
