"""The recipe on a hand-made COCO, and the command line."""

import copy
import json
import runpy
from dataclasses import replace
from pathlib import Path

import pytest

from hierkd.data import prepare
from hierkd.data.prepare import Figure, build_part, join_captions, prepare_coco
from hierkd.data.splits import COCO_2014, COCO_2017, COCO_CATEGORIES, SPLITS, Category

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
        "base": [11], "novel": [12], "all": [11, 12],
    }  # fmt: skip
    assert "captions" not in val["all"]["images"][0]
    # bulky fields are dropped, needed ones kept
    assert set(train["annotations"][0]) == {
        "id", "image_id", "category_id", "bbox", "area", "iscrowd",
    }  # fmt: skip
    expected = {"id", "file_name", "height", "width", "license", "captions"}
    assert set(train["images"][0]) == expected


def test_categories_are_complete_and_in_id_order(root):
    prepare_coco(root, [SPLITS["48_17"], SPLITS["65_15"]])
    for name, counts in {"48_17": (48, 48, 17, 65), "65_15": (65, 65, 15, 80)}.items():
        parts = ("train_base", "val_base", "val_novel", "val_all")
        for part, count in zip(parts, counts, strict=True):
            path = root / "coco" / "annotations" / f"ovd_{name}" / f"{part}.json"
            categories = ids(read(path)["categories"])
            assert len(categories) == count
            assert categories == sorted(categories)


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
        ("instances_val2017", _with(VAL, info={"year": 2014}), r"COCO 2017, found info\.year 2014"),
        (
            "instances_train2017",
            _with_file_names(TRAIN, "COCO_train2014_{:012d}.jpg"),
            r"names of COCO 2017 such as 0.*found 'COCO_train2014_000000000003\.jpg'",
        ),
        ("instances_train2017", json.dumps(TRAIN)[:500], "is not valid JSON: .* column"),
        ("captions_train2017", "", "is not valid JSON"),
        ("instances_val2017", _with(VAL, images=[]), "'images' is empty"),
        ("instances_val2017", _with(VAL, annotations=[]), "no image has a box"),
        (
            "instances_val2017",
            _with(VAL, images=VAL["images"][:1]),
            "annotation 100 has image_id 11, which the file does not contain",
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


def test_all_missing_inputs_are_named_at_once(root):
    for name in ("instances_val2017", "captions_train2017"):
        (root / "coco" / "annotations" / f"{name}.json").unlink()
    message = (
        r"instances_val2017\.json does not exist, nor do captions_train2017\.json\. Download .*"
        r"annotations_trainval2017\.zip"
    )
    with pytest.raises(FileNotFoundError, match=message):
        prepare_coco(root, [SPLITS["48_17"]])


def test_an_image_in_both_halves(root):
    same = copy.deepcopy(TRAIN)
    for image in same["images"]:
        del image["coco_url"]  # which would tell
    write(root, "instances_val2017", same)
    with pytest.raises(ValueError, match=r"instances_val2017\.json must .* found 4, .* image 1\."):
        prepare_coco(root, [SPLITS["48_17"]])
    assert not (root / "coco" / "annotations" / "ovd_48_17").exists()


def test_image_without_caption_is_logged(caplog):
    part = build_part(TRAIN, [Category(CAT, "cat")], "t.json")  # images 1 and 2
    joined = join_captions(part, {2: ["A cat."]}, "c.json")
    assert [image["captions"] for image in joined["images"]] == [[], ["A cat."]]
    assert "c.json holds no caption of 1 of 2 training images" in caplog.text
    assert "captions" not in part["images"][0]


@pytest.fixture
def small(monkeypatch):
    """Return a COCO 2017 whose whole are the four and four images, with figures to compare."""
    images = {
        ("48_17", "train_base"): Figure(2, "a friend"),
        ("48_17", "val_base"): Figure(5, "a friend"),
        ("48_17", "val_novel"): Figure(7, "a rumour"),
    }
    boxes = {
        ("48_17", "train_base"): Figure(2, "a rumour"),
        ("48_17", "val_base"): Figure(8, "a rumour"),
    }
    monkeypatch.setattr(prepare, "EXPECTED_FULL_COCO", images)
    monkeypatch.setattr(prepare, "EXPECTED_BOXES", boxes)
    return replace(COCO_2017, num_images={"train2017": 4, "val2017": 4})


def test_counts_of_the_whole_coco_are_compared(root, small):
    train, base, novel, whole = prepare_coco(root, [SPLITS["48_17"]], variant=small)
    assert (train.expected_images.value, train.num_images) == (2, 2)
    assert (base.expected_images.value, base.num_images) == (5, 1)
    assert (base.expected_boxes.value, base.num_boxes) == (8, 1)
    assert novel.expected_boxes is whole.expected_images is whole.expected_boxes is None


def test_counts_of_a_part_of_coco_are_not_compared(root, small):
    boxes = [(11, PERSON, 0), (12, CAT, 0)]
    write(root, "instances_val2017", make_instances("val2017", boxes, ids=(11, 12)))
    train, *validation = prepare_coco(root, [SPLITS["48_17"]], variant=small)
    assert train.expected_images is not None
    assert all(part.expected_images is part.expected_boxes is None for part in validation)


def test_script_compares_counts(root, small, capsys, monkeypatch):
    monkeypatch.setattr("hierkd.data.splits.COCO_2017", small)
    assert runpy.run_path(str(SCRIPT))["main"](["--root", str(root)]) == 0
    train, base, novel, whole = capsys.readouterr().out.splitlines()
    assert train.endswith("2 images (as in a friend), 2 boxes (as in a rumour), 3 captions")
    assert base.endswith("1 images (NOT the 5 of a friend), 1 boxes (NOT the 8 of a rumour)")
    assert novel.endswith("1 images (NOT the 7 of a rumour), 2 boxes")
    assert whole.endswith("2 images, 3 boxes")


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
    assert not (root / "coco" / "annotations" / "ovd_48_17").exists()
    write(root, "instances_val2017", "{")
    status, out, err = run_script("--root", root)
    assert (status, out) == (1, "")
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


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"images": []}' + b"\n" * 9, "found    {} (23 bytes)"),
        (b'{"images": [' + b"1," * 500, "PARTIAL  {} (cut off after 1,012 bytes)"),
        (b"<html>404</html>", "PARTIAL  {} (16 bytes, and no JSON object)"),
        (None, "MISSING  {} (does not exist)"),  # a folder in the place of a file
    ],
)
def test_dry_run_looks_at_the_ends_of_a_file(root, run_script, content, expected):
    path = root / "coco" / "annotations" / "instances_val2017.json"
    path.unlink()
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    (root / "coco" / "val2017").touch()  # a file in the place of a folder
    lines = run_script("--root", root, "--dry-run")[1].splitlines()
    assert expected.format(path) in lines
    assert f"MISSING  {root / 'coco' / 'val2017'} (does not exist)" in lines


def test_dry_run_with_everything_there(root, run_script, monkeypatch):
    put_pictures(root, "train2017", TRAIN)
    put_pictures(root, "val2017", VAL)
    for folder in ("train2017", "val2017"):
        monkeypatch.setitem(COCO_2017.num_images, folder, 4)
    assert run_script("--root", root)[0] == 0
    status, out, _ = run_script("--root", root, "--dry-run")
    assert status == 0
    assert set(states(out).values()) == {"found"}
    assert "To get" not in out
    assert out.count("is there, and would be compared") == 4


def test_a_second_run_says_that_nothing_changed(root, run_script):
    _, first, _ = run_script("--root", root)
    assert "was there already" not in first
    folder = root / "coco" / "annotations" / "ovd_48_17"
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    (folder / "val_all.json").write_text("{}")
    _, second, _ = run_script("--root", root)
    assert second.count("was there already") == 3
    assert "was there already" not in second.splitlines()[3]  # the damaged one
    assert (folder / "train_base.json").stat().st_mtime_ns == times["train_base.json"]
    assert read(folder / "val_all.json")["images"]


def test_a_partial_download_of_pictures_is_named(root, run_script):
    put_pictures(root, "train2017", TRAIN)
    (root / "coco" / "train2017" / "000000000002.jpg").unlink()
    status, _, err = run_script("--root", root)
    assert status == 1
    assert "train2017 lacks 1 of the 4 pictures" in err
    assert "first 000000000002.jpg" in err
    assert not (root / "coco" / "annotations" / "ovd_48_17").exists()
    status, out, _ = run_script("--root", root, "--allow-missing-pictures")
    assert status == 0
    assert len(out.splitlines()) == 4


# ------------------------------------------------------------------------------ COCO 2014

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
    write(tmp_path, "instances_train2014", _with(_with_file_names(train, TRAIN_NAME), **year))
    write(tmp_path, "instances_val2014", _with(_with_file_names(val, VAL_NAME), **year))
    captions = [{"id": i, "image_id": i, "caption": f"Picture {i}."} for i in (1, 2, 3, 4)]
    images = _with_file_names(train, TRAIN_NAME)["images"]
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
    with pytest.raises(ValueError, match=r"2014 .* 65_15 alone, not 48_17"):
        prepare_coco(root_2014, [SPLITS["48_17"]], variant=COCO_2014)
    status, _, err = run_script("--root", root_2014, "--coco-year", "2014", "--split", "48_17")
    assert (status, "65_15 alone" in err) == (1, True)
    arguments = ("--root", root_2014, "--coco-year", "2014")
    assert run_script(*arguments)[1].count("ovd_65_15_2014/") == 4
    status, out, _ = run_script(*arguments, "--dry-run")
    assert status == 0
    assert "http://images.cocodataset.org/zips/train2014.zip" in out
    assert "2017" not in out


def test_a_crowd_region_shows_a_novel_object_and_older_urls_name_no_folder(root_2014):
    boxes = [(1, PERSON, 0), (1, CAT, 1), (2, PERSON, 0)]
    content = _with_file_names(make_instances("train2014", boxes), TRAIN_NAME)
    for image in content["images"]:
        image["coco_url"] = f"http://mscoco.org/images/{image['id']}"
    write(root_2014, "instances_train2014", _with(content, info={"year": 2014}))
    train, *_ = prepare_coco(root_2014, [SPLITS["65_15"]], variant=COCO_2014)
    assert ids(read(train.path)["images"]) == [2]


def test_halves_of_2014_are_told_by_their_file_names(root_2014):
    content = read(root_2014 / "coco" / "annotations" / "instances_val2014.json")
    write(root_2014, "instances_train2014", content)
    message = r"instances_train2014\.json: .* found 'COCO_val2014_0+11\.jpg'"
    with pytest.raises(ValueError, match=message):
        prepare_coco(root_2014, [SPLITS["65_15"]], variant=COCO_2014)
