"""Timing in turns, ratios within rounds, and the report."""

import json
import time
from pathlib import Path

import pytest
import torch

from hierkd.benchmarks.timing import Measurement, Report, measure, peak_memory, ratio

CPU = torch.device("cpu")


def test_alternatives_take_turns_in_rotating_order() -> None:
    calls: list[str] = []
    candidates = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = measure(candidates, device=CPU, rounds=2, warmup=1)
    assert "".join(calls) == "abc" + "bca" + "cab"
    assert {name: len(m.seconds) for name, m in times.items()} == {"a": 2, "b": 2, "c": 2}


def test_measured_time_is_that_of_the_call() -> None:
    times = measure({"sleep": lambda: time.sleep(0.02)}, device=CPU, rounds=3, warmup=0)
    assert all(0.02 <= taken < 0.5 for taken in times["sleep"].seconds)


def test_no_round_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one round is needed, got 0"):
        measure({"a": int}, device=CPU, rounds=0)


def test_ratio_ignores_a_machine_that_slows_down_for_a_while() -> None:
    mine = Measurement("mine", (1.0, 1.0, 30.0, 1.0))
    theirs = Measurement("theirs", (2.0, 2.0, 60.0, 0.1))
    assert ratio(mine, theirs) == 0.5
    assert mine.median == 1.0


def test_peak_memory_sees_what_is_gone_afterwards() -> None:
    def needs_64_mib() -> None:
        block = torch.ones(64 * 2**18)  # float32
        time.sleep(0.05)
        del block

    assert 55 < peak_memory(needs_64_mib, CPU) < 100


def test_report_is_written_as_markdown_and_json(tmp_path: Path) -> None:
    rows = [{"what": "loop", "seconds": 0.123456, "ratio": 1.0}, {"what": "ours", "seconds": 150.0}]
    report = Report("Crops", CPU, {"boxes": 450}, rows, ["Random pixels."])
    markdown, data = report.write(tmp_path / "new", "crops")
    text = markdown.read_text()
    assert "| what | seconds | ratio |" in text
    assert "| loop | 0.123 | 1 |" in text
    assert "| ours | 150 | - |" in text
    assert "- boxes: 450" in text
    assert text.endswith("Random pixels.\n")
    content = json.loads(data.read_text())
    assert content["rows"] == rows
    assert content["machine"]["torch"] == torch.__version__.split("+")[0]
    assert content["command"].startswith("python ")
