"""Which COCO categories are base, novel or unused: the only category lists of the project.

Two splits of the 80 COCO detection categories are in use (§4.1 of the paper):

- ``48_17``: 48 base and 17 novel categories; the other 15 are neither labelled in training nor
  scored. Drawn by Bansal et al., "Zero-Shot Object Detection" (ECCV 2018), and taken over by
  Zareian et al., "Open-Vocabulary Object Detection Using Captions" (OVR-CNN, CVPR 2021).
- ``65_15``: 65 base and 15 novel categories, nothing unused. Drawn by Rahman et al., "Improved
  Visual-Semantic Alignment for Zero-Shot Object Detection" (PL-ZSD, AAAI 2020).

"65" alone is ambiguous: it is 48 + 17 in the first split and the base count of the second.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from detectron2.data.datasets import builtin_meta

__all__ = [
    "COCO_2014",
    "COCO_2017",
    "COCO_CATEGORIES",
    "SPLITS",
    "Category",
    "CocoVariant",
    "Split",
]


class Category(NamedTuple):
    """A COCO category: its official ``id`` (1 to 90, with gaps) and its official ``name``."""

    id: int
    name: str


COCO_CATEGORIES: tuple[Category, ...] = tuple(
    Category(category["id"], category["name"])
    for category in builtin_meta.COCO_CATEGORIES
    if category["isthing"]
)
"""The 80 detection categories of COCO in id order (``instances_*2017.json``, ``categories``)."""

# The 17 novel categories of Bansal et al. and the 15 that neither side of that split contains.
_NOVEL_17 = (
    "airplane", "bus", "cat", "dog", "cow", "elephant", "umbrella", "tie", "snowboard",
    "skateboard", "cup", "knife", "cake", "couch", "keyboard", "sink", "scissors",
)  # fmt: skip
_UNUSED_15 = (
    "traffic light", "fire hydrant", "stop sign", "parking meter", "sports ball", "baseball bat",
    "baseball glove", "tennis racket", "wine glass", "hot dog", "potted plant", "dining table",
    "cell phone", "teddy bear", "hair drier",
)  # fmt: skip
# The 15 novel ("unseen") categories of Rahman et al.
_NOVEL_15 = (
    "airplane", "train", "parking meter", "cat", "bear", "suitcase", "frisbee", "snowboard",
    "fork", "sandwich", "hot dog", "toilet", "mouse", "toaster", "hair drier",
)  # fmt: skip


@dataclass(frozen=True)
class Split:
    """A split of the COCO categories; each tuple is in id order.

    Attributes:
        name: Key in :data:`SPLITS`, also part of file and dataset names (``"48_17"``).
        base: Categories with boxes in training.
        novel: Categories without boxes in training.
    """

    name: str
    base: tuple[Category, ...]
    novel: tuple[Category, ...]

    @property
    def all(self) -> tuple[Category, ...]:
        """Base and novel categories together, in id order (so *not* base before novel)."""
        return tuple(sorted(self.base + self.novel))

    @property
    def parts(self) -> dict[str, tuple[Category, ...]]:
        """The four files of the split and their vocabularies."""
        base, novel = self.base, self.novel
        return {"train_base": base, "val_base": base, "val_novel": novel, "val_all": self.all}


def _make_split(name: str, novel: Iterable[str], unused: Iterable[str] = ()) -> Split:
    """Return the split whose base categories are all but the ``novel`` and ``unused`` ones."""
    not_base = {*novel, *unused}
    return Split(
        name,
        base=tuple(each for each in COCO_CATEGORIES if each.name not in not_base),
        novel=tuple(each for each in COCO_CATEGORIES if each.name in novel),
    )


SPLITS: dict[str, Split] = {
    "48_17": _make_split("48_17", _NOVEL_17, _UNUSED_15),
    "65_15": _make_split("65_15", _NOVEL_15),
}
"""The splits by name."""


@dataclass(frozen=True)
class CocoVariant:
    """Which COCO a split is made of, and how.

    Attributes:
        year: of the images and annotations.
        zero_shot: the rule of zero-shot detection: training images that show a novel object are
            removed, and both novel and all classes are tested on the images that show a novel one.
            Otherwise OVR-CNN's: an image counts if it shows a wanted category, whatever else.
        num_images: of the official files, by folder; that of the training images comes first.
        suffix: of the names of files and datasets.
    """

    year: int
    zero_shot: bool
    num_images: Mapping[str, int]
    suffix: str = ""

    def splits(self) -> tuple[Split, ...]:
        """The splits that are defined on it."""
        return (SPLITS["65_15"],) if self.zero_shot else tuple(SPLITS.values())


COCO_2017 = CocoVariant(2017, zero_shot=False, num_images={"train2017": 118_287, "val2017": 5_000})
"""The paper's COCO (§4.1), with the recipe of OVR-CNN; for 65/15 this combination is ours."""

COCO_2014 = CocoVariant(
    2014, zero_shot=True, num_images={"train2014": 82_783, "val2014": 40_504}, suffix="_2014"
)
"""The data of the authors of 65/15: PL-ZSD (AAAI 2020) and ZSI (CVPR 2021)."""
