"""A dataset of one's own, from plain COCO files to detections of novel names, by the commands."""

import json
import shutil
import unicodedata

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

import tiny_training
from log_handlers import exit_status
from tiny_training import BASE, NOVEL, PICTURES, call_main, own_log_handlers
from tools import check_dataset

NAMES = (*BASE, *NOVEL)


def check(*arguments):
    """``tools/check_dataset.py``; leaves no log handler behind."""
    with own_log_handlers():
        return exit_status(check_dataset.main, *arguments)


def plain_coco():
    """All classes in one file, no captions."""
    images, annotations = [], []
    for number, objects in enumerate(PICTURES, start=1):
        images.append({"id": number, "file_name": f"{number}.png", "height": 96, "width": 96})
        for name, (x0, y0, x1, y1) in objects:
            annotations.append(
                {"id": len(annotations) + 1, "image_id": number, "iscrowd": 0}
                | {"category_id": NAMES.index(name), "bbox": [x0, y0, x1 - x0, y1 - y0]}
                | {"area": (x1 - x0) * (y1 - y0)}
            )
    categories = [{"id": k, "name": name} for k, name in enumerate(NAMES)]
    return {"images": images, "annotations": annotations, "categories": categories}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures, plain COCO files, YAMLs and a random CLIP."""
    root = tmp_path_factory.mktemp("own")
    tiny_training.write_world(root)
    tiny_training.write_clip(root / "clip.pt")
    (root / "all.json").write_text(json.dumps(plain_coco()))
    text = "train: {json: all.json, images: miniature/train%s}\n"
    text += "val: {json: all.json, images: miniature/val}\n"
    text += f"base: {list(BASE)}\nnovel: {list(NOVEL)}\n"
    (root / "mine.yaml").write_text("name: mine\n" + text % ", captions: from_class_names")
    few = plain_coco()
    few["annotations"] = [each for each in few["annotations"] if each["image_id"] == 1]
    (root / "few.json").write_text(json.dumps(few))
    silent = "name: silent\n" + text % ""
    (root / "silent.yaml").write_text(silent.replace("all.json", "few.json", 1))
    (root / "other.yaml").write_text(
        f"name: other\nval: {{json: all.json, images: miniature/val}}\n"
        f"rename: {{{NOVEL[0]}: spaceship}}\n"
    )
    lvis = plain_coco()
    for image in lvis["images"]:
        image |= {"neg_category_ids": [0, 2], "not_exhaustive_category_ids": [1]}
    for category, letter in zip(lvis["categories"], "rcff", strict=True):
        category["frequency"] = letter
    (root / "lvis.json").write_text(json.dumps(lvis))
    (root / "many.yaml").write_text(
        "name: many\nformat: lvis\nval: {json: lvis.json, images: miniature/val}\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HIERKD_CACHE", str(root / "cache"))
        patch.setenv("PYTHONHASHSEED", "0")
        yield root
    for name in DatasetCatalog.list():
        if name.split("_")[0] in ("mine", "silent", "other", "many"):
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def run(folder, output, *extra, yamls, train="mine", test):
    flags = [each for each in extra if each.startswith("--")]
    pairs = {
        "DATASETS.DEFINITIONS": tuple(str(folder / each) for each in yamls),
        "DATASETS.TRAIN": (f"{train}_train_base",),
        "DATASETS.TEST": test,
    }
    text = [str(each) for pair in pairs.items() for each in pair]
    rest = extra[len(flags) :]
    command = tiny_training.command_line(folder / output, folder / "clip.pt", *flags, *text, *rest)
    return call_main(command)


@pytest.fixture(scope="module")
def trained(folder):
    test = ("mine_val_novel", "mine_val_all")
    run(folder, "run", yamls=["mine.yaml"], test=test)
    return folder / "run"


def metrics(output):
    """Every name that was logged as a number during a run."""
    lines = (output / "metrics.json").read_text().splitlines()
    return {key for line in lines for key in json.loads(line)}


def test_it_trains_and_is_evaluated_in_base_and_novel_classes(trained):
    output = trained
    names = {key.removeprefix("mine_val_all/bbox/") for key in metrics(output)}
    assert {"base/AP50", "novel/AP50", "all/AP50"} <= names
    assert "loss_gkd_image" in metrics(output)  # captions were made of class names
    log = (output / "log.txt").read_text()
    assert "mine.yaml train: 6 images; 6 with captions" in log
    assert f"{BASE[0]} (3)" in log  # few boxes


def test_without_captions_global_distillation_is_off_and_empty_pictures_train(folder):
    pairs = ["DATALOADER.FILTER_EMPTY_ANNOTATIONS", "False"]
    run(folder, "silent", *pairs, yamls=["silent.yaml"], train="silent", test=())
    assert "Loaded 6 images with 1 boxes" in (folder / "silent" / "log.txt").read_text()
    names = metrics(folder / "silent")
    assert "loss_ikd" in names
    assert not any("gkd" in name for name in names)


def test_transfer_to_other_datasets_with_their_own_names(folder, trained):
    weights = str(trained / "model_final.pth")
    yamls = ["mine.yaml", "other.yaml", "many.yaml"]
    test = ("other_val_all", "many_val_all")
    pairs = ["MODEL.WEIGHTS", weights, "TEST.DETECTIONS_PER_IMAGE", "5"]
    results = run(folder, "moved", "--eval-only", *pairs, yamls=yamls, test=test)
    record = json.loads((folder / "moved" / "inference" / "transfer.json").read_text())
    assert record["weights"] == weights
    # trained with the base names; one novel name is called otherwise
    assert list(record["overlap"]["other_val_all"]["known"]) == list(BASE)
    assert record["overlap"]["other_val_all"]["new"] == ["spaceship", NOVEL[1]]
    ours = results["other_val_all"]["bbox"]
    assert {key.split("/")[0] for key in ours if "/" in key} == {"base", "novel", "all"}
    assert "rare/AP" in results["many_val_all"]["bbox"]
    log = (folder / "moved" / "log.txt").read_text()
    assert "| other_val_all | novel" in log
    assert "APr" in log
    found = {
        name: json.loads(
            (folder / "moved/inference" / name / "coco_instances_results.json").read_text()
        )
        for name in test
    }
    most = {
        name: max(sum(r["image_id"] == i for r in each) for i in range(1, 7))
        for name, each in found.items()
    }
    assert most["other_val_all"] <= 5 < most["many_val_all"] <= 300


def test_the_dataset_is_checked_and_drawn(folder, capsys):
    config = ["--config-file", tiny_training.CONFIG, "--output", str(folder / "check")]
    opts = ["--opts", "MODEL.TEACHER.WEIGHTS", str(folder / "clip.pt"), "MODEL.DEVICE", "cpu"]
    assert check(folder / "mine.yaml", *config, *opts) == 0
    out = capsys.readouterr().out
    assert f"mine_train_base: 6 images, 7 boxes of {len(BASE)} classes" in out
    assert "Captions: 6 of 6 training images have one" in out
    assert f"{BASE[0]} (3)" in out
    with Image.open(folder / "check" / "mine_train_base.png") as sheet:
        assert sheet.width > 3 * 480
    broken = folder / "broken.yaml"
    broken.write_text((folder / "mine.yaml").read_text().replace(BASE[0], "nothing"))
    assert check(broken, "--output", folder / "check") == 2
    assert "nothing" in capsys.readouterr().err


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A training set of two pictures and a validation set of one, for a test to spoil."""
    monkeypatch.setenv("HIERKD_CACHE", str(tmp_path / "cache"))
    pixels = np.random.default_rng(0).integers(0, 256, (3, 40, 60, 3), dtype=np.uint8)
    for half, pictures in (("train", pixels[:2]), ("val", pixels[2:])):
        (tmp_path / half).mkdir()
        images, annotations = [], []
        for i, picture in enumerate(pictures):
            Image.fromarray(picture).save(tmp_path / half / f"caf\u00e9{i}.png")
            images.append({"id": i, "file_name": f"caf\u00e9{i}.png", "width": 60, "height": 40})
            for k in (0, 1):
                box = {"bbox": [30 - 20 * k, 8, 15, 14], "iscrowd": 0, "category_id": k}
                annotations.append({"id": len(annotations), "image_id": i, **box})
        categories = [{"id": k, "name": name} for k, name in enumerate(("ant", "bee"))]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (tmp_path / f"{half}.json").write_text(json.dumps(content))
    (tmp_path / "small.yaml").write_text(
        "name: other\ntrain: {json: train.json, images: train}\n"
        "val: {json: val.json, images: val}\nbase: [ant]\nnovel: [bee]\n"
    )
    return tmp_path


def edit(path, list_name, number=None, **fields):
    content = json.loads(path.read_text())
    for each in content[list_name][:number]:
        each.update(fields)
    path.write_text(json.dumps(content))


def turn(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = folder / "train" / "caf\u00e90.png"
    with Image.open(path) as image:
        image.save(path, exif=exif)


def rename(folder):
    content = json.loads((folder / "train.json").read_text())
    for image in content["images"]:
        image["file_name"] = ".\\" + unicodedata.normalize("NFD", image["file_name"])
    (folder / "train.json").write_text(json.dumps(content))


def enter_twice(folder):
    content = json.loads((folder / "train.json").read_text())
    content["images"].append({**content["images"][0], "id": 7})
    content["annotations"].append({**content["annotations"][0], "id": 7, "image_id": 7})
    (folder / "train.json").write_text(json.dumps(content))


def unseen(folder):
    """A val without an object of base or of novel classes, and no train."""
    content = json.loads((folder / "val.json").read_text())
    content["categories"].append({"id": 2, "name": "cow"})
    (folder / "val.json").write_text(json.dumps(content))
    edit(folder / "val.json", "annotations", category_id=2)
    lines = (folder / "small.yaml").read_text().splitlines(keepends=True)
    (folder / "small.yaml").write_text("".join(each for each in lines if "train" not in each))


PICTURE = "train/caf\u00e91.png"
SPOILT = {  # what is done, the kinds that are found, the status
    "nothing": (lambda f: None, [], 0),
    "sizes": (lambda f: edit(f / "train.json", "images", width=40, height=60), ["size"], 1),
    "EXIF": (turn, ["size"], 1),
    "cut": (lambda f: (f / PICTURE).write_bytes(b"\x89PNG"), ["unreadable"], 1),
    "16 bits": (
        lambda f: Image.new("I;16", (60, 40)).save(f / PICTURE),
        ["unreadable"],
        1,
    ),
    "crowd": (lambda f: edit(f / "train.json", "annotations", iscrowd=1), ["no_box"], 1),
    "no novel": (
        lambda f: edit(f / "val.json", "annotations", category_id=0),
        ["not_evaluated"],
        1,
    ),
    "no object": (unseen, ["not_evaluated"], 1),
    "shared": (lambda f: shutil.copy(f / PICTURE, f / "val/caf\u00e90.png"), ["shared"], 0),
    "twice": (lambda f: shutil.copy(f / PICTURE, f / "train/caf\u00e90.png"), ["same_picture"], 0),
    "entered twice": (enter_twice, ["same_picture"], 0),
    "one caption": (
        lambda f: edit(f / "train.json", "images", 1, captions=["an ant"]),
        ["no_caption"],
        1,
    ),
    "file names": (rename, [], 0),
    "category": (lambda f: edit(f / "train.json", "annotations", category_id=9), [], 2),
}


@pytest.mark.parametrize("case", SPOILT)
def test_the_doctor_finds_it(small, capsys, case):
    spoil, kinds, status = SPOILT[case]
    spoil(small)
    assert check(small / "small.yaml", "--json", "--output", small / "check") == status
    captured = capsys.readouterr()
    if status == 2:
        assert f"{small / 'train.json'}: annotation 0 has category_id 9" in captured.err
        return
    findings = json.loads(captured.out)["findings"]
    told = {"sizes": "swapped in the annotations", "EXIF": "EXIF orientation", "16 bits": "8 bits"}
    assert told.get(case, "") in captured.out
    wanted = {
        "size",
        "unreadable",
        "no_box",
        "not_evaluated",
        "no_boxes",
        "shared",
        "same_picture",
        "no_caption",
    }
    found = [each["kind"] for each in findings]
    assert sorted(set(found) & wanted) == sorted(set(kinds))
    assert any(each["costs"] for each in findings) == bool(status)


def test_the_limit_and_the_table(small, capsys):
    (small / PICTURE).write_bytes(b"")
    options = [small / "small.yaml", "--output", small / "check"]
    assert check(*options, "--limit", 1) == 0
    capsys.readouterr()
    assert check(*options) == 1
    out = capsys.readouterr().out
    assert "!train" in out
    assert "No pictures are drawn" in out
