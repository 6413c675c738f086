"""A dataset of your own as a YAML file: where its COCO files lie, which names are base and novel.

::

    name: fruit                  # datasets fruit_train_base, fruit_val_base, fruit_val_novel, ...
    train:
      json: train.json           # COCO's layout, all classes in one file
      images: train              # folder; all paths are relative to this YAML
      captions: captions.json    # optional: COCO's captions layout, or from_class_names
    val:
      json: val.json
      images: val
    base: [apple, pear]          # with boxes in training
    novel: [kiwi]                # without

Without ``base`` and ``novel`` the file has a ``val`` alone, all of whose categories are evaluated:
transfer to another dataset. This module reads and checks the YAML; it opens no other file.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

__all__ = ["CAPTION_TEMPLATE", "Definition", "Half", "caption_of", "read_definition"]

# Caption of an image that has none, where the YAML asks for one; {} stands for the names of the
# base classes in the image, each with its article. [ours]
CAPTION_TEMPLATE = "a photo of {}."
FROM_CLASS_NAMES = "from_class_names"
_LVIS_DETECTIONS = 300  # per image. [LVIS, Gupta et al., CVPR 2019]

_KEYS = (
    *("name", "format", "train", "val", "base", "novel", "rename", "clean_names"),
    *("caption_template", "detections_per_image"),
)
_HALF_KEYS = {"train": ("json", "images", "captions"), "val": ("json", "images")}
_FORMATS = ("coco", "lvis")


@dataclass(frozen=True)
class Half:
    """The training or the validation half of a dataset.

    Attributes:
        json: Annotations of all classes in COCO's (or LVIS's) layout.
        images: Folder that ``file_name`` is relative to.
        captions: Captions in COCO's layout; None where the images of ``json`` carry them
            (``captions``, a list of strings) or there are none.
        make_captions: Whether images without a caption get one made of class names.
    """

    json: Path
    images: Path
    captions: Path | None = None
    make_captions: bool = False


@dataclass(frozen=True)
class Definition:
    """What a YAML says.

    Attributes:
        path: The YAML.
        name: Start of the names of its datasets.
        train: The training half; None for a dataset that is only evaluated on.
        val: The half to evaluate on; None for one that is only trained on.
        base: Categories with boxes in training, as the JSON calls them.
        novel: Categories without, likewise. Both empty: all categories of ``val`` count.
        lvis: Whether ``val`` is annotated in LVIS's federated way.
        clean_names: Whether "_" in category names is read as a space.
        rename: Category name of the JSON -> what CLIP is asked for, and results are called.
        caption_template: Of captions made of class names, with one "{}".
        detections_per_image: Instead of the config's; None = the config's.
    """

    path: Path
    name: str
    train: Half | None = None
    val: Half | None = None
    base: tuple[str, ...] = ()
    novel: tuple[str, ...] = ()
    lvis: bool = False
    clean_names: bool = False
    rename: Mapping[str, str] = field(default_factory=dict)
    caption_template: str = CAPTION_TEMPLATE
    detections_per_image: int | None = None

    @property
    def has_split(self) -> bool:
        """Whether base or novel names are declared."""
        return bool(self.base or self.novel)

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """The parts of ``val`` and their categories: base, novel, all. ``all: ()`` = whatever."""
        named = {"base": self.base, "novel": self.novel}
        groups = {group: names for group, names in named.items() if names}
        return groups if len(groups) == 1 else groups | {"all": self.base + self.novel}

    def spoken(self, category: str) -> str:
        """What CLIP is asked for a category of the JSON."""
        if category in self.rename:
            return self.rename[category]
        return " ".join(category.replace("_", " ").split()) if self.clean_names else category


def caption_of(names: Sequence[str], template: str) -> str:
    """A caption that names each class once: "a photo of a cat and an apple."."""
    things = [f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}" for name in names]
    listed = ", ".join(things[:-1]) + (" and " if len(things) > 1 else "") + things[-1]
    return template.replace("{}", listed)


def read_definition(path: str | Path) -> Definition:
    """Read and check a YAML.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not YAML, has an unknown key or a value of the wrong kind, or its names
            contradict each other. The file and the key are named.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"DATASETS.DEFINITIONS: no file {str(path)!r}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    _check_keys(content, _KEYS, str(path))
    name = content.get("name")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise ValueError(f"{path}: 'name' must be letters, digits, '_' and '-', found {name!r}")
    style = content.get("format", "coco")
    if style not in _FORMATS:
        raise ValueError(f"{path}: 'format' must be one of {_FORMATS}, found {style!r}")
    definition = Definition(
        path=path,
        name=name,
        train=_half(content, "train", path),
        val=_half(content, "val", path),
        base=_names(content, "base", path),
        novel=_names(content, "novel", path),
        lvis=style == "lvis",
        clean_names=_of_type(content, "clean_names", bool, style == "lvis", path),
        rename=_rename(content, path),
        caption_template=_of_type(content, "caption_template", str, CAPTION_TEMPLATE, path),
        detections_per_image=_of_type(
            content, "detections_per_image", int, _LVIS_DETECTIONS if style == "lvis" else 0, path
        )
        or None,
    )
    _check_sense(definition)
    return definition


def _check_keys(content: object, known: Sequence[str], where: str) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"{where}: expected keys such as {known[0]!r}, found {content!r}")
    for key in content:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, 1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{where}: unknown key {key!r}, expected some of {list(known)}{hint}")


def _of_type(content: Mapping[str, Any], key: str, kind: type, default: Any, path: Path) -> Any:
    value = content.get(key, default)
    wrong = isinstance(value, int) and kind is int and (isinstance(value, bool) or value < 0)
    if wrong or not isinstance(value, kind):
        raise ValueError(f"{path}: {key!r} must be of type {kind.__name__}, found {value!r}")
    return value


def _half(content: Mapping[str, Any], key: str, path: Path) -> Half | None:
    """Read ``train`` or ``val``."""
    value = content.get(key)
    if value is None:
        return None
    _check_keys(value, _HALF_KEYS[key], f"{path}: {key!r}")
    for needed in ("json", "images"):
        if needed not in value:
            raise ValueError(f"{path}: {key!r} has no {needed!r}")
    for each, text in value.items():
        if not isinstance(text, str) or not text:
            raise ValueError(f"{path}: {key}.{each} must be a path, found {text!r}")
    captions = value.get("captions")
    made = captions == FROM_CLASS_NAMES
    folder = path.parent
    return Half(
        json=folder / Path(value["json"]).expanduser(),
        images=folder / Path(value["images"]).expanduser(),
        captions=folder / Path(captions).expanduser() if captions and not made else None,
        make_captions=made,
    )


def _names(content: Mapping[str, Any], key: str, path: Path) -> tuple[str, ...]:
    """Read ``base`` or ``novel``."""
    value = content.get(key) or []
    if not isinstance(value, list):
        raise ValueError(f"{path}: {key!r} must be a list of category names, found {value!r}")
    wrong = [each for each in value if not isinstance(each, str) or not each.strip()]
    if wrong:
        raise ValueError(
            f"{path}: {key!r} must hold category names, found {wrong[0]!r}; YAML reads some words "
            "(yes, no, on, off, null) and numbers as values: put them in quotes"
        )
    repeated = sorted({each for each in value if value.count(each) > 1})
    if repeated:
        raise ValueError(f"{path}: {key!r} repeats {repeated}")
    return tuple(value)


def _rename(content: Mapping[str, Any], path: Path) -> dict[str, str]:
    value = content.get("rename") or {}
    if not isinstance(value, dict) or not all(
        isinstance(each, str) and each.strip() for pair in value.items() for each in pair
    ):
        raise ValueError(f"{path}: 'rename' must map category names to names, found {value!r}")
    return value


def _check_sense(definition: Definition) -> None:
    """Raise ValueError if the keys of a YAML contradict each other."""
    path = definition.path
    both = sorted(set(definition.base) & set(definition.novel))
    if both:
        raise ValueError(f"{path}: both base and novel: {both}")
    if definition.train is None and definition.val is None:
        raise ValueError(f"{path}: neither 'train' nor 'val' is given")
    if definition.train is not None and not definition.base:
        raise ValueError(f"{path}: 'train' needs 'base', the names of the classes to train on")
    if definition.lvis and definition.train is not None:
        raise ValueError(f"{path}: format 'lvis' is for evaluation: leave 'train' out")
    if definition.caption_template.count("{}") != 1:
        raise ValueError(
            f"{path}: 'caption_template' must have one {{}}, found {definition.caption_template!r}"
        )
