"""The category lists, against a second copy of the facts and against detectron2's list."""

import pytest
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES as DETECTRON2_CATEGORIES

from hierkd.data.splits import COCO_CATEGORIES, SPLITS, Category

# Ids as published with OVR-CNN's annotation files (48/17) and PL-ZSD's class lists (65/15).
BASE_48 = [
    1, 2, 3, 4, 7, 8, 9, 15, 16, 19, 20, 23, 24, 25, 27, 31, 33, 34, 35, 38, 42, 44, 48, 50, 51, 52,
    53, 54, 55, 56, 57, 59, 60, 62, 65, 70, 72, 73, 74, 75, 78, 79, 80, 82, 84, 85, 86, 90,
]  # fmt: skip
NOVEL_17 = [5, 6, 17, 18, 21, 22, 28, 32, 36, 41, 47, 49, 61, 63, 76, 81, 87]
UNUSED_15 = [10, 11, 13, 14, 37, 39, 40, 43, 46, 58, 64, 67, 77, 88, 89]
BASE_65 = [
    1, 2, 3, 4, 6, 8, 9, 10, 11, 13, 15, 16, 18, 19, 20, 21, 22, 24, 25, 27, 28, 31, 32, 35, 37, 38,
    39, 40, 41, 42, 43, 44, 46, 47, 49, 50, 51, 52, 53, 55, 56, 57, 59, 60, 61, 62, 63, 64, 65, 67,
    72, 73, 75, 76, 77, 78, 79, 81, 82, 84, 85, 86, 87, 88, 90,
]  # fmt: skip
NOVEL_15 = [5, 7, 14, 17, 23, 33, 34, 36, 48, 54, 58, 70, 74, 80, 89]


def ids(categories):
    return [category.id for category in categories]


def test_the_80_categories_are_cocos():
    things = [(c["id"], c["name"]) for c in DETECTRON2_CATEGORIES if c["isthing"]]
    assert [tuple(category) for category in COCO_CATEGORIES] == things
    assert len(COCO_CATEGORIES) == 80


@pytest.mark.parametrize(
    ("name", "base", "novel", "unused"),
    [("48_17", BASE_48, NOVEL_17, UNUSED_15), ("65_15", BASE_65, NOVEL_15, [])],
)
def test_ids_of_each_split(name, base, novel, unused):
    split = SPLITS[name]
    assert split.name == name
    assert ids(split.base) == base
    assert ids(split.novel) == novel
    assert ids(split.unused) == unused
    assert ids(split.all) == sorted(base + novel)


@pytest.mark.parametrize(("name", "num_base", "num_novel"), [("48_17", 48, 17), ("65_15", 65, 15)])
def test_counts_and_disjointness(name, num_base, num_novel):
    split = SPLITS[name]
    assert (len(split.base), len(split.novel)) == (num_base, num_novel)
    assert not set(split.base) & set(split.novel)
    assert set(split.base) | set(split.novel) | set(split.unused) == set(COCO_CATEGORIES)
    assert len(split.all) == num_base + num_novel


def test_names_keep_cocos_spaces():
    novel = [category.name for category in SPLITS["48_17"].novel]
    assert novel[:4] == ["airplane", "bus", "cat", "dog"]
    assert Category(89, "hair drier") in SPLITS["65_15"].novel
    assert all("_" not in category.name for category in COCO_CATEGORIES)


def test_union_is_in_id_order_not_base_first():
    assert [category.name for category in SPLITS["48_17"].all[:6]] == [
        "person", "bicycle", "car", "motorcycle", "airplane", "bus",
    ]  # fmt: skip


def test_novel_categories_shared_by_both_splits():
    shared = set(SPLITS["48_17"].novel) & set(SPLITS["65_15"].novel)
    assert {category.name for category in shared} == {"airplane", "cat", "snowboard"}


def test_splits_are_immutable():
    with pytest.raises(AttributeError):
        SPLITS["48_17"].name = "other"
