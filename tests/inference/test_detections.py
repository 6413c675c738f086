"""Filtering detections, and writing them down."""

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances

from hierkd.inference.detections import DetectionFilter, as_records, parse_class_thresholds

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


@pytest.mark.parametrize(
    ("arguments", "left"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"score_threshold": 0.5}, [0, 1, 2]),
        ({"score_threshold": 0.7}, [0]),  # in single precision, 0.7 is less than 0.7
        ({"score_threshold": 1}, []),
        ({"top_k": 2}, [0, 1]),
        ({"score_threshold": np.float32(0.25), "top_k": np.int64(2)}, [0, 1]),
        ({"top_k": 100}, [0, 1, 2, 3, 4]),
        ({"class_thresholds": {"cat": 0.6}}, [0, 1, 3, 4]),
        ({"score_threshold": 0.6, "class_thresholds": {"traffic cone": 0.2}}, [0, 1, 3]),
        ({"score_threshold": 0.6, "class_thresholds": {"traffic cone": 0.2}, "top_k": 2}, [0, 1]),
    ],
)
def test_what_is_kept(found, arguments, left):
    keep = DetectionFilter(**arguments)
    # Which of the five are left is told by the left edge of their boxes.
    assert keep(found, VOCABULARY).pred_boxes.tensor[:, 0].int().tolist() == left
    assert len(keep(found[:0], VOCABULARY)) == 0


@pytest.mark.parametrize(
    "arguments",
    [
        {"score_threshold": -0.01},
        {"score_threshold": float("nan")},
        {"top_k": 0},
        {"class_thresholds": {"cat": 1.01}},
    ],
)
def test_wrong_values(arguments):
    with pytest.raises(ValueError, match="must be"):
        DetectionFilter(**arguments)


def test_unknown_class(found):
    with pytest.raises(ValueError, match=r"\['zebra'\]; it has 3 classes: 'cat', 'dog'"):
        DetectionFilter(class_thresholds={"zebra": 0.1})(found, VOCABULARY)


def test_records(found):
    assert as_records(found[2:4], VOCABULARY) == [
        {"class": "cat", "score": 0.5, "box_xyxy": [2.0, 4.0, 12.5, 22.25]},
        {"class": "traffic cone", "score": 0.3, "box_xyxy": [3.0, 6.0, 13.5, 23.25]},
    ]


def test_thresholds_of_classes(tmp_path):
    (tmp_path / "scores.txt").write_text("cup, red=1\na=b = 0.25\n")
    expected = {"cup, red": 1.0, "a=b": 0.25}
    assert parse_class_thresholds(str(tmp_path / "scores.txt")) == expected
    assert parse_class_thresholds("dog=0.6, traffic cone = 0.1,") == {
        "dog": 0.6,
        "traffic cone": 0.1,
    }
    assert parse_class_thresholds(" ") == {}
    for text, named in (("zebra", "'zebra'"), ("=1", "'=1'"), ("a=0.1,a=0.2", "'a'")):
        with pytest.raises(ValueError, match=named):
            parse_class_thresholds(text)
