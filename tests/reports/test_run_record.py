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


# ----------------------------------------------------------------------------------------- reading


def test_a_folder_without_a_run_is_named_with_what_it_lacks(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(
            FileNotFoundError, match=r"config\.yaml, metrics\.json, evaluations"
        ) as e:
            read_run(folder)
        assert str(folder) in str(e.value)


def test_a_training_comes_before_later_evaluations_and_starts_anew(tmp_path):
    (tmp_path / "config.yaml").write_text("SEED: 1\n")
    starts = [{"iteration": i, "commit": c} for i, c in ((0, "a"), (50, "b"), (0, "c"), (20, "d"))]
    (tmp_path / "environment.json").write_text(json.dumps(starts))
    (tmp_path / "metrics.json").write_text(
        '{"iteration": 9, "d/bbox/novel/AP50": 1.0}\n{"iteration": 19, "d/bbox/novel/AP50": 2.0}\n'
    )
    alone = [{"weights": w, "date": "1999", "figures": {"d/b/x": None}} for w in ("v", None)]
    (tmp_path / "evaluations.json").write_text(json.dumps(alone))
    run = read_run(tmp_path)
    assert [each["commit"] for each in run.starts] == ["c", "d"]
    assert any("2 earlier starts" in note for note in run.notes)
    assert (run.config, run.config_text) == ({"SEED": 1}, "SEED: 1\n")
    assert [each.title for each in run.evaluations] == [
        "in training, iteration 19",
        "in training, iteration 9",
        "--eval-only of random weights, 1999",
        "--eval-only of v, 1999",
    ]
    assert run.figures == {"d": {"novel/AP50": 2.0}}
    assert math.isnan(run.evaluations[2].figures["d"]["x"])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("environment.json", text) for text in ("{}", "[1]", '[{"date": ')),
        *(("config.yaml", text) for text in ("SEED: [1", "a text")),
        ("metrics.json", "broken\n"),
    ],
)
def test_a_broken_file_is_named(tmp_path, name, text):
    (tmp_path / "evaluations.json").write_text("[]")
    words = ("no config.yaml", "no metrics.json", "no environment.json")
    for word, note in zip(words, read_run(tmp_path).notes, strict=True):
        assert word in note
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=name):
        read_run(tmp_path)
