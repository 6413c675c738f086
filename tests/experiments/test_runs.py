"""Training runs: what counts as complete, what is started, and what a record says."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import hierkd.experiments.runs as runs_module
from hierkd.experiments.runs import Run, execute, find_figure, git_commit, read_record

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(tmp_path):
    return Run("a row", "configs/x.yaml", ("MODEL.DEVICE", "cpu"), 3, tmp_path / "a" / "seed3")


@pytest.fixture
def train(monkeypatch):
    """Replace trainings: each writes metrics; the first fails if ``fail_first``."""
    seen = SimpleNamespace(calls=[], fail_first=False)

    def fake(command, *, cwd, env, stdout, **_):
        seen.calls.append((command, cwd, env))
        stdout.write("last words\n")
        if seen.fail_first and len(seen.calls) == 1:
            return SimpleNamespace(returncode=1)
        folder = Path(command[command.index("OUTPUT_DIR") + 1])
        lines = [{"iteration": 1, "total_loss": 2.0}, {"iteration": 2, "d_novel/bbox/AP50": 7.5}]
        (folder / "metrics.json").write_text("".join(json.dumps(each) + "\n" for each in lines))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(runs_module, "git_commit", lambda root: "abc")
    monkeypatch.setattr(subprocess, "run", fake)
    return seen


def test_a_run_trains_once_and_its_record_holds_the_last_figures(run, train):
    assert read_record(run) is None
    for _ in range(2):
        execute([run], ROOT, jobs=1, threads=2)
    ((command, cwd, environment),) = train.calls
    assert command[:4] == [sys.executable, "train_net.py", "--config-file", "configs/x.yaml"]
    assert command[4:] == ["SEED", "3", "OUTPUT_DIR", str(run.folder), "MODEL.DEVICE", "cpu"]
    assert (cwd, environment["OMP_NUM_THREADS"]) == (ROOT, "2")
    record = read_record(run)
    assert record["metrics"] == {"d_novel/bbox/AP50": 7.5}
    assert (record["commit"], record["seed"], record["opts"]) == ("abc", 3, ["MODEL.DEVICE", "cpu"])


def test_an_interrupted_run_is_resumed(run):
    assert "--resume" not in run.command()
    run.folder.mkdir(parents=True)
    (run.folder / "last_checkpoint").write_text("model_0000299.pth")
    assert "--resume" in run.command()


@pytest.mark.parametrize("change", [{"seed": 4}, {"opts": ()}, {"config": "configs/y.yaml"}])
def test_a_folder_of_another_run_is_refused_before_anything_starts(run, train, change):
    execute([run], ROOT, jobs=1, threads=1)
    other, fresh = replace(run, **change), replace(run, folder=run.folder.parent / "fresh")
    with pytest.raises(ValueError, match=r"run\.json is of another run.*another folder"):
        execute([fresh, other], ROOT, jobs=1, threads=1)
    assert len(train.calls) == 1


def test_a_failure_names_its_log_and_stops_no_other_run(run, train):
    train.fail_first = True
    second = replace(run, name="another", folder=run.folder.parent / "second")
    with pytest.raises(RuntimeError, match=r"a row, seed 3.*stdout\.txt") as error:
        execute([run, second], ROOT, jobs=1, threads=1)
    assert "another" not in str(error.value)
    assert (read_record(run) is None, read_record(second) is None) == (True, False)
    execute([run, second], ROOT, jobs=1, threads=1)  # only the failed one is run again
    assert len(train.calls) == 3
    assert (run.folder / "stdout.txt").read_text() == "last words\n" * 2


def test_figures_are_found_by_the_part_and_the_metric():
    metrics = {
        "w_test_novel/bbox/novel/AP50": 1.0,
        "w_test_all/bbox/novel/AP50": 2.0,
        "w_test_all/bbox/AP50-cat": 3.0,
        "w_test_all/box_proposals/novel/AR50@100": 4.0,
    }
    assert find_figure(metrics, "novel", "novel/AP50") == 1.0
    assert find_figure(metrics, "all", "novel/AP50") == 2.0
    assert find_figure(metrics, "all", "novel/AR50@100") == 4.0
    assert find_figure(metrics, "base", "base/AP50") is None


def test_the_commit_of_a_checkout(tmp_path):
    assert git_commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "file").write_text("1")
    for command in (["init", "-q"], ["add", "file"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    commit = git_commit(tmp_path)
    assert len(commit) == 9
    (tmp_path / "file").write_text("2")
    assert git_commit(tmp_path) == f"{commit}+changes"
