"""Timing in turns, ratios within rounds, the report, and detectors of random weights."""

import json

import pytest
import torch

from hierkd.benchmarks.timing import Report, measure, peak_memory, random_hierkd, ratio

CPU = torch.device("cpu")


def test_alternatives_take_turns_in_rotating_order():
    calls = []
    candidates = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = measure(candidates, CPU, 2)
    assert "".join(calls) == "abc" + "bca" + "cab"
    assert {name: len(taken) for name, taken in times.items()} == {"a": 2, "b": 2, "c": 2}


def test_ratio_ignores_a_machine_that_slows_down_for_a_while():
    assert ratio((1.0, 1.0, 30.0, 1.0), (2.0, 2.0, 60.0, 0.1)) == 0.5


def test_peak_memory_sees_what_is_gone_afterwards():
    def needs_64_mib():
        torch.ones(64 * 2**18)  # float32

    assert 55 < peak_memory(needs_64_mib, CPU) < 100


def test_report_is_written_as_markdown_and_json(tmp_path):
    rows = [{"what": "loop", "seconds": 0.123456}, {"what": "ours", "seconds": 150.0}]
    report = Report("Crops", CPU, {"boxes": 450}, rows, ["Random pixels."])
    markdown, data = report.write(tmp_path / "new", "crops")
    lines = [[c.strip() for c in x.split("|")[1:-1]] for x in markdown.read_text().split("\n")]
    for line in (["what", "seconds"], ["loop", "0.123"], ["ours", "150"]):
        assert line in lines
    assert "- boxes: 450" in markdown.read_text()
    assert markdown.read_text().endswith("Random pixels.\n")
    content = json.loads(data.read_text())
    assert content["rows"] == rows
    assert content["machine"]["torch"] == torch.__version__.split("+")[0]
    assert content["command"].startswith("python ")


@pytest.mark.parametrize("config", ["configs/hierkd_R50.yaml", "configs/miniature/hierkd.yaml"])
def test_a_random_detector_detects_among_the_classes_asked_for(config):
    model = random_hierkd(config, 7, CPU, ["MODEL.ATSS.NMS_THRESH_TEST", "0.7"]).eval()
    assert model.inference_settings.nms_thresh == 0.7
    picture = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)
    with torch.inference_mode():
        found = model([{"image": picture, "height": 64, "width": 96}])[0]["instances"]
    assert len(found) > 0
    assert found.pred_classes.max() < 7
    assert torch.isfinite(found.scores).all()
