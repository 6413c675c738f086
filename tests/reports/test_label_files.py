"""Labels for other tools, read back as these read them."""

import json
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from PIL import Image

from hierkd.reports.label_files import write_labels
from tools import check_dataset

NAMES = ("traffic cone", 'a "cup" & <no>', "no")


@pytest.fixture
def entries(tmp_path):
    """Two pictures of one name, 40 x 20 px, without any annotation; the second without objects."""
    entries = []
    for folder in ("a", "b"):
        (tmp_path / "photos" / folder).mkdir(parents=True)
        path = tmp_path / "photos" / folder / "1 é.png"
        Image.fromarray(np.zeros((20, 40, 3), np.uint8)).save(path)
        size = {"width": 40, "height": 20}
        entries.append({"file_name": str(path), **size, "detections": []})
    found = ((NAMES[2], 0.9, [4.0, 5.0, 24.0, 20.0]), (NAMES[0], 0.4, [0.0, 0.0, 40.0, 10.0]))
    for name, score, box in found:
        entries[0]["detections"].append({"class": name, "score": score, "box_xyxy": box})
    return entries


def test_coco_is_a_dataset_that_can_be_trained_on(tmp_path, entries, capsys, monkeypatch):
    monkeypatch.setenv("HIERKD_CACHE", str(tmp_path / "cache"))
    write_labels(tmp_path, ["coco"], NAMES, entries)
    content = json.loads((tmp_path / "coco.json").read_text())
    assert [image["file_name"] for image in content["images"]] == ["a/1 é.png", "b/1 é.png"]
    assert content["annotations"][0] == {
        **{"id": 1, "image_id": 1, "category_id": 3, "iscrowd": 0, "score": 0.9},
        **{"bbox": [4.0, 5.0, 20.0, 15.0], "area": 300.0},
    }
    half = {"json": "coco.json", "images": "photos"}
    definition = {"name": "prelabelled", "val": half}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(definition))
    check_dataset.main([str(tmp_path / "mine.yaml"), "--json"])
    report = json.loads(capsys.readouterr().out)["halves"]["val"]
    assert (report["images"], report["boxes"]) == (2, 2)


def test_yolo(tmp_path, entries):
    for _ in range(2):  # again into the same folder
        write_labels(tmp_path, ["yolo"], NAMES, entries)
    data = yaml.safe_load((tmp_path / "yolo" / "data.yaml").read_text(encoding="utf-8"))
    assert data["names"] == dict(enumerate(NAMES))
    pictures = sorted((tmp_path / "yolo" / data["train"]).iterdir())
    assert [path.name for path in pictures] == ["1 é.png", "1 é_1.png"]
    labels = [tmp_path / "yolo" / "labels" / f"{path.stem}.txt" for path in pictures]
    boxes = np.loadtxt(labels[0])
    np.testing.assert_allclose(boxes, [[2, 0.35, 0.625, 0.5, 0.75], [0, 0.5, 0.25, 1, 0.5]])
    assert labels[1].read_text() == ""
    with Image.open(pictures[1]) as picture:
        assert picture.size == (40, 20)


def test_label_studio(tmp_path, entries):
    write_labels(tmp_path, ["label-studio"], NAMES, entries)
    view = ElementTree.parse(tmp_path / "label_studio.xml").getroot()
    picture, labels = view
    assert [label.get("value") for label in labels] == list(NAMES)
    tasks = json.loads((tmp_path / "label_studio.json").read_text())
    path = Path(entries[0]["file_name"]).as_posix()
    assert tasks[0]["data"] == {
        "image": f"/data/local-files/?d={path[1:].replace('1 é', '1%20%C3%A9')}"
    }
    assert tasks[1]["predictions"][0]["result"] == []
    first = tasks[0]["predictions"][0]["result"][0]
    assert (first["from_name"], first["to_name"]) == (labels.get("name"), picture.get("name"))
    assert (first["original_width"], first["original_height"]) == (40, 20)
    assert first["value"] == {
        **{"x": 10, "y": 25, "width": 50, "height": 75, "rotation": 0},
        "rectanglelabels": ["no"],
    }
