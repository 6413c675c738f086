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
transfer to another dataset. This module opens no other file than the YAML.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveInt,
    PrivateAttr,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from hierkd.data.coco_json import shown

__all__ = ["Definition", "Half", "TrainHalf", "caption_of", "read_definition"]

_FROM_CLASS_NAMES = Path("from_class_names")
# How LVIS spells names; detections per image. [LVIS, Gupta et al., CVPR 2019]
_LVIS_DEFAULTS = {"clean_names": True, "detections_per_image": 300}


def _resolve(value: object, info: ValidationInfo) -> Path:
    """A path relative to the YAML."""
    if not isinstance(value, str) or not value:
        raise ValueError("must be a path")
    yaml_path: Any = info.context
    is_word = value == str(_FROM_CLASS_NAMES) and info.field_name == "captions"
    return _FROM_CLASS_NAMES if is_word else yaml_path.parent / Path(value).expanduser()


_Path = Annotated[Path, BeforeValidator(_resolve)]
_Name = Annotated[str, StringConstraints(pattern=r"\S")]


class _Checked(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Half(_Checked):
    """The validation half of a dataset."""

    json_file: _Path = Field(alias="json")  # all classes, in COCO's (or LVIS's) layout
    images: _Path  # folder that `file_name` is relative to


class TrainHalf(Half):
    """The training half. Without ``captions`` the images of the JSON carry theirs, or have none."""

    captions: _Path | None = None

    @property
    def make_captions(self) -> bool:
        """Whether images without a caption get one made of class names."""
        return self.captions == _FROM_CLASS_NAMES


class Definition(_Checked):
    """What a YAML says."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
    format: Literal["coco", "lvis"] = "coco"  # lvis: `val` is annotated in LVIS's federated way
    train: TrainHalf | None = None
    val: Half | None = None
    base: list[_Name] = []  # as the JSON calls them
    novel: list[_Name] = []
    clean_names: bool = False  # "_" in category names is read as a space
    rename: dict[_Name, _Name] = {}  # category -> what CLIP is asked for, and results are called
    # Of an image that has no caption, where one is asked for; {} stands for the names of the base
    # classes in the image, each with its article. [ours]
    caption_template: str = "a photo of {}."
    detections_per_image: PositiveInt | None = None  # None: the config's
    _path: Path = PrivateAttr()

    def model_post_init(self, context: Path) -> None:
        """Keep where it is from."""
        self._path = context

    @property
    def path(self) -> Path:
        """The YAML."""
        return self._path

    @property
    def lvis(self) -> bool:
        """Whether ``val`` is annotated in LVIS's federated way."""
        return self.format == "lvis"

    @property
    def has_split(self) -> bool:
        """Whether base or novel names are declared."""
        return bool(self.base or self.novel)

    def parts(self, kind: str) -> dict[str, list[str]]:
        """The parts of "train" or "val" and their categories; none stands for all there are."""
        if kind == "train":
            return {"train_base": self.base}
        named = {"val_base": self.base, "val_novel": self.novel}
        parts = {part: names for part, names in named.items() if names}
        return parts if len(parts) == 1 else parts | {"val_all": self.base + self.novel}

    def spoken(self, category: str) -> str:
        """What CLIP is asked for a category of the JSON."""
        if category in self.rename:
            return self.rename[category]
        return " ".join(category.replace("_", " ").split()) if self.clean_names else category

    @model_validator(mode="after")
    def _check_sense(self) -> Self:
        both = sorted(set(self.base) & set(self.novel))
        named = self.base + self.novel
        repeated = sorted({name for name in named if named.count(name) > 1})
        problems = {
            f"both base and novel: {both}": both,
            f"'base' or 'novel' repeats {repeated}": repeated,
            "neither 'train' nor 'val' is given": not (self.train or self.val),
            "'train' needs 'base', the names of the classes to train on": (
                self.train and not self.base
            ),
            "format 'lvis' is for evaluation: leave 'train' out": self.lvis and self.train,
            f"'caption_template' must have one {{}}, found {self.caption_template!r}": (
                self.caption_template.count("{}") != 1
            ),
        }
        for problem, is_so in problems.items():
            if is_so:
                raise ValueError(problem)
        return self


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
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected keys such as 'name', found {shown(content)}")
    if "names" in content:
        raise ValueError(
            f"{path}: 'names' is a key of YOLO's data.yaml; expected 'name', 'base', 'novel', and "
            "'train' and 'val', each with 'json' (boxes in COCO's layout) and 'images'"
        )
    content = {key: value for key, value in content.items() if value is not None}
    if content.get("format") == "lvis":
        content = _LVIS_DEFAULTS | content
    try:
        return Definition.model_validate(content, context=path)
    except ValidationError as error:
        problems = "; ".join(_problem(each) for each in error.errors(include_url=False))
        raise ValueError(f"{path}: {problems}") from error


def _problem(error: Any) -> str:
    """A field, what was expected of it, and what was found."""
    expected = error["msg"].removeprefix("Value error, ")
    if not error["loc"]:
        return str(expected)
    if error["type"] == "extra_forbidden":
        expected = f"is no key here; known are {', '.join(Definition.model_fields)}"
    elif error["type"] == "string_type":  # YAML reads yes, no, on, off and numbers as values
        expected += " (in quotes, where YAML takes it for a value)"
    return f"{'.'.join(map(str, error['loc']))}: {expected}, found {shown(error['input'])}"
