"""The category lists, against a second copy of the facts."""

import pytest

from hierkd.data.splits import COCO_CATEGORIES, SPLITS, Category

# Ids as published with OVR-CNN's annotation files (48/17) and PL-ZSD's class lists (65/15).
BASE_48 = [
    1, 2, 3, 4, 7, 8, 9, 15, 16, 19, 20, 23, 24, 25, 27, 31, 33, 34, 35, 38, 42, 44, 48, 50, 51, 52,
    53, 54, 55, 56, 57, 59, 60, 62, 65, 70, 72, 73, 74, 75, 78, 79, 80, 82, 84, 85, 86, 90,
]  # fmt: skip
NOVEL_17 = [5, 6, 17, 18, 21, 22, 28, 32, 36, 41, 47, 49, 61, 63, 76, 81, 87]
BASE_65 = [
    1, 2, 3, 4, 6, 8, 9, 10, 11, 13, 15, 16, 18, 19, 20, 21, 22, 24, 25, 27, 28, 31, 32, 35, 37, 38,
    39, 40, 41, 42, 43, 44, 46, 47, 49, 50, 51, 52, 53, 55, 56, 57, 59, 60, 61, 62, 63, 64, 65, 67,
    72, 73, 75, 76, 77, 78, 79, 81, 82, 84, 85, 86, 87, 88, 90,
]  # fmt: skip
NOVEL_15 = [5, 7, 14, 17, 23, 33, 34, 36, 48, 54, 58, 70, 74, 80, 89]


@pytest.mark.parametrize(
    ("name", "base", "novel"), [("48_17", BASE_48, NOVEL_17), ("65_15", BASE_65, NOVEL_15)]
)
def test_ids_of_each_split(name, base, novel):
    split = SPLITS[name]
    assert [category.id for category in split.base] == base
    assert [category.id for category in split.novel] == novel
    assert [category.id for category in split.all] == sorted(base + novel)  # not base first
    assert len(COCO_CATEGORIES) == 80


def test_names_are_cocos_with_its_spaces():
    assert {Category(89, "hair drier"), Category(14, "parking meter")} <= {*SPLITS["65_15"].novel}
    assert {Category(1, "person"), Category(72, "tv")} <= {*SPLITS["48_17"].base}
