"""Thousands of broken annotation files: a named error, or records that are right."""

import json
import logging
import math
import os
import time

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances
from PIL import Image

from hierkd.data.coco import check_datasets, load_ovd_json, register_ovd_dataset
from hierkd.evaluation.proposal_evaluation import ProposalEvaluator
from hierkd.evaluation.split_coco_evaluation import SplitCOCOEvaluator
from mutations import broken_json_file

WIDTH, HEIGHT = 40, 30
VOCABULARY = ("ant", "bee", "cow")
FILES = ("1.png", "2.png", "sub/3.png")
SLOWEST = 5.0  # seconds that one file may take
LONGEST = 4000  # characters that a message may have


def valid():
    images = [
        {"id": i, "file_name": name, "height": HEIGHT, "width": WIDTH, "captions": ["a", "b c"]}
        for i, name in enumerate(FILES, start=1)
    ]
    annotations = [
        {"id": 10 + i, "image_id": 1 + i % 3, "category_id": (1, 4, 9)[i % 3], "area": 125}
        | {"bbox": [2 + i, 3, 10, 12.5], "iscrowd": 0, "segmentation": [[1, 2, 3, 4, 5, 6]]}
        for i in range(5)
    ]
    categories = [{"id": i, "name": n} for i, n in zip((1, 4, 9), VOCABULARY, strict=True)]
    return {"images": images, "annotations": annotations, "categories": categories}


@pytest.fixture
def root(tmp_path):
    (tmp_path / "images" / "sub").mkdir(parents=True)
    for name in (*(f"images/{each}" for each in FILES), "out.png"):
        Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / name)
    return tmp_path


@pytest.fixture
def dataset(root):
    """A dataset over a file that each case writes anew."""
    name = "fuzzed_annotations"
    register_ovd_dataset(
        name,
        json_file=str(root / "broken.json"),
        image_root=str(root / "images"),
        vocabulary=VOCABULARY,
        base_classes=VOCABULARY[:2],
        novel_classes=VOCABULARY[2:],
    )
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def outcome(call, where, seed):
    """The result of ``call``, None for an error of ours; all other errors fail the test."""
    started = time.perf_counter()
    try:
        result = call()
    except (ValueError, FileNotFoundError) as error:
        assert type(error) in (ValueError, FileNotFoundError), f"seed {seed}: {error!r}"
        assert any(str(each) in str(error) for each in where), f"seed {seed}: {error}"
        assert len(str(error)) < LONGEST, f"seed {seed}: {len(str(error))} characters"
        result = None
    except Exception as error:
        pytest.fail(f"seed {seed}: {error!r}")
    assert time.perf_counter() - started < SLOWEST, f"seed {seed}"
    return result


def check_records(records, content, image_root):
    """Everything a training relies on, and nothing of the file lost but boxes of no use."""
    inside = os.path.realpath(image_root) + os.sep
    assert len(records) == len(content["images"]) == len({r["image_id"] for r in records})
    size_of = {}
    for record in records:
        assert os.path.realpath(record["file_name"]).startswith(inside)
        assert os.path.exists(record["file_name"])
        size_of[record["image_id"]] = (record["width"], record["height"])
        assert all(type(side) is int and side > 0 for side in size_of[record["image_id"]])
        assert all(type(text) is str for text in record.get("captions", []))
        for each in record["annotations"]:
            x, y, width, height = each["bbox"]
            assert all(type(value) is float and math.isfinite(value) for value in each["bbox"])
            assert width > 0
            assert height > 0
            assert x >= 0
            assert y >= 0
            assert x + width <= record["width"] * (1 + 1e-12)
            assert y + height <= record["height"] * (1 + 1e-12)
            assert each["category_id"] in (0, 1, 2)
            assert each["iscrowd"] in (0, 1)
    kept = [each["id"] for record in records for each in record["annotations"]]
    assert len(kept) == len(set(kept))
    assert set(kept) == {
        each["id"]
        for each in content["annotations"]
        if _shows_something(each["bbox"], size_of[each["image_id"]])
    }


def _shows_something(box, size):
    """Whether a box of the file covers a part of the picture."""
    if not all(map(math.isfinite, box)) or min(box[2:]) <= 0:
        return False
    return all(min(box[i] + box[2 + i], size[i]) > max(box[i], 0) for i in (0, 1))


@pytest.mark.parametrize("count", [300, pytest.param(20_000, marks=pytest.mark.slow)])
def test_loading(root, dataset, count):
    path, image_root = root / "broken.json", root / "images"
    loaded = 0
    for seed in range(count):
        path.write_bytes(broken_json_file(valid(), seed))
        records = outcome(
            lambda: load_ovd_json(str(path), str(image_root), VOCABULARY), (path, image_root), seed
        )
        if records is not None:
            check_records(records, json.loads(path.read_text("utf-8-sig")), image_root)
            loaded += 1
    print(f"{count} annotation files: {loaded} loaded, {count - loaded} refused")
    assert count / 10 < loaded < count * 9 / 10
    path.write_text(json.dumps(valid()))
    assert len(check_datasets([dataset])) == 3


def detections():
    """The picture's id, and a detection of its first object."""
    inputs, outputs = [{"image_id": i} for i in (1, 2, 3)], []
    for index in range(3):
        found = Instances((HEIGHT, WIDTH))
        found.pred_boxes = Boxes(torch.tensor([[2.0 + index, 3, 12 + index, 15.5]]))
        found.scores, found.pred_classes = torch.tensor([0.9]), torch.tensor([index])
        outputs.append({"instances": found})
    return inputs, outputs


def evaluate(dataset):
    MetadataCatalog.get(dataset).__dict__.pop("thing_dataset_id_to_contiguous_id", None)
    evaluator = SplitCOCOEvaluator(dataset, distributed=False)
    known = {image["id"] for image in evaluator._coco_api.dataset["images"]}
    evaluator.reset()
    for given, output in zip(*detections(), strict=True):
        if given["image_id"] in known:
            evaluator.process([given], [output])
    ProposalEvaluator(dataset, distributed=False)
    # A file without annotations, such as COCO's test files, has no figures.
    return evaluator.evaluate().get("bbox", {})


def test_an_annotation_with_the_id_0_can_be_found(root, dataset):
    """COCO's code marks a detection by the id of what it found, and takes 0 for nothing."""
    content = valid()
    figures = []
    for first in (0, 1):
        for number, each in enumerate(content["annotations"], start=first):
            each["id"] = number
        (root / "broken.json").write_text(json.dumps(content))
        figures.append(evaluate(dataset))
    assert figures[0] == pytest.approx(figures[1], nan_ok=True)


def test_a_box_that_is_no_number_does_not_count_as_found(root, dataset):
    content = valid()
    (root / "broken.json").write_text(json.dumps(content))
    whole = evaluate(dataset)
    bad = {**content["annotations"][0], "id": 99, "bbox": [math.nan, 3, 10, math.nan]}
    content["annotations"].insert(0, bad)
    (root / "broken.json").write_text(json.dumps(content))
    assert evaluate(dataset) == pytest.approx(whole, nan_ok=True)
