"""environment.json and evaluations.json, one entry per start; and what a run's folder says."""

import json
import math
import platform

import pytest
import torch

from hierkd.reports import run_record
from hierkd.reports.run_record import read_entries, read_run, record_evaluation, record_start


def start(folder, **changes):
    given = {"command": "train_net.py --resume", "iteration": 0, "num_processes": 2}
    record_start(folder, **{**given, "root": folder.parent, **changes})


def test_each_start_is_added(tmp_path):
    folder = tmp_path / "run"
    start(folder)
    start(folder, iteration=500)
    first, second = json.loads((folder / "environment.json").read_text())
    assert (first["iteration"], second["iteration"]) == (0, 500)
    assert (first["command"], first["num_processes"]) == ("train_net.py --resume", 2)
    assert first["date"] <= second["date"]
    assert first["commit"] is None  # no checkout
    assert first["versions"]["python"] == platform.python_version()
    assert first["versions"]["torch"] == torch.__version__
    assert {"hierkd", "detectron2", "numpy"} <= first["versions"].keys()
    assert first["hardware"]["cores"] >= 1
    assert len(first["hardware"]["gpus"]) == torch.cuda.device_count()
    assert platform.node() not in json.dumps(first["hardware"])


def test_figures_of_an_evaluation(tmp_path, monkeypatch):
    monkeypatch.setattr(run_record, "git_commit", lambda root: "0123abc+changes")
    results = {"val_all": {"bbox": {"novel/AP50": 12.5, "all/APl": math.nan, "AP50-cat": 3.0}}}
    record_evaluation(
        tmp_path, results, command="c", root=tmp_path, weights="w.pth", num_processes=1
    )
    (entry,) = read_entries(tmp_path / "evaluations.json")
    assert entry["figures"]["val_all/bbox/all/APl"] is None
    assert (entry["weights"], entry["commit"]) == ("w.pth", "0123abc+changes")
    (evaluation,) = read_run(tmp_path).evaluations
    assert evaluation.title == f"--eval-only of w.pth, {entry['date']}"
    found = evaluation.figures["val_all"]
    assert math.isnan(found.pop("all/APl"))
    assert found == {"novel/AP50": 12.5, "AP50-cat": 3.0}


def test_a_write_that_fails_leaves_the_old_file_and_the_training(tmp_path, monkeypatch, caplog):
    start(tmp_path)
    before = (tmp_path / "environment.json").read_bytes()

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_text", full)
        start(tmp_path)
    assert "No space left" in caplog.text
    assert (tmp_path / "environment.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["environment.json"]


@pytest.mark.parametrize("text", ["{}", "[1]", "null", '[{"date": ', "[" * 100_000])
def test_a_broken_file_is_named_and_kept_aside(tmp_path, caplog, text):
    path = tmp_path / "environment.json"
    assert read_entries(path) == []
    path.write_text(text)
    with pytest.raises(ValueError, match=r"environment\.json"):
        read_entries(path)
    start(tmp_path)
    assert "environment.json" in caplog.text
    assert (tmp_path / "environment.broken.json").read_text() == text
    assert len(read_entries(path)) == 1


# ----------------------------------------------------------------------------------------- reading


def test_a_folder_without_a_run_is_named_with_what_it_lacks(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(
            FileNotFoundError, match=r"config\.yaml, metrics\.json, evaluations"
        ) as e:
            read_run(folder)
        assert str(folder) in str(e.value)


def test_what_is_missing_or_broken_is_noted(tmp_path):
    (tmp_path / "metrics.json").write_text(
        '{"iteration": 19, "total_loss": 5.0}\n{"iteration": 39, "total_loss": 4.0}\n'
        'broken\n{"iteration": 39, "total_loss": 3.0}\n'
    )
    run = read_run(tmp_path)
    assert run.metrics.curves == {"total_loss": ([19, 39], [5.0, 3.0])}
    assert (run.num_iterations, run.config, run.figures) == (40, {}, {})
    words = ("no config.yaml", "1 broken lines", "back to an earlier", "no environment.json")
    for word, note in zip(words, run.notes, strict=True):
        assert word in note


def test_a_training_comes_before_later_evaluations_and_starts_anew(tmp_path):
    (tmp_path / "config.yaml").write_text("SEED: [1\n")
    starts = [{"iteration": i, "commit": c} for i, c in ((0, "a"), (50, "b"), (0, "c"), (20, "d"))]
    (tmp_path / "environment.json").write_text(json.dumps(starts))
    (tmp_path / "metrics.json").write_text(
        '{"iteration": 9, "d/bbox/novel/AP50": 1.0}\n{"iteration": 19, "d/bbox/novel/AP50": 2.0}\n'
    )
    alone = [{"weights": w, "date": "1999", "figures": {"d/b/x": "?"}} for w in ("v", None)]
    (tmp_path / "evaluations.json").write_text(json.dumps(alone))
    run = read_run(tmp_path)
    assert [each["commit"] for each in run.starts] == ["c", "d"]
    assert any("2 earlier starts" in note for note in run.notes)
    assert any("config.yaml cannot be read" in note for note in run.notes)
    assert run.config_text == "SEED: [1\n"
    assert [each.title for each in run.evaluations] == [
        "in training, iteration 19",
        "in training, iteration 9",
        "--eval-only of random weights, 1999",
        "--eval-only of v, 1999",
    ]
    assert run.figures == {"d": {"novel/AP50": 2.0}}
    assert math.isnan(run.evaluations[2].figures["d"]["x"])
