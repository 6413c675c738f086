"""environment.json and evaluations.json: one entry per start, never half a file."""

import json
import math
import platform

import pytest
import torch

from hierkd.reports import run_record
from hierkd.reports.run_record import read_entries, record_evaluation, record_start


def start(folder, tmp_path, **changes):
    given = {"command": "train_net.py --resume", "iteration": 0, "num_processes": 2}
    record_start(folder, root=tmp_path, **{**given, **changes})


def test_each_start_is_added(tmp_path):
    folder = tmp_path / "run"
    start(folder, tmp_path)
    start(folder, tmp_path, iteration=500)
    first, second = json.loads((folder / "environment.json").read_text())
    assert (first["iteration"], second["iteration"]) == (0, 500)
    assert first["command"] == "train_net.py --resume"
    assert first["num_processes"] == 2
    assert first["date"] <= second["date"]
    assert first["commit"] is None  # no checkout
    assert first["versions"]["python"] == platform.python_version()
    assert first["versions"]["torch"] == torch.__version__
    assert {"hierkd", "detectron2", "numpy"} <= first["versions"].keys()
    assert first["hardware"]["cores"] >= 1
    assert len(first["hardware"]["gpus"]) == torch.cuda.device_count()
    assert platform.node() not in json.dumps(first["hardware"])


def test_a_write_that_fails_leaves_the_old_file_and_the_training(tmp_path, monkeypatch, caplog):
    start(tmp_path, tmp_path)
    before = (tmp_path / "environment.json").read_bytes()

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_text", full)
        start(tmp_path, tmp_path)
    assert "No space left" in caplog.text
    assert (tmp_path / "environment.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["environment.json"]


def test_a_broken_file_is_kept_aside(tmp_path, caplog):
    (tmp_path / "environment.json").write_text('[{"date": ')
    start(tmp_path, tmp_path)
    assert "environment.json: not JSON" in caplog.text
    assert (tmp_path / "environment.broken.json").read_text() == '[{"date": '
    assert len(read_entries(tmp_path / "environment.json")) == 1


@pytest.mark.parametrize("text", ["{}", "[1]", "null", "[" * 100_000])
def test_what_is_no_list_of_entries_is_named(tmp_path, text):
    path = tmp_path / "environment.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"environment\.json"):
        read_entries(path)


def test_no_file_has_no_entries(tmp_path):
    assert read_entries(tmp_path / "environment.json") == []


def test_figures_of_an_evaluation(tmp_path, monkeypatch):
    monkeypatch.setattr(run_record, "git_commit", lambda root: "0123abc+changes")
    results = {"val_all": {"bbox": {"novel/AP50": 12.5, "all/APl": math.nan, "AP50-cat": 3.0}}}
    record_evaluation(
        tmp_path, results, command="c", root=tmp_path, weights="w.pth", num_processes=1
    )
    (entry,) = read_entries(tmp_path / "evaluations.json")
    assert entry["figures"] == {
        "val_all/bbox/novel/AP50": 12.5,
        "val_all/bbox/all/APl": None,
        "val_all/bbox/AP50-cat": 3.0,
    }
    assert (entry["weights"], entry["commit"]) == ("w.pth", "0123abc+changes")
