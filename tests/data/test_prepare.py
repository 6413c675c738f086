"""The recipe on a hand-made COCO, and the command line."""

import json
import runpy
from pathlib import Path

import pytest

from hierkd.data import prepare
from hierkd.data.prepare import prepare_coco
from hierkd.data.splits import COCO_2014, COCO_2017, COCO_CATEGORIES, SPLITS
from log_handlers import exit_status

SCRIPT = Path(__file__).parents[2] / "datasets" / "prepare_coco.py"

PERSON, CAT, TRAFFIC_LIGHT = 1, 17, 10  # base, novel and unused of 48/17


def make_instances(folder, boxes, ids=(3, 1, 2, 4)):
    """Return an instances file of images ``ids`` with the (image, category, iscrowd) of boxes."""
    images = [
        {
            "id": index,
            "file_name": f"{index:012d}.jpg",
            "height": 20,
            "width": 30,
            "license": 3,
            "date_captured": "2013-11-21",
            "coco_url": f"http://images.cocodataset.org/{folder}/{index:012d}.jpg",
        }
        for index in ids
    ]
    annotations = [
        {
            "id": 100 + index,
            "image_id": image,
            "category_id": category,
            "bbox": [1, 2, 3, 4],
            "area": 12,
            "iscrowd": crowd,
            "segmentation": [[1, 2, 4, 2, 4, 6]],
        }
        for index, (image, category, crowd) in enumerate(boxes)
    ]
    categories = [{**c._asdict(), "supercategory": "thing"} for c in COCO_CATEGORIES]
    return {
        "info": {"year": 2017},
        "licenses": [{"id": 3}],
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }


TRAIN = make_instances(
    "train2017",
    # image 1: person and cat; 2: only cat; 3: only a crowd of people; 4: only a traffic light
    [(1, PERSON, 0), (1, CAT, 0), (2, CAT, 0), (3, PERSON, 1), (4, TRAFFIC_LIGHT, 0)],
)
VAL = make_instances(
    "val2017",
    [(11, PERSON, 0), (12, CAT, 0), (12, CAT, 0), (14, TRAFFIC_LIGHT, 0)],
    ids=(13, 11, 12, 14),
)
CAPTIONS = {
    "info": {"year": 2017},
    "images": TRAIN["images"],
    "annotations": [
        {"id": 9, "image_id": 1, "caption": "Second of 1.\n"},
        {"id": 2, "image_id": 1, "caption": " First of  1."},
        {"id": 5, "image_id": 3, "caption": "A crowd."},
        {"id": 6, "image_id": 3, "caption": "  "},
        {"id": 7, "image_id": 2, "caption": "A cat."},
    ],
}


@pytest.fixture
def root(tmp_path):
    """A datasets folder with the three official files."""
    folder = tmp_path / "coco" / "annotations"
    folder.mkdir(parents=True)
    write(tmp_path, "instances_train2017", TRAIN)
    write(tmp_path, "instances_val2017", VAL)
    write(tmp_path, "captions_train2017", CAPTIONS)
    return tmp_path


def write(root, name, content):
    text = content if isinstance(content, str) else json.dumps(content)
    (root / "coco" / "annotations" / f"{name}.json").write_text(text)


def put_pictures(root, folder, instances):
    """Touch every picture of an instances file."""
    (root / "coco" / folder).mkdir()
    (root / "coco" / folder / "under_way.jpg.part").touch()
    for image in instances["images"]:
        (root / "coco" / folder / image["file_name"]).touch()


def read(path):
    return json.loads(Path(path).read_text())


def ids(entries):
    return [entry["id"] for entry in entries]


def test_recipe_by_hand(root):
    summaries = prepare_coco(root, [SPLITS["48_17"]])
    folder = root / "coco" / "annotations" / "ovd_48_17"
    assert [(s.path.stem, s.num_images, s.num_boxes, s.num_captions) for s in summaries] == [
        ("train_base", 2, 2, 3),
        ("val_base", 1, 1, 0),
        ("val_novel", 1, 2, 0),
        ("val_all", 2, 3, 0),
    ]
    train = read(folder / "train_base.json")
    # Image 1 stays although it shows a cat, 3 stays for its crowd; 2 and 4 have no base object.
    assert ids(train["images"]) == [3, 1]
    assert ids(train["annotations"]) == [100, 103]
    assert [image["captions"] for image in train["images"]] == [
        ["A crowd."],
        ["First of 1.", "Second of 1."],
    ]
    val = {part: read(folder / f"val_{part}.json") for part in ("base", "novel", "all")}
    assert {part: ids(val[part]["images"]) for part in val} == {
        "base": [11], "novel": [12], "all": [11, 12],
    }  # fmt: skip
    assert "captions" not in val["all"]["images"][0]
    assert "segmentation" not in train["annotations"][0]
    assert [c["id"] for c in val["novel"]["categories"]] == [c.id for c in SPLITS["48_17"].novel]


def renamed(images, pattern):
    return [{**image, "file_name": pattern.format(image["id"])} for image in images]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("instances_train2017", CAPTIONS, "category_id|bbox|categories"),
        ("captions_train2017", TRAIN, "caption"),
        ("instances_train2017", json.dumps(TRAIN)[:500], "is not valid JSON: .* column"),
        ("instances_val2017", TRAIN, r"in common, found 4, among them image 1"),
        ("instances_val2017", VAL | {"annotations": []}, "no image has a box"),
        ("instances_val2017", VAL | {"images": VAL["images"][:1]}, "100 has image_id 11, which"),
        (
            "instances_train2017",
            json.dumps(TRAIN).replace('"tv"', '"set"'),
            "72 to be 'tv', .*'set'",
        ),
        ("instances_val2017", VAL | {"categories": TRAIN["categories"][:-5]}, "found nothing"),
        ("captions_train2017", CAPTIONS | {"annotations": []}, "holds no caption of any"),
    ],
)
def test_wrong_input_is_named_and_nothing_is_written(root, name, content, message):
    write(root, name, content)
    with pytest.raises(ValueError, match=message) as info:
        prepare_coco(root, [SPLITS["48_17"]])
    assert f"{name}.json" in str(info.value)
    assert not (root / "coco" / "annotations" / "ovd_48_17").exists()


def test_all_missing_inputs_are_named_at_once(root):
    for name in ("instances_val2017", "captions_train2017"):
        (root / "coco" / "annotations" / f"{name}.json").unlink()
    message = (
        r"instances_val2017\.json does not exist, nor do captions_train2017\.json\. Download .*"
        r"annotations_trainval2017\.zip"
    )
    with pytest.raises(FileNotFoundError, match=message):
        prepare_coco(root, [SPLITS["48_17"]])


@pytest.fixture
def run_script(capsys):
    """Return a function that runs the script's main in this process: status, stdout, stderr."""

    def run(*arguments):
        main = runpy.run_path(str(SCRIPT))["main"]
        return (exit_status(main, *arguments), *capsys.readouterr())

    return run


def test_script_compares_counts_and_leaves_what_is_right(root, run_script, monkeypatch):
    for folder in COCO_2017.num_images:
        monkeypatch.setitem(COCO_2017.num_images, folder, 4)
    figures = {("48_17", "train_base"): (2, 2), ("48_17", "val_base"): (5, 8)}
    monkeypatch.setattr(prepare, "EXPECTED", figures)
    monkeypatch.setitem(prepare.EXPECTED_BY, "48_17", ("a friend", "a rumour"))
    train, base, novel, _ = run_script("--root", root)[1].splitlines()
    assert train.endswith("2 images (as in a friend), 2 boxes (as in a rumour), 3 captions")
    assert base.endswith("1 images (NOT the 5 of a friend), 1 boxes (NOT the 8 of a rumour)")
    assert novel.endswith("1 images, 2 boxes")
    folder = root / "coco" / "annotations" / "ovd_48_17"
    before = (folder / "train_base.json").stat().st_mtime_ns
    (folder / "val_all.json").write_text("{}")
    write(root, "instances_val2017", VAL | {"images": VAL["images"][1:]})  # a part of COCO
    lines = run_script("--root", root)[1].splitlines()
    assert ["was there already" in line for line in lines] == [True, True, True, False]
    assert [" of a " in line or " in a " in line for line in lines] == [True] + [False] * 3
    assert (folder / "train_base.json").stat().st_mtime_ns == before
    assert read(folder / "val_all.json")["images"]


def test_script(root, run_script):
    status, out, _ = run_script("--root", root, "--output", root / "out", "--split", "both")
    assert status == 0
    lines = out.splitlines()
    assert len(lines) == 8
    assert lines[0].endswith("ovd_48_17/train_base.json: 2 images, 2 boxes, 3 captions")
    assert (root / "out" / "ovd_65_15" / "val_all.json").is_file()
    assert not (root / "coco" / "annotations" / "ovd_48_17").exists()
    write(root, "instances_val2017", "{")
    status, out, err = run_script("--root", root)
    assert (status, out) == (2, "")
    assert "error: " in err
    assert "instances_val2017.json is not valid JSON" in err


def states(out):
    """Return the state of each input in the output of a dry run, by its last path component."""
    lines = [line.split(None, 1) for line in out.split("\n\n")[0].splitlines()]
    return {rest.split(" (")[0].split("/")[-1]: state for state, rest in lines}


def test_dry_run(root, run_script):
    put_pictures(root, "train2017", TRAIN)
    write(root, "instances_val2017", json.dumps(VAL)[:-1])
    (root / "coco" / "annotations" / "captions_train2017.json").unlink()
    status, out, _ = run_script("--root", root, "--dry-run")
    assert status == 0
    assert states(out) == {
        "instances_train2017.json": "found",
        "instances_val2017.json": "PARTIAL",
        "captions_train2017.json": "MISSING",
        "train2017": "PARTIAL",
        "val2017": "MISSING",
    }
    assert "train2017 (4 of the 118,287 pictures of the whole COCO)" in out
    assert f"mkdir -p {root / 'coco'} && cd {root / 'coco'}\n" in out
    for name in ("annotations/annotations_trainval2017", "zips/train2017", "zips/val2017"):
        assert out.count(f"-O http://images.cocodataset.org/{name}.zip && unzip -o ") == 1
    assert out.count("would be written") == 4
    assert not (root / "coco" / "annotations" / "ovd_48_17").exists()


def test_a_partial_download_of_pictures_is_named(root, run_script):
    put_pictures(root, "train2017", TRAIN)
    (root / "coco" / "train2017" / "000000000002.jpg").unlink()
    status, _, err = run_script("--root", root)
    assert status == 2
    assert "train2017 lacks 1 of the 4 pictures" in err
    assert "first 000000000002.jpg" in err
    assert not (root / "coco" / "annotations" / "ovd_48_17").exists()
    status, out, _ = run_script("--root", root, "--allow-missing-pictures")
    assert status == 0
    assert len(out.splitlines()) == 4


TRAIN_NAME, VAL_NAME = "COCO_train2014_{:012d}.jpg", "COCO_val2014_{:012d}.jpg"


@pytest.fixture
def root_2014(tmp_path):
    """A datasets folder with the three official files of 2014."""
    (tmp_path / "coco" / "annotations").mkdir(parents=True)
    year = {"info": {"year": 2014}}
    train = make_instances(
        "train2014",
        # cat is novel in 65/15. 1: person and cat; 2: cat; 3: people; 4: traffic light, here base
        [(1, PERSON, 0), (1, CAT, 0), (2, CAT, 0), (3, PERSON, 1), (4, TRAFFIC_LIGHT, 0)],
    )
    val_boxes = [(11, PERSON, 0), (12, CAT, 0), (12, PERSON, 0), (12, CAT, 1)]
    val = make_instances("val2014", val_boxes, ids=(11, 12))
    images = renamed(train["images"], TRAIN_NAME)
    write(tmp_path, "instances_train2014", train | year | {"images": images})
    images_val = renamed(val["images"], VAL_NAME)
    write(tmp_path, "instances_val2014", val | year | {"images": images_val})
    captions = [{"id": i, "image_id": i, "caption": f"Picture {i}."} for i in (1, 2, 3, 4)]
    write(tmp_path, "captions_train2014", {**year, "images": images, "annotations": captions})
    return tmp_path


def test_the_rule_of_zero_shot_detection_by_hand(root_2014):
    summaries = prepare_coco(root_2014, [SPLITS["65_15"]], variant=COCO_2014)
    folder = root_2014 / "coco" / "annotations" / "ovd_65_15_2014"
    parts = {path.stem: read(path) for path in folder.iterdir()}
    # Image 1 goes although it shows a person: it shows a cat, too.
    assert sorted(ids(parts["train_base"]["images"])) == [3, 4]
    assert {part: sorted(ids(parts[part]["images"])) for part in parts if part[:3] == "val"} == {
        "val_base": [11, 12],
        "val_novel": [12],
        "val_all": [12],  # the images with a novel object, with all of their boxes
    }
    assert [s.num_boxes for s in summaries] == [2, 2, 2, 3]
    assert {s.split for s in summaries} == {"65_15_2014"}
    train = parts["train_base"]["images"]
    assert [image["captions"] for image in train] == [[f"Picture {i['id']}."] for i in train]


def test_2014_is_of_65_15_alone(root_2014, run_script):
    status, _, err = run_script("--root", root_2014, "--coco-year", "2014", "--split", "48_17")
    assert (status, "65_15 alone" in err) == (2, True)
    arguments = ("--root", root_2014, "--coco-year", "2014")
    assert run_script(*arguments)[1].count("ovd_65_15_2014/") == 4
    _, out, _ = run_script(*arguments, "--dry-run")
    assert "http://images.cocodataset.org/zips/train2014.zip" in out
    assert "2017" not in out
