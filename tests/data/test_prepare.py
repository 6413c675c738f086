"""The recipe on a hand-made COCO, and the command line."""

import copy
import json
import runpy
from pathlib import Path

import pytest

from hierkd.data import prepare
from hierkd.data.datasets import load_ovd_json
from hierkd.data.prepare import build_part, join_captions, prepare_coco
from hierkd.data.splits import COCO_CATEGORIES, SPLITS, Category

SCRIPT = Path(__file__).parents[2] / "datasets" / "prepare_coco.py"

PERSON, CAT, TRAFFIC_LIGHT = 1, 17, 10  # base, novel and unused of 48/17


def make_instances(folder, boxes):
    """Return an instances file of images 1.. with the (image, category, iscrowd) of ``boxes``."""
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
        for index in (3, 1, 2, 4)
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
VAL = make_instances("val2017", [(1, PERSON, 0), (2, CAT, 0), (2, CAT, 0), (4, TRAFFIC_LIGHT, 0)])
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


def read(path):
    return json.loads(Path(path).read_text())


def ids(entries):
    return [entry["id"] for entry in entries]


def test_recipe_by_hand(root):
    summaries = prepare_coco(root, [SPLITS["48_17"]])
    folder = root / "coco" / "annotations" / "ovd_48_17"
    assert [(s.part, s.num_images, s.num_boxes, s.num_captions) for s in summaries] == [
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
        "base": [1], "novel": [2], "all": [1, 2],
    }  # fmt: skip
    assert "captions" not in val["all"]["images"][0]


def test_categories_are_complete_and_in_id_order(root):
    prepare_coco(root, [SPLITS["48_17"], SPLITS["65_15"]])
    for name, counts in {"48_17": (48, 48, 17, 65), "65_15": (65, 65, 15, 80)}.items():
        parts = ("train_base", "val_base", "val_novel", "val_all")
        for part, count in zip(parts, counts, strict=True):
            path = root / "coco" / "annotations" / f"ovd_{name}" / f"{part}.json"
            categories = ids(read(path)["categories"])
            assert len(categories) == count
            assert categories == sorted(categories)


def test_bulky_fields_are_dropped_and_needed_ones_kept(root):
    prepare_coco(root, [SPLITS["48_17"]], output=root / "out")
    content = read(root / "out" / "ovd_48_17" / "train_base.json")
    assert set(content["annotations"][0]) == {
        "id", "image_id", "category_id", "bbox", "area", "iscrowd",
    }  # fmt: skip
    expected = {"id", "file_name", "height", "width", "license", "captions"}
    assert set(content["images"][0]) == expected
    assert not (root / "coco" / "annotations" / "ovd_48_17").exists()


def test_result_loads(root, tmp_path):
    prepare_coco(root, [SPLITS["48_17"]])
    images = tmp_path / "train2017"
    images.mkdir()
    for image in TRAIN["images"]:
        (images / image["file_name"]).touch()
    path = root / "coco" / "annotations" / "ovd_48_17" / "train_base.json"
    base = SPLITS["48_17"].base
    records = load_ovd_json(
        str(path), str(images), [c.name for c in base], category_ids=[c.id for c in base]
    )
    assert [record["image_id"] for record in records] == [1, 3]
    assert records[0]["annotations"][0]["category_id"] == 0


def test_second_run_gives_the_same_bytes(root):
    (path, *_) = [summary.path for summary in prepare_coco(root, [SPLITS["48_17"]])]
    first = path.read_bytes()
    prepare_coco(root, [SPLITS["48_17"]])
    assert path.read_bytes() == first
    assert len(list(path.parent.iterdir())) == 4  # no temporary file stays


def _with(content, **changes):
    return {**copy.deepcopy(content), **changes}


def _renamed(content, category_id, name):
    changed = copy.deepcopy(content)
    for category in changed["categories"]:
        if category["id"] == category_id:
            category["name"] = name
    return changed


def _with_file_names(content, pattern):
    changed = copy.deepcopy(content)
    for image in changed["images"]:
        image["file_name"] = pattern.format(image["id"])
    return changed


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("instances_train2017", CAPTIONS, r"expected boxes .* found captions .* swapped"),
        ("captions_train2017", TRAIN, r"expected captions .* found boxes .* swapped"),
        ("instances_train2017", VAL, r"expected images of train2017, found .*val2017"),
        ("instances_val2017", TRAIN, r"expected images of val2017, found .*train2017"),
        ("instances_val2017", _with(VAL, info={"year": 2014}), r"COCO 2017 .* info\.year 2014"),
        (
            "instances_train2017",
            _with_file_names(TRAIN, "COCO_train2014_{:012d}.jpg"),
            r"found 'COCO_train2014_000000000003\.jpg', a name of COCO 2014",
        ),
        ("instances_train2017", json.dumps(TRAIN)[:500], "is not valid JSON: .* column"),
        ("captions_train2017", "", "is not valid JSON"),
        ("instances_val2017", _with(VAL, images=[]), "'images' is empty"),
        ("instances_val2017", _with(VAL, annotations=[]), "no image has a box"),
        (
            "instances_val2017",
            _with(VAL, images=VAL["images"][:1]),
            "annotation 100 has image_id 1, which the file does not contain",
        ),
        (
            "instances_train2017",
            _renamed(TRAIN, 72, "tvmonitor"),
            "expected category 72 to be 'tv', found 'tvmonitor'",
        ),
        (
            "instances_val2017",
            _with(VAL, categories=[c for c in VAL["categories"] if c["id"] != 87]),
            "expected category 87 to be 'scissors', found nothing",
        ),
        ("captions_train2017", _with(CAPTIONS, annotations=[]), "holds no caption of any"),
    ],
)
def test_wrong_input_is_named_and_nothing_is_written(root, name, content, message):
    write(root, name, content)
    with pytest.raises(ValueError, match=message) as info:
        prepare_coco(root, [SPLITS["48_17"]])
    assert f"{name}.json" in str(info.value)
    assert not (root / "coco" / "annotations" / "ovd_48_17").exists()


@pytest.mark.parametrize("name", ["instances_train2017", "instances_val2017", "captions_train2017"])
def test_missing_input_says_where_it_comes_from(root, name):
    (root / "coco" / "annotations" / f"{name}.json").unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name}\.json .*annotations_trainval2017\.zip"):
        prepare_coco(root, [SPLITS["48_17"]])


def test_image_without_caption_is_logged(caplog):
    part = build_part(TRAIN, [Category(CAT, "cat")], "t.json")  # images 1 and 2
    joined = join_captions(part, {2: ["A cat."]}, "c.json")
    assert [image["captions"] for image in joined["images"]] == [[], ["A cat."]]
    assert "c.json holds no caption of 1 of 2 training images" in caplog.text
    assert "captions" not in part["images"][0]


def test_count_of_the_whole_coco_is_compared(root, caplog, monkeypatch):
    monkeypatch.setattr(prepare, "_FULL_COCO_IMAGES", {"train2017": 4, "val2017": 4})
    expected = {("48_17", "train_base"): 2, ("48_17", "val_base"): 5}
    monkeypatch.setattr(prepare, "EXPECTED_FULL_COCO", expected)
    train, base, novel, _ = prepare_coco(root, [SPLITS["48_17"]])
    assert (train.expected_images, train.is_as_expected) == (2, True)
    assert (base.expected_images, base.is_as_expected) == (5, False)
    assert (novel.expected_images, novel.is_as_expected) == (None, True)
    (record,) = caplog.records
    assert "val_base.json holds 1 images, but the official annotations give 5" in record.message


def test_published_counts():
    assert prepare.EXPECTED_FULL_COCO == {
        ("48_17", "train_base"): 107761, ("48_17", "val_base"): 4533,
        ("48_17", "val_novel"): 2064, ("48_17", "val_all"): 4836,
    }  # fmt: skip


@pytest.fixture
def run_script(capsys):
    """Return a function that runs the script's main in this process: status, stdout, stderr."""

    def run(*arguments):
        main = runpy.run_path(str(SCRIPT))["main"]
        status = main([str(argument) for argument in arguments])
        return (status, *capsys.readouterr())

    return run


def test_script(root, run_script):
    status, out, _ = run_script("--root", root, "--output", root / "out", "--split", "both")
    assert status == 0
    lines = out.splitlines()
    assert len(lines) == 8
    assert lines[0].endswith("ovd_48_17/train_base.json: 2 images, 2 boxes, 3 captions")
    assert (root / "out" / "ovd_65_15" / "val_all.json").is_file()


def test_script_reports_errors(root, run_script):
    write(root, "instances_val2017", "{")
    status, out, err = run_script("--root", root)
    assert status == 1
    assert out == ""
    assert "error: " in err
    assert "instances_val2017.json is not valid JSON" in err


def test_dry_run(root, run_script):
    (root / "coco" / "train2017").mkdir()
    (root / "coco" / "annotations" / "captions_train2017.json").unlink()
    status, out, _ = run_script("--root", root, "--dry-run")
    assert status == 1
    missing = [line for line in out.splitlines() if line.startswith("MISSING")]
    assert [line.split("/")[-1] for line in missing] == ["captions_train2017.json", "val2017"]
    assert "http://images.cocodataset.org/zips/val2017.zip" in out
    assert not (root / "coco" / "annotations" / "ovd_48_17").exists()
