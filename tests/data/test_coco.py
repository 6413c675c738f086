"""Registration and loading of datasets; what a file can be wrong in is test_coco_json.py's."""

import copy
import json
import os

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

import hierkd.data  # noqa: F401  (registers the datasets)
from hierkd.data.coco import (
    check_captions,
    check_datasets,
    check_training_sets,
    load_ovd_json,
    register_ovd_dataset,
)

VOCABULARY = ["person", "tie", "tv"]
IDS = [1, 32, 72]

CONTENT = {
    "images": [
        {"id": 9, "file_name": "sub/b.jpg", "height": 100, "width": 200, "captions": ["a tv"]},
        {"id": 4, "file_name": "a.jpg", "height": 50, "width": 60},
    ],
    "annotations": [
        {"id": 1, "image_id": 9, "category_id": 72, "bbox": [10, 20, 30, 40], "iscrowd": 1}
        | {"segmentation": [[1, 2]]},  # a mask that detectron2 would leave out with its box
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
    (tmp_path / "images" / "sub").mkdir(parents=True)
    for name in ("a.jpg", "sub/b.jpg"):
        (tmp_path / "images" / name).touch()

    def write_and_load(content, **kwargs):
        path = tmp_path / "set.json"
        path.write_text(json.dumps(content))
        return load_ovd_json(str(path), str(tmp_path / "images"), VOCABULARY, **kwargs)

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
        **{"height": 50, "width": 60, "image_id": 4, "annotations": []},
    }
    assert second["file_name"] == str(tmp_path / "images" / "sub" / "b.jpg")
    assert second["captions"] == ["a tv"]
    mode = BoxMode.XYWH_ABS
    assert second["annotations"] == [
        {"id": 1, "bbox": [10, 20, 30, 40], "bbox_mode": mode, "category_id": 2, "iscrowd": 1},
        {"id": 2, "bbox": [0.5, 0.5, 10.25, 3], "bbox_mode": mode, "category_id": 0, "iscrowd": 0},
    ]


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ([0, 0, 200, 100], [0, 0, 200, 100]),  # the whole image is not outside
        ([-5, 20, 30, 40], [0, 20, 25, 40]),
        ([190, 90, 30, 40], [190, 90, 10, 10]),
        ([-10, -10, 500, 500], [0, 0, 200, 100]),
        ([10, 20, 0, 40], None),
        ([10, 20, 30, -1], None),
        ([200, 20, 30, 40], None),  # touches the right edge from outside
        ([10, 101, 30, 40], None),
        ([float("nan"), 20, 30, 40], None),
        ([10, 20, float("inf"), 40], None),
    ],
)
def test_boxes_are_clipped_or_dropped(load, content, box, expected):
    content["annotations"][0]["bbox"] = box
    boxes = [annotation["bbox"] for annotation in load(content)[1]["annotations"]]
    assert boxes == [each for each in (expected, [0.5, 0.5, 10.25, 3]) if each is not None]


@pytest.mark.parametrize(
    ("categories", "word"),
    [
        ([(72, "tv"), (1, "person")], "missing: 'tie'; unexpected: none"),
        ([(72, "tv"), (1, "person"), (99, "tie")], "in id order .* found .*'tv', 'tie'"),
        ([(72, "tv"), (1, "person"), (33, "tie")], r"ids \[1, 32, 72\], found \[1, 33, 72\]"),
    ],
)
def test_categories_must_be_the_vocabulary(load, content, categories, word):
    content["categories"] = [{"id": i, "name": name} for i, name in categories]
    content["annotations"] = []
    with pytest.raises(ValueError, match=word) as caught:
        load(content, category_ids=IDS)
    assert "set.json: " in str(caught.value)


def test_missing_folder_and_images_are_named_and_counted(load, content, tmp_path):
    content["images"] += [
        {"id": 100 + index, "file_name": f"gone{index}.jpg", "height": 9, "width": 9}
        for index in range(8)
    ]
    content["images"][0]["file_name"] = "nosuch/b.jpg"
    with pytest.raises(FileNotFoundError, match="9 of 10 images do not exist") as caught:
        load(content)
    assert "'gone0.jpg', 'gone1.jpg'" in str(caught.value)
    assert "and 4 more" in str(caught.value)
    content["images"][:] = [{**content["images"][1], "file_name": "SUB\\B.png"}]
    content["annotations"].clear()
    with pytest.raises(FileNotFoundError, match=r"in place of 'SUB.*B.png' there is 'sub/b.jpg'"):
        load(content)
    with pytest.raises(FileNotFoundError, match=r"Image folder .*nowhere does not exist\. Run it"):
        load_ovd_json(
            str(tmp_path / "set.json"), str(tmp_path / "nowhere"), VOCABULARY, missing_hint="Run it"
        )


def test_register_sets_metadata_and_loads(catalog, load, content, tmp_path):
    load(content)  # writes the files
    given = {"image_root": str(tmp_path / "images"), "vocabulary": VOCABULARY}
    given |= {"base_classes": ["person", "tv"], "novel_classes": ["tie"]}
    register_ovd_dataset("test_ovd_a", json_file=str(tmp_path / "set.json"), **given)
    metadata = MetadataCatalog.get("test_ovd_a")
    assert metadata.thing_classes == VOCABULARY
    assert (metadata.base_classes, metadata.novel_classes) == (["person", "tv"], ["tie"])
    assert not hasattr(metadata, "thing_dataset_id_to_contiguous_id")  # known once loaded
    assert len(check_datasets(["test_ovd_a", "test_ovd_a"])) == 2
    assert metadata.thing_dataset_id_to_contiguous_id == {1: 0, 32: 1, 72: 2}
    with pytest.raises(ValueError, match="neither base nor novel: 'tie'"):
        register_ovd_dataset("test_ovd_b", json_file="", **given | {"novel_classes": []})
    register_ovd_dataset("test_ovd_c", json_file="no.json", **given, missing_hint="Run prepare.")
    with pytest.raises(FileNotFoundError, match="Run prepare"):
        check_datasets(["test_ovd_c"])
    with pytest.raises(ValueError, match=r"'coco_ovd_48_17_val' \(did you mean .*'test_ovd_a'"):
        check_datasets(["coco_ovd_48_17_val"])
    register_ovd_dataset("test_ovd_d", json_file="", **given | {"vocabulary": ["tv", "person"]})
    register_ovd_dataset("test_ovd_e", json_file="", **given | {"vocabulary": ["person"]})
    check_training_sets(["test_ovd_a", "test_ovd_a"])
    with pytest.raises(ValueError, match="'test_ovd_a' alone has 'tie'"):
        check_training_sets(["test_ovd_a", "test_ovd_d"])
    with pytest.raises(ValueError, match="'test_ovd_d' alone has 'tv'"):
        check_training_sets(["test_ovd_e", "test_ovd_d"])


@pytest.mark.parametrize(
    ("name", "base", "novel", "images"),
    [("48_17", 48, 17, "2017"), ("65_15", 65, 15, "2017"), ("65_15_2014", 65, 15, "2014")],
)
def test_coco_is_registered_on_import(name, base, novel, images):
    sizes = {"train_base": base, "val_base": base, "val_novel": novel, "val_all": base + novel}
    for part, size in sizes.items():
        metadata = MetadataCatalog.get(f"coco_ovd_{name}_{part}")
        assert len(metadata.thing_classes) == size
        assert metadata.json_file.endswith(
            os.path.join("coco", "annotations", f"ovd_{name}", f"{part}.json")
        )
        assert metadata.image_root.endswith(os.path.join("coco", part.split("_")[0] + images))
        ids = metadata.thing_dataset_id_to_contiguous_id
        assert list(ids.values()) == list(range(size))
    assert metadata.thing_classes[ids[5]] == "airplane"


@pytest.mark.parametrize("fields", [{}, {"captions": []}, {"captions": ["a cat", "  "]}])
def test_check_captions(fields):
    good = [{"file_name": "a.jpg", "captions": ["a cat", "two cats"]}]
    check_captions(good, "set.json")
    bad = {"file_name": "b.jpg", **fields}
    with pytest.raises(ValueError, match=r"set\.json: 1 images have no caption.*'b\.jpg'"):
        check_captions([*good, bad], "set.json")
