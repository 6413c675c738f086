"""Filtering detections, and writing them down."""

import json

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances

from hierkd.inference.detections import DetectionFilter, as_coco_results, as_records

VOCABULARY = ("cat", "dog", "traffic cone")


@pytest.fixture
def found():
    """Five detections, best first."""
    boxes = torch.tensor([[i, 2.0 * i, 10.5 + i, 20.25 + i] for i in range(5)])
    return Instances(
        (50, 60),
        pred_boxes=Boxes(boxes),
        scores=torch.tensor([0.9, 0.7, 0.5, 0.3, 0.1]),
        pred_classes=torch.tensor([0, 1, 0, 2, 1]),
    )


def numbers(instances):
    """Which of the five are left, told by the left edge of their boxes."""
    return instances.pred_boxes.tensor[:, 0].int().tolist()


@pytest.mark.parametrize(
    ("arguments", "left"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"score_threshold": 0.5}, [0, 1, 2]),
        ({"score_threshold": 1}, []),
        ({"top_k": 2}, [0, 1]),
        ({"score_threshold": np.float32(0.25), "top_k": np.int64(2)}, [0, 1]),
        ({"top_k": 100}, [0, 1, 2, 3, 4]),
        ({"class_thresholds": {"cat": 0.6}}, [0, 1, 3, 4]),
        ({"score_threshold": 0.6, "class_thresholds": {"traffic cone": 0.2}}, [0, 1, 3]),
        ({"score_threshold": 0.6, "class_thresholds": {"traffic cone": 0.2}, "top_k": 2}, [0, 1]),
        ({"class_thresholds": {"cat": 1, "dog": 1, "traffic cone": 1}}, []),
    ],
)
def test_what_is_kept(found, arguments, left):
    assert numbers(DetectionFilter(**arguments)(found, VOCABULARY)) == left


def test_nothing_found_stays_nothing(found):
    assert len(DetectionFilter(0.5, 3, {"cat": 0.2})(found[:0], VOCABULARY)) == 0


@pytest.mark.parametrize(
    "arguments",
    [
        {"score_threshold": -0.01},
        {"score_threshold": float("inf")},
        {"score_threshold": "0.5"},
        {"score_threshold": True},
        {"top_k": 0},
        {"top_k": 2.5},
        {"top_k": True},
        {"class_thresholds": {"cat": 1.01}},
    ],
)
def test_wrong_values(arguments):
    with pytest.raises(ValueError, match="must be"):
        DetectionFilter(**arguments)


def test_unknown_class(found):
    with pytest.raises(ValueError, match=r"\['zebra'\]; it has 3 classes: cat, dog, traffic cone"):
        DetectionFilter(class_thresholds={"zebra": 0.1})(found, VOCABULARY)


def test_records_and_coco_results(found):
    records = as_records(found[2:4], VOCABULARY)
    assert records == [
        {"class": "cat", "score": 0.5, "box_xyxy": [2.0, 4.0, 12.5, 22.25]},
        {"class": "traffic cone", "score": 0.3, "box_xyxy": [3.0, 6.0, 13.5, 23.25]},
    ]
    results = as_coco_results(records, 17, {"cat": 5, "traffic cone": 90})
    assert json.loads(json.dumps(results)) == [
        {"image_id": 17, "category_id": 5, "bbox": [2.0, 4.0, 10.5, 18.25], "score": 0.5},
        {"image_id": 17, "category_id": 90, "bbox": [3.0, 6.0, 10.5, 17.25], "score": 0.3},
    ]
