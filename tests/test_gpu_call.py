"""tools/test_gpu.py: parts that fail leave the others' figures; all of it at its CPU size."""

import json
import shutil
import sys
import time

import pytest

import tiny_training
from tools import test_gpu as call


def test_a_part_that_fails_or_hangs_leaves_the_others(tmp_path, monkeypatch, capsys):
    codes = {
        "tests": "print('some words')",
        "step": "import sys; sys.exit(3)",
        "train": "import subprocess as s; s.run(['sleep', '60'])",
        "evaluate": "print('last')",
    }
    plan = {name: [sys.executable, "-c", code] for name, code in codes.items()}
    monkeypatch.setattr(call, "plan", lambda *_: plan)
    monkeypatch.setattr(call, "LIMITS", {**dict.fromkeys(codes, 20), "train": 0.3})
    started = time.monotonic()
    assert call.main(["--output", str(tmp_path)]) == 1
    assert time.monotonic() - started < 30
    parts = json.loads((tmp_path / "test_gpu.json").read_text())["parts"]
    ends = {name: part["ended"].split(" after ")[0] for name, part in parts.items()}
    assert list(ends.values()) == ["done", "failed with status 3", "stopped", "done"]
    assert parts["tests"]["said"] == "some words\n"
    page = (tmp_path / "test_gpu.html").read_text()
    assert all(end in page for end in ends.values())
    assert "step: failed with status 3" in capsys.readouterr().out


def test_the_limits_are_eight_minutes_together():
    assert sum(call.LIMITS.values()) <= 480
    assert set(call.BENCHMARKS) < set(call.LIMITS)


@pytest.mark.slow
def test_the_call_at_its_size_without_a_gpu(tmp_path, monkeypatch):
    with tiny_training.prepared(tmp_path) as root:
        monkeypatch.setenv("DETECTRON2_DATASETS", str(root))
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        shutil.copy(root / "clip.pt", root / "miniature" / "teacher.pt")
        pairs = tiny_training.command_line(root, root / "clip.pt")[2:]
        tests = ("DATASETS.TEST", "('miniature_ovd_val_all',)")
        status = call.main(["--output", str(tmp_path / "out"), *pairs, *tests])
    record = json.loads((tmp_path / "out" / "test_gpu.json").read_text())
    assert status == 0, record["parts"]
    assert record["miniature"]["largest difference"] == 0
    assert all(record["parts"][name]["reports"] for name in ("step", "infer", "vocabulary"))
