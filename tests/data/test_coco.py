"""Registration, loading and every way in which an annotation file can be wrong."""

import copy
import json
import logging
import os

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.structures import BoxMode

import hierkd
from hierkd.data.coco import (
    check_captions,
    check_datasets,
    load_ovd_json,
    register_coco_ovd,
    register_ovd_dataset,
)
from hierkd.data.splits import SPLITS

VOCABULARY = ["person", "tie", "tv"]
IDS = [1, 32, 72]

CONTENT = {
    "images": [
        {"id": 9, "file_name": "b.jpg", "height": 100, "width": 200, "captions": ["a tv"]},
        {"id": 4, "file_name": "a.jpg", "height": 50, "width": 60},
    ],
    "annotations": [
        {"id": 1, "image_id": 9, "category_id": 72, "bbox": [10, 20, 30, 40], "iscrowd": 1},
        {"id": 2, "image_id": 9, "category_id": 1, "bbox": [0.5, 0.5, 10.25, 3]},
    ],
    "categories": [
        {"id": 72, "name": "tv"},
        {"id": 1, "name": "person"},
        {"id": 32, "name": "tie"},
    ],
}


@pytest.fixture
def content():
    return copy.deepcopy(CONTENT)


@pytest.fixture
def load(tmp_path):
    """Return a function that writes a content and loads it."""
    images = tmp_path / "images"
    images.mkdir()
    for name in ("a.jpg", "b.jpg"):
        (images / name).touch()

    def write_and_load(content, **kwargs):
        path = tmp_path / "set.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return load_ovd_json(str(path), str(images), VOCABULARY, **kwargs)

    return write_and_load


@pytest.fixture
def catalog():
    """Remove from the catalogs whatever the test registers."""
    before = set(DatasetCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_loads_records_in_image_order(load, content, tmp_path):
    first, second = load(content, category_ids=IDS)
    assert first == {
        "file_name": str(tmp_path / "images" / "a.jpg"),
        "height": 50,
        "width": 60,
        "image_id": 4,
        "annotations": [],
    }
    assert second["captions"] == ["a tv"]
    mode = BoxMode.XYWH_ABS
    assert second["annotations"] == [
        {"id": 1, "bbox": [10, 20, 30, 40], "bbox_mode": mode, "category_id": 2, "iscrowd": 1},
        {"id": 2, "bbox": [0.5, 0.5, 10.25, 3], "bbox_mode": mode, "category_id": 0, "iscrowd": 0},
    ]


def test_images_in_subfolders(load, content, tmp_path):
    (tmp_path / "images" / "sub").mkdir()
    (tmp_path / "images" / "sub" / "c.jpg").touch()
    content["images"][0]["file_name"] = "sub/c.jpg"
    assert load(content)[1]["file_name"] == str(tmp_path / "images" / "sub" / "c.jpg")


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ([10, 20, 30, 40], [10, 20, 30, 40]),
        ([0, 0, 200, 100], [0, 0, 200, 100]),  # the whole image is not outside
        ([-5, 20, 30, 40], [0, 20, 25, 40]),
        ([190, 90, 30, 40], [190, 90, 10, 10]),
        ([-10, -10, 500, 500], [0, 0, 200, 100]),
        ([10, 20, 0, 40], None),
        ([10, 20, 30, -1], None),
        ([200, 20, 30, 40], None),  # touches the right edge from outside
        ([-30, 20, 30, 40], None),
        ([10, 101, 30, 40], None),
        ([float("nan"), 20, 30, 40], None),
        ([10, 20, float("inf"), 40], None),
    ],
)
def test_boxes_are_clipped_or_dropped(load, content, box, expected):
    content["annotations"][0]["bbox"] = box
    boxes = [annotation["bbox"] for annotation in load(content)[1]["annotations"]]
    assert boxes == [each for each in (expected, [0.5, 0.5, 10.25, 3]) if each is not None]


def test_counts_are_logged_in_one_line(load, content, caplog, tmp_path):
    boxes = [
        [-5, 0, 9, 9],
        [9, 9, 0, 9],
        [900, 0, 9, 9],
        [0, 0, float("nan"), 9],
        [0, 0, 200.01, 9],
    ]
    for index, box in enumerate(boxes):
        annotation = {"id": 10 + index, "image_id": 9, "category_id": 1, "bbox": box}
        content["annotations"].append(annotation)
    with caplog.at_level(logging.INFO, logger="hierkd.data.coco"):
        load(content)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        f"Loaded 2 images with 4 boxes from {tmp_path / 'set.json'}; clipped 1 boxes to their "
        "image, dropped 3 (1 without area, 1 outside, 1 non-finite)."
    )


def test_clean_file_gives_no_warning(load, content, caplog):
    with caplog.at_level(logging.INFO, logger="hierkd.data.coco"):
        load(content)
    assert [record.levelno for record in caplog.records] == [logging.INFO]


def _change(path, value):
    """Return a function that sets the entry of a content at ``path`` (a tuple of keys)."""

    def change(content):
        for key in path[:-1]:
            content = content[key]
        if value is None:
            del content[path[-1]]
        else:
            content[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_change(("images",), None), r"key 'images' is missing; found \['annotations'"),
        (_change(("annotations",), None), "key 'annotations' is missing"),
        (_change(("categories",), None), "key 'categories' is missing"),
        (_change(("images",), []), "'images' is empty"),
        (_change(("images", 0, "file_name"), None), r"images\[0\] has no 'file_name'"),
        (_change(("images", 1, "width"), 0), "image 4 must have a positive .* found 0 x 50"),
        (_change(("images", 1, "width"), "60"), r"\['width'\] must be of type int, found '60'"),
        (_change(("images", 1, "id"), 9), "id 9 occurs more than once in 'images'"),
        (_change(("images", 0, "captions"), "a tv"), "'captions' of image 9 must be a list of str"),
        (_change(("annotations", 1, "id"), 1), "id 1 occurs more than once in 'annotations'"),
        (_change(("annotations", 1, "image_id"), 77), "annotation 2 refers to image 77"),
        (_change(("annotations", 1, "category_id"), 3), "annotation 2 refers to category 3"),
        (_change(("annotations", 1, "bbox"), None), r"annotations\[1\] has no 'bbox'"),
        (_change(("annotations", 1, "bbox"), [1, 2, 3]), r"must be four .* \[1, 2, 3\]"),
        (_change(("annotations", 1, "bbox"), [1, 2, 3, "4"]), "must be four numbers"),
        (_change(("categories", 2), None), "vocabulary has 'tie', but 'categories' does not"),
        (_change(("categories", 2, "name"), "cravat"), "vocabulary has 'tie', but"),
        (_change(("categories", 2, "id"), 33), "category 'tie' must have id 32, found 33"),
        (_change(("categories", 2, "id"), 99), "in id order must be the vocabulary"),
        (_change(("categories", 2, "id"), 72), "id 72 occurs more than once in 'categories'"),
    ],
)  # fmt: skip
def test_wrong_content(load, content, change, message):
    change(content)
    with pytest.raises(ValueError, match=message) as info:
        load(content, category_ids=IDS)
    assert "set.json: " in str(info.value)


def test_unexpected_category(load, content):
    content["categories"].append({"id": 90, "name": "toothbrush"})
    with pytest.raises(ValueError, match="has 'toothbrush', but the dataset's vocabulary does not"):
        load(content)


def test_broken_json(load, content):
    with pytest.raises(ValueError, match=r"set\.json is not valid JSON: .* line 1, column \d+"):
        load(json.dumps(content)[:-40])


def test_missing_json_and_folder_say_what_makes_them(tmp_path, content):
    with pytest.raises(FileNotFoundError, match=r"no\.json does not exist\. Run prepare\."):
        load_ovd_json(str(tmp_path / "no.json"), "x", VOCABULARY, missing_hint="Run prepare.")
    path = tmp_path / "set.json"
    path.write_text(json.dumps(content))
    with pytest.raises(FileNotFoundError, match=r"Image folder .*nowhere does not exist"):
        load_ovd_json(str(path), str(tmp_path / "nowhere"), VOCABULARY)


def test_missing_images_are_named_and_counted(load, content):
    for index in range(8):
        image = {"id": 100 + index, "file_name": f"gone{index}.jpg", "height": 9, "width": 9}
        content["images"].append(image)
    content["images"][0]["file_name"] = "nosuch/b.jpg"
    with pytest.raises(FileNotFoundError, match="9 of 10 images do not exist") as info:
        load(content)
    assert "'gone0.jpg', 'gone1.jpg'" in str(info.value)
    assert "and 4 more" in str(info.value)


def test_register_sets_metadata_and_loads(catalog, load, content, tmp_path):
    load(content)  # writes the files
    register_ovd_dataset(
        "test_ovd_a",
        json_file=str(tmp_path / "set.json"),
        image_root=str(tmp_path / "images"),
        vocabulary=VOCABULARY,
        base_classes=["person", "tv"],
        novel_classes=["tie"],
    )
    metadata = MetadataCatalog.get("test_ovd_a")
    assert metadata.evaluator_type == "split_coco"
    assert metadata.thing_classes == VOCABULARY
    assert (metadata.base_classes, metadata.novel_classes) == (["person", "tv"], ["tie"])
    assert not hasattr(metadata, "thing_dataset_id_to_contiguous_id")  # known once loaded
    assert len(DatasetCatalog.get("test_ovd_a")) == 2
    assert metadata.thing_dataset_id_to_contiguous_id == {1: 0, 32: 1, 72: 2}
    # detectron2 drops images without a usable box: a.jpg has none.
    (kept,) = get_detection_dataset_dicts("test_ovd_a")
    assert kept["image_id"] == 9
    with pytest.raises(ValueError, match="'test_ovd_a' is already registered"):
        register_ovd_dataset(
            "test_ovd_a", json_file="", image_root="", vocabulary=["x"], base_classes=["x"],
            novel_classes=[],
        )  # fmt: skip


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"vocabulary": []}, "vocabulary is empty"),
        ({"vocabulary": ["a", "b", "a"]}, "vocabulary repeats 'a'"),
        ({"novel_classes": ["a"]}, "both base and novel: 'a'"),
        ({"vocabulary": ["a", "z"]}, "neither base nor novel: 'z'"),
        ({"category_ids": [1]}, r"expected 2 ascending category ids.* found \[1\]"),
        ({"category_ids": [2, 1]}, r"found \[2, 1\]"),
        ({"category_ids": [1, 1]}, r"found \[1, 1\]"),
    ],
)
def test_register_refuses_contradicting_names(catalog, names, message):
    arguments = {"vocabulary": ["a", "b"], "base_classes": ["a"], "novel_classes": ["b"], **names}
    with pytest.raises(ValueError, match=message):
        register_ovd_dataset("test_ovd_b", json_file="x", image_root="y", **arguments)
    assert "test_ovd_b" not in DatasetCatalog.list()


@pytest.mark.parametrize("split", ["48_17", "65_15"])
def test_coco_is_registered_on_import(split):
    assert hierkd.__version__
    sizes = {"train_base": split[:2], "val_base": split[:2], "val_novel": split[3:]}
    for part, size in sizes.items():
        metadata = MetadataCatalog.get(f"coco_ovd_{split}_{part}")
        assert len(metadata.thing_classes) == int(size)
    metadata = MetadataCatalog.get(f"coco_ovd_{split}_val_all")
    assert len(metadata.thing_classes) == len(SPLITS[split].all)
    expected = os.path.join("coco", "annotations", f"ovd_{split}", "val_all.json")
    assert metadata.json_file.endswith(expected)
    assert metadata.image_root.endswith(os.path.join("coco", "val2017"))
    ids = metadata.thing_dataset_id_to_contiguous_id
    assert metadata.thing_classes[ids[5]] == "airplane"
    assert list(ids.values()) == list(range(len(ids)))


def test_registering_coco_twice_changes_nothing():
    before = MetadataCatalog.get("coco_ovd_48_17_train_base").json_file
    register_coco_ovd("/somewhere/else")
    assert MetadataCatalog.get("coco_ovd_48_17_train_base").json_file == before


def test_missing_coco_names_the_command(catalog, tmp_path):
    register_ovd_dataset(
        "test_ovd_c", json_file=str(tmp_path / "x.json"), image_root="", vocabulary=["a"],
        base_classes=["a"], novel_classes=[], missing_hint="Run prepare.",
    )  # fmt: skip
    with pytest.raises(FileNotFoundError, match="Run prepare"):
        check_datasets(["test_ovd_c"])
    with pytest.raises(ValueError, match=r"Unknown dataset 'coco_ovd_48_17_val'.*_val_all"):
        check_datasets(["coco_ovd_48_17_val"])


def test_check_captions():
    good = [{"file_name": "a.jpg", "captions": ["a cat", "two cats"]}]
    check_captions(good, "set.json")
    for captions in ([], [""], ["a cat", "  "], None):
        bad = (
            {"file_name": "b.jpg"}
            if captions is None
            else {"file_name": "b.jpg", "captions": captions}
        )
        with pytest.raises(ValueError, match=r"set\.json: 1 images have no caption.*'b\.jpg'"):
            check_captions([*good, bad], "set.json")
