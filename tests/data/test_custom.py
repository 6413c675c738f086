"""From a YAML and plain COCO files to registered datasets."""

import json
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from hierkd.data import custom
from hierkd.data.check import findings_of
from hierkd.data.custom import describe_datasets, has_no_captions, register_definitions

NAMES = ("zebra", "apple", "cat", "stop_sign", "junk")  # ids 0, 3, 6, 9, 12
# Per image: (class, box)
OBJECTS = {
    1: [("zebra", [0, 0, 20, 20]), ("cat", [30, 30, 20, 20])],
    2: [("cat", [5, 5, 30, 30])],
    3: [("junk", [5, 5, 30, 30])],
    4: [("apple", [1, 1, 30, 30]), ("stop_sign", [30, 5, 20, 20]), ("junk", [0, 50, 9, 9])],
    5: [],
}


def coco(objects=OBJECTS):
    annotations = [
        {"id": 10 * image + n, "image_id": image, "category_id": 3 * NAMES.index(name)}
        | {"bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for image, found in objects.items()
        for n, (name, box) in enumerate(found)
    ]
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 64, "height": 64} for i in objects],
        "annotations": annotations,
        "categories": [{"id": 3 * k, "name": name} for k, name in reversed([*enumerate(NAMES)])],
    }


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A folder with files and a YAML; what is registered from it is forgotten afterwards."""
    monkeypatch.setenv("HIERKD_CACHE", str(tmp_path / "cache"))
    (tmp_path / "images").mkdir()
    for image in OBJECTS:
        Image.new("RGB", (64, 64)).save(tmp_path / "images" / f"{image}.png")
    (tmp_path / "all.json").write_text(json.dumps(coco()), encoding="utf-8-sig")  # with a BOM
    write(tmp_path)
    yield tmp_path
    for name in [n for n in DatasetCatalog.list() if n.startswith("zoo_")]:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def write(folder: Path, *, captions="", base="[zebra, apple]", novel="[cat, stop_sign]", more=""):
    text = f"name: zoo\ntrain: {{json: all.json, images: images{captions}}}\n"
    text += f"val: {{json: all.json, images: images}}\nbase: {base}\nnovel: {novel}\n{more}"
    (folder / "zoo.yaml").write_text(text)
    return str(folder / "zoo.yaml")


def registered():
    return sorted(name for name in DatasetCatalog.list() if name.startswith("zoo_"))


def test_the_parts_hold_their_classes_and_images(world):
    register_definitions([str(world / "zoo.yaml")])
    assert registered() == ["zoo_train_base", "zoo_val_all", "zoo_val_base", "zoo_val_novel"]
    images = {name: [r["image_id"] for r in DatasetCatalog.get(name)] for name in registered()}
    assert images == {
        "zoo_train_base": [1, 4],
        "zoo_val_all": [1, 2, 4],
        "zoo_val_base": [1, 4],
        "zoo_val_novel": [1, 2, 4],
    }
    everything = MetadataCatalog.get("zoo_val_all")
    assert everything.thing_classes == ["zebra", "apple", "cat", "stop_sign"]  # by id
    assert everything.thing_dataset_id_to_contiguous_id == {0: 0, 3: 1, 6: 2, 9: 3}
    assert everything.novel_classes == ["cat", "stop_sign"]
    classes = [
        a["category_id"] for r in DatasetCatalog.get("zoo_val_all") for a in r["annotations"]
    ]
    assert classes == [0, 2, 2, 1, 3]
    # no box of a novel or an ignored class in training
    boxes = [a for r in DatasetCatalog.get("zoo_train_base") for a in r["annotations"]]
    assert [a["category_id"] for a in boxes] == [0, 1]
    text = "\n".join(describe_datasets(["zoo_train_base"]))
    assert "junk (2)" in text
    assert "zebra (1)" in text
    register_definitions([str(world / "zoo.yaml")], keep_empty=True)
    kept = {r["image_id"]: len(r["annotations"]) for r in DatasetCatalog.get("zoo_train_base")}
    assert kept == {1: 1, 2: 0, 3: 0, 4: 1, 5: 0}
    assert len(DatasetCatalog.get("zoo_val_base")) == 2


def test_names_are_read_as_the_yaml_wants(world):
    register_definitions([write(world, more="clean_names: true\nrename: {cat: house cat}\n")])
    names = MetadataCatalog.get("zoo_val_all").thing_classes
    assert names == ["zebra", "apple", "house cat", "stop sign"]
    assert MetadataCatalog.get("zoo_val_all").novel_classes == ["house cat", "stop sign"]
    DatasetCatalog.get("zoo_val_all")  # the file agrees


def test_without_a_split_all_categories_and_images_count(world):
    path = world / "whole.yaml"
    path.write_text("name: zoo\nval: {json: all.json, images: images}\n")
    register_definitions([str(path)])
    assert registered() == ["zoo_val_all"]
    metadata = MetadataCatalog.get("zoo_val_all")
    assert metadata.thing_classes == list(NAMES)
    assert not metadata.declares_split
    assert len(DatasetCatalog.get("zoo_val_all")) == 5


def test_a_split_of_lvis_keeps_images_that_show_none_of_the_classes(world):
    """What is found in an image that is known not to show it lowers AP, with a split or without."""
    content = coco()
    absent, inexhaustive = {2: [0], 3: [6], 5: [0, 12]}, {3: [9]}
    for image in content["images"]:
        image["neg_category_ids"] = absent.get(image["id"], [])
        image["not_exhaustive_category_ids"] = inexhaustive.get(image["id"], [])
    for category in content["categories"]:
        category["frequency"] = "f"
    (world / "all.json").write_text(json.dumps(content))
    (world / "zoo.yaml").write_text(
        "name: zoo\nformat: lvis\nval: {json: all.json, images: images}\n"
        "base: [zebra, apple]\nnovel: [cat, stop_sign]\n"
    )
    register_definitions([str(world / "zoo.yaml")])
    images = {n: [r["image_id"] for r in DatasetCatalog.get(n)] for n in registered()}
    assert images == {
        "zoo_val_all": [1, 2, 3, 4, 5],
        "zoo_val_base": [1, 2, 4, 5],  # 2 and 5 have no zebra
        "zoo_val_novel": [1, 2, 3, 4],  # 3 has no cat, 5 says nothing of cats
    }
    metadata = MetadataCatalog.get("zoo_val_base")
    assert (metadata.federated, metadata.detections_per_image) == (True, 300)
    del content["categories"][1]["frequency"]
    (world / "all.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"all.json: categories\[1\] has no 'frequency'"):
        register_definitions([str(world / "zoo.yaml")])


def test_captions_from_a_file_from_names_and_none(world):
    register_definitions([str(world / "zoo.yaml")])
    assert has_no_captions(["zoo_train_base"])
    assert not has_no_captions(["coco_ovd_48_17_train_base"])
    register_definitions([write(world, captions=", captions: from_class_names")])
    found = {r["image_id"]: r["captions"] for r in DatasetCatalog.get("zoo_train_base")}
    assert found == {1: ["a photo of a zebra."], 4: ["a photo of an apple."]}  # no novel name
    assert not has_no_captions(["zoo_train_base"])
    entries = [{"image_id": 1, "caption": " a cat by a zebra "}, {"image_id": 4, "caption": "b"}]
    (world / "c.json").write_text(json.dumps({"annotations": entries}))
    register_definitions([write(world, captions=", captions: c.json")])
    found = {r["image_id"]: r["captions"] for r in DatasetCatalog.get("zoo_train_base")}
    assert found == {1: ["a cat by a zebra"], 4: ["b"]}


def test_a_changed_file_is_prepared_anew(world):
    """Also one that keeps its size: the time of its change counts."""
    register_definitions([str(world / "zoo.yaml")])
    assert [r["image_id"] for r in DatasetCatalog.get("zoo_train_base")] == [1, 4]
    before = (world / "all.json").stat().st_size
    changed = json.dumps(coco()).replace('"category_id": 12', '"category_id": 3 ', 1)
    (world / "all.json").write_text(changed, encoding="utf-8-sig")  # the junk is an apple
    assert (world / "all.json").stat().st_size == before
    register_definitions([str(world / "zoo.yaml")])
    assert [r["image_id"] for r in DatasetCatalog.get("zoo_train_base")] == [1, 3, 4]
    prepared = [f for f in (world / "cache/datasets").iterdir() if f.is_dir()]
    assert len(prepared) == 4
    register_definitions([write(world, more="rename: {apple: pomme}\n")])
    assert MetadataCatalog.get("zoo_train_base").thing_classes == ["zebra", "pomme"]


def kill_while_writing(path):
    real = custom.write_json_atomically

    def dying(file, content):
        real(file, content)
        if file.name == "val_novel.json":  # neither the first nor the last
            os.kill(os.getpid(), 9)

    custom.write_json_atomically = dying
    register_definitions([path])


def test_a_process_killed_while_preparing_leaves_nothing_in_the_way(world):
    path = str(world / "zoo.yaml")
    process = multiprocessing.get_context("fork").Process(target=kill_while_writing, args=(path,))
    process.start()
    process.join(60)
    assert process.exitcode == -9
    register_definitions([path])
    assert [len(DatasetCatalog.get(name)) for name in registered()] == [2, 3, 2, 3]


def edited(edit):
    content = coco()
    edit(content)
    return json.dumps(content)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"images": [', "not valid JSON"),
        (edited(lambda c: c["categories"].pop(1) and c["annotations"].pop(5)), "stop_sign"),
        # labels must not be lost in preparation, before the loader sees the file
        (edited(lambda c: c["annotations"][0].update(category_id=7)), "10 has category_id 7"),
        (edited(lambda c: c.update(annotations=[])), "no image has a box of .*'zebra', 'apple'"),
    ],
)
def test_broken_files_are_named(world, text, words):
    (world / "all.json").write_text(text)
    with pytest.raises(ValueError, match=words) as caught:
        register_definitions([str(world / "zoo.yaml")])
    assert str(world / "all.json") in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base": "[zebr, apple]"}, r"have 'zebr', which .*zoo.yaml names; it has 'zebra'"),
        ({"more": "rename: {aple: red apple}\n"}, "does not have 'aple'"),
        ({"more": "rename: {apple: ' Zebra'}\n"}, "'zebra' and 'apple' .* both read as 'zebra'"),
        (
            {"captions": ", captions: c.json"},
            r"c.json: annotations\[0\]\['image_id'\] is '1', .* type, such as 1",
        ),
        ({"captions": ", captions: all.json"}, r"all.json: annotations\[0\] has no 'caption'"),
        ({"captions": ", captions: d.json"}, "d.json: holds no caption of any of the 2 images"),
    ],
)
def test_names_and_captions_must_fit_the_annotations(world, changes, words):
    for name, image in (("c", "1"), ("d", 3)):
        entries = [{"image_id": image, "caption": "a cat"}]
        (world / f"{name}.json").write_text(json.dumps({"annotations": entries}))
    with pytest.raises(ValueError, match=words):
        register_definitions([write(world, **changes)])


def test_a_name_that_is_taken_is_refused(world):
    (world / "other.yaml").write_text((world / "zoo.yaml").read_text())
    with pytest.raises(ValueError, match="have the same 'name'"):
        register_definitions([str(world / "zoo.yaml"), str(world / "other.yaml")])
    (world / "zoo.yaml").write_text("name: coco_ovd_48_17\nval: {json: all.json, images: images}\n")
    with pytest.raises(ValueError, match="this project's own"):
        register_definitions([str(world / "zoo.yaml")])


def test_a_deployed_detector_knows_the_names_without_the_files(world, caplog):
    (world / "all.json").unlink()
    register_definitions([str(world / "zoo.yaml"), str(world / "gone.yaml")])
    assert MetadataCatalog.get("zoo_train_base").thing_classes == ["zebra", "apple"]
    assert "gone.yaml" in caplog.text
    with pytest.raises(FileNotFoundError, match=r"all.json does not exist.*zoo.yaml"):
        DatasetCatalog.get("zoo_train_base")


def test_a_cache_that_cannot_be_written_is_named(world, monkeypatch):
    (world / "file").write_text("")
    monkeypatch.setenv("HIERKD_CACHE", str(world / "file"))
    with pytest.raises(ValueError, match="HIERKD_CACHE names another folder"):
        register_definitions([str(world / "zoo.yaml")])


def export(image, box, categories):
    """A file with a picture of an apple and a picture without anything, in an exporter's manner."""
    images = [image(0, "1.png"), image(1, "2.png")]
    return {"info": {}, "images": images, "annotations": [box], "categories": categories}


EXPORTS = {  # manner -> the file; numbers, empty fields and file names as the tool writes them
    "CVAT": export(
        lambda i, name: (
            {"id": i + 1, "width": 64, "height": 64, "file_name": name, "license": 0}
            | {"flickr_url": "", "coco_url": "", "date_captured": 0}
        ),
        {"id": 1, "image_id": 1, "category_id": 1, "segmentation": [], "area": 200.0}
        | {"bbox": [5.0, 5.0, 10.0, 20.0], "iscrowd": 0}
        | {"attributes": {"occluded": False, "rotation": 0.0}},
        [{"id": 1, "name": "apple", "supercategory": ""}],
    ),
    "Label Studio": export(  # on Windows
        lambda i, name: {"width": 64, "height": 64, "id": i, "file_name": f"sub\\{name}"},
        {"id": 0, "image_id": 0, "category_id": 0, "segmentation": [], "ignore": 0, "iscrowd": 0}
        | {"bbox": [5.000000000000001, 5, 10, 20], "area": 200},
        [{"id": 0, "name": "apple"}],
    ),
    "Roboflow": export(
        lambda i, name: (
            {"id": i, "license": 1, "file_name": name, "height": 64, "width": 64}
            | {"date_captured": "2024-01-01T00:00:00+00:00", "extra": {"name": name}}
        ),
        {"id": 0, "image_id": 0, "category_id": 1, "bbox": [5, 5, 10, 20], "area": 200}
        | {"segmentation": [], "iscrowd": 0},
        [
            {"id": 0, "name": "fruits", "supercategory": "none"},
            {"id": 1, "name": "apple", "supercategory": "fruits"},
        ],
    ),
    "FiftyOne": export(
        lambda i, name: (
            {"id": i + 1, "file_name": name, "height": 64, "width": 64}
            | {"license": None, "coco_url": None}
        ),
        {"id": 1, "image_id": 1, "category_id": 0, "bbox": [5.0, 5.0, 10.0, 20.0]}
        | {"area": 200.0, "iscrowd": 0.0},
        [{"id": 0, "name": "apple", "supercategory": None}],
    ),
}


@pytest.mark.parametrize("manner", EXPORTS)
def test_exports_are_read(world, manner):
    (world / "images" / "sub").mkdir()
    for name in ("1.png", "2.png"):
        shutil.copy(world / "images" / name, world / "images" / "sub")
    (world / "all.json").write_text(json.dumps(EXPORTS[manner]))
    path = world / "whole.yaml"
    path.write_text("name: zoo\nval: {json: all.json, images: images}\n")
    register_definitions([str(path)])
    metadata = MetadataCatalog.get("zoo_val_all")
    assert metadata.thing_classes == ["apple"]
    first, second = DatasetCatalog.get("zoo_val_all")
    assert first["annotations"][0]["bbox"] == pytest.approx([5, 5, 10, 20])
    assert not second["annotations"]
    assert ["fruits"] * (manner == "Roboflow") == [
        example["value"]
        for each in findings_of("val", metadata.report)
        for example in each.examples
    ]


def test_a_val_without_novel_objects_is_evaluated_in_base_classes(world):
    (world / "all.json").write_text(json.dumps(coco({1: [("zebra", [0, 0, 20, 20])]})))
    register_definitions([str(world / "zoo.yaml")])
    assert len(DatasetCatalog.get("zoo_val_base")) == len(DatasetCatalog.get("zoo_val_all")) == 1
    with pytest.raises(
        ValueError, match=r"all.json: no image .* 'cat', 'stop_sign': zoo_val_novel"
    ):
        DatasetCatalog.get("zoo_val_novel")
