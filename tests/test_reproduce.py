"""``tools/reproduce.py``: which commands a table needs, and that only what was run has a figure."""

import json

import pytest

import hierkd.experiments.runs as runs_module
from hierkd.experiments.tables import TABLES
from tools import reproduce


@pytest.fixture
def call(tmp_path, capsys):
    """Do what the command line says; returns what was printed."""

    def run(*arguments, options=()):
        output = ("--output", str(tmp_path / "out"))
        reproduce.reproduce(reproduce.get_parser().parse_args([*arguments, *output, *options]))
        return capsys.readouterr().out

    return run


@pytest.fixture
def trained(monkeypatch):
    """Replace trainings by ones whose novel AP50 is their place in the order of starting."""
    started = []

    def train(run, root, threads):
        started.append(run)
        run.folder.mkdir(parents=True, exist_ok=True)
        metrics = {"w_test_novel/bbox/novel/AP50": float(len(started))}
        record = {**run.identity(), "metrics": metrics}
        (run.folder / "run.json").write_text(json.dumps(record))
        return 0

    monkeypatch.setattr(runs_module, "_train", train)
    return started


def lines_of(out):
    """Label -> cells."""
    rows = [[cell.strip() for cell in x.split("|")[1:-1]] for x in out.splitlines() if "|" in x]
    return {cells[0]: cells[1:] for cells in rows}


def test_a_dry_run_prints_every_command_and_starts_nothing(call, trained):
    commands = call("--table", "4", "--scale", "coco", "--num-gpus", "4", "--dry-run").splitlines()
    for command, row in zip(commands, TABLES[4].rows, strict=True):
        assert f"train_net.py --config-file {row.coco.config} --num-gpus 4 " in command
        assert "REFERENCE_WORLD_SIZE" not in command
    assert trained == []
    # Table 7 has rows of other methods, and other than four GPUs follow the linear rule.
    out = call("--table", "7", "--scale", "coco", "--num-gpus", "1", "--dry-run")
    assert out.count("SOLVER.REFERENCE_WORLD_SIZE 4") == out.count("train_net.py") == 2


def test_options_reach_every_run_and_are_said_above_the_table(call, trained):
    options = ("--opts", "SOLVER.MAX_ITER", "5")
    arguments = ("--table", "3", "--rows", "4x4 patches", "--seeds", "0", "--jobs", "1")
    out = call(*arguments, options=options)
    (run,) = trained
    assert run.opts[-2:] == ("SOLVER.MAX_ITER", "5")
    assert "every run with SOLVER.MAX_ITER 5" in out
    with pytest.raises(ValueError, match="of another run"):
        call(*arguments, options=("--opts", "SOLVER.MAX_ITER", "6"))
    with pytest.raises(ValueError, match=r"MAX_ITERR"):
        call(*arguments, options=("--opts", "SOLVER.MAX_ITERR", "6"))


def test_collecting_starts_nothing_and_invents_nothing(call, trained):
    call("--table", "3", "--rows", "4x4 patches", "--seeds", "7", "--jobs", "1")
    lines = lines_of(call("--table", "3", "--seeds", "7", "--collect"))
    assert len(trained) == 1
    assert lines["4x4 patches"] == ["1", "not run", "64.2", "1.0", "20.1", "not run"]
    for row in TABLES[3].rows:
        if row.label != "4x4 patches":
            assert lines[row.label].count("not run") == len(TABLES[3].columns)


def test_the_detector_alone_and_clip_on_its_checkpoint(call, trained, tmp_path):
    out = call("--table", "6", "--seeds", "0", "--dry-run")
    trainings = [line for line in out.splitlines() if "train_net.py" in line]
    evaluations = [line for line in out.splitlines() if "clip_on_boxes.py predicted" in line]
    assert (len(trainings), len(evaluations)) == (3, 3)
    for training, evaluation in zip(trainings, evaluations, strict=True):
        folder = training.split("OUTPUT_DIR ")[1].split()[0]
        assert evaluation.endswith(f"MODEL.WEIGHTS {folder}/model_final.pth")
        assert " --datasets miniature_ovd_test_novel miniature_ovd_test_all " in evaluation
    folder = tmp_path / "out" / "miniature" / "table4_gkd" / "seed0"
    folder.mkdir(parents=True)
    figures = {"w_test_novel": {"novel/AP50": 12.5, "novel/AR50": 50.0, "novel/APs": None}}
    (folder / "direct_inference.json").write_text(json.dumps({"figures": figures}))
    lines = lines_of(call("--table", "6", "--seeds", "0", "--collect"))
    found = lines["GKD, CLIP direct inference"]
    assert found[:6] == ["1", "50.0", "64.5", "12.5", "23.3", "no objects"]
    for label in ("GKD", "IKD, CLIP direct inference"):
        assert lines[label][:2] == ["0", "not run"]


def test_the_upper_bound_needs_no_training_and_has_one_seed(call, trained, tmp_path):
    arguments = ("--table", "9", "--scale", "coco", "--rows", "CLIP on ground-truth boxes")
    (command,) = call(*arguments, "--dry-run").splitlines()
    assert "tools/clip_on_boxes.py gt --config-file configs/hierkd_R50.yaml" in command
    assert " --datasets coco_ovd_48_17_val_novel --output " in command
    figures = {"w_novel": {"novel/AP50": 70.5}}
    folder = tmp_path / "out" / "coco"
    folder.mkdir(parents=True)
    (folder / "upper_bound.json").write_text(json.dumps({"figures": figures}))
    lines = lines_of(call(*arguments, "--seeds", "3", "4", "--collect"))
    assert lines["CLIP on ground-truth boxes"][:5] == ["1", "not run", "70.7", "70.5", "68.0"]


def test_what_is_wrong_is_named(tmp_path, capsys, trained):
    with pytest.raises(SystemExit):
        reproduce.main(["--table", "12"])
    with pytest.raises(SystemExit) as error:
        reproduce.main(["--table", "3", "--rows", "5x5", "--output", str(tmp_path)])
    assert error.value.code == 2
    message = capsys.readouterr().err
    assert "reproduce.py: error: --rows ['5x5']: table 3 has" in message
    assert "4x4 patches" in message
    assert trained == []
