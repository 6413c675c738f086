"""The benchmark of the evaluation at a size where it takes a moment."""

from argparse import ArgumentParser

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog

from hierkd.benchmarks import eval as benchmark


def arguments(*extra):
    parser = ArgumentParser()
    benchmark.add_arguments(parser)
    parser.add_argument("--rounds", type=int)
    return parser.parse_args(["--images", "8", "--classes", "6", "--detections", "20", *extra])


def test_both_libraries_have_a_row_and_the_same_figures():
    before = set(DatasetCatalog.list())
    report = benchmark.run(arguments("--rounds", "2"), torch.device("cpu"))
    assert [row["library"] for row in report.rows] == ["pycocotools", "faster-coco-eval"]
    assert report.rows[0]["over pycocotools"] == 1.0
    for row in report.rows:
        assert row["largest difference (points)"] <= 1e-6
        assert row["seconds"] > 0
    assert set(DatasetCatalog.list()) == before


def test_the_problem_says_something():
    """Most hits overlap their object, other boxes lie anywhere, all inside the picture."""
    rng = np.random.default_rng(1)
    truth = benchmark.random_ground_truth(rng, 30, 5)
    found = benchmark.random_detections(rng, truth, 12)
    assert {a["image_id"] for a in truth["annotations"]} <= set(found) == set(range(1, 31))
    assert {a["category_id"] for a in truth["annotations"]} == {1, 3, 5, 7, 9}
    for annotation in truth["annotations"]:
        x, y, width, height = annotation["bbox"]
        assert x >= 0
        assert y >= 0
        assert x + width <= 640
        assert y + height <= 480
    assert all(len(each) == 12 for each in found.values())
    assert all(bool(each.pred_boxes.nonempty().all()) for each in found.values())


def test_differences_see_a_missing_figure():
    known, unknown = {"a": 1.0}, {"a": float("nan")}
    assert benchmark._difference(known, {"a": 1.5}) == 0.5
    assert benchmark._difference(unknown, unknown) == 0.0
    assert benchmark._difference(known, unknown) == np.inf
    assert benchmark._difference(known, {}) == np.inf


def test_sizes_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"got 8, 1 and 20"):
        benchmark.run(arguments("--classes", "1"), torch.device("cpu"))
