"""Overlap of vocabularies, the limit of detections, and the table of transfer figures."""

import json
import math
from types import SimpleNamespace

from hierkd.evaluation.transfer import (
    detection_limit,
    find_overlap,
    transfer_record,
    transfer_table,
)
from hierkd.modeling.detector_settings import InferenceSettings


def test_names_are_compared_as_a_reader_would():
    overlap = find_overlap(
        ["Car", "stop_sign", "dogs", "bow (weapon)", "sports car", "bus", "scarf", "light"],
        ["car", "stop sign", "dog", "bow", "traffic light", "buses"],
    )
    assert overlap.known == {
        "Car": "car",
        "stop_sign": "stop sign",
        "dogs": "dog",
        "bow (weapon)": "bow",
    }
    assert overlap.new == ("sports car", "bus", "scarf", "light")
    assert "4 of 8 names" in str(overlap)


def test_the_limit_holds_inside_the_block():
    detector = SimpleNamespace(inference_settings=InferenceSettings(max_detections=100))
    with detection_limit(detector, 300):
        assert detector.inference_settings == InferenceSettings(max_detections=300)
    assert detector.inference_settings.max_detections == 100
    with detection_limit(object(), 300):
        pass


def figures(*groups):
    metrics = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    return {f"{g}/{m}": 10.0 * k + j for k, g in enumerate(groups) for j, m in enumerate(metrics)}


def test_the_table_and_the_record():
    overlap = find_overlap(["a", "b", "c"], ["a"])
    found = {"x": figures("base", "novel", "all"), "y": {**figures("novel"), "rare/AP": math.nan}}
    lines = transfer_table(found, dict.fromkeys(found, overlap)).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[0][-3:] == ["APr", "APc", "APf"]
    assert [row[:4] for row in cells[2:]] == [
        ["x", "all", "3", "20.0"],
        ["x", "novel", "2", "10.0"],
        ["x", "base", "1", "0.0"],
        ["y", "novel", "2", "0.0"],
    ]
    record = transfer_record(found, dict.fromkeys(found, overlap), weights="w.pth")
    assert json.loads(json.dumps(record, allow_nan=False))["weights"] == "w.pth"
    assert record["figures"]["y"]["rare/AP"] is None
    assert record["overlap"]["x"]["known"] == {"a": "a"}
    assert "APr" not in transfer_table({"x": figures("all")}, {"x": overlap})
