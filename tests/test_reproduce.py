"""``tools/reproduce.py``: which commands a table needs, and that only what was run has a figure."""

import json
import shlex
from pathlib import Path

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


def test_a_dry_run_prints_every_command_and_starts_nothing(call, trained):
    out = call("--table", "4", "--scale", "coco", "--num-gpus", "4", "--dry-run")
    commands = out.splitlines()
    assert len(commands) == 5
    for command, row in zip(commands, TABLES[4].rows, strict=True):
        assert f"train_net.py --config-file {row.coco.config} --num-gpus 4 " in command
        assert "REFERENCE_WORLD_SIZE" not in command
    assert trained == []


def test_other_than_four_gpus_follow_the_linear_rule(call):
    out = call("--table", "8", "--scale", "coco", "--num-gpus", "1", "--dry-run")
    assert out.count("SOLVER.REFERENCE_WORLD_SIZE 4") == len(TABLES[8].rows)


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


def test_rows_that_are_one_training_are_trained_once(call, trained):
    call("--table", "5", "--jobs", "1")
    seeds = TABLES[5].seeds
    assert len(trained) == len(TABLES[5].rows) * len(seeds)
    call("--table", "2", "--jobs", "1")
    new = [run.name for run in trained[len(TABLES[5].rows) * len(seeds) :]]
    assert "table2_predicted_l1" not in new  # Table 5's first row
    assert len(new) == (len(TABLES[2].rows) - 1) * len(seeds)


def test_collecting_starts_nothing_and_invents_nothing(call, trained):
    call("--table", "3", "--rows", "4x4 patches", "--seeds", "7", "--jobs", "1")
    assert len(trained) == 1
    out = call("--table", "3", "--seeds", "7", "--collect")
    assert len(trained) == 1
    lines = {line.split("|")[1].strip(): line for line in out.splitlines() if "|" in line}
    assert "| 1 | 1.0 | 20.1 |" in lines["4x4 patches"]
    others = [row.label for row in TABLES[3].rows if row.label != "4x4 patches"]
    for label in others:
        assert lines[label].count("not run") == len(TABLES[3].columns)


def test_evaluations_follow_the_checkpoints(call, tmp_path):
    out = call("--table", "6", "--seeds", "0", "--dry-run")
    trainings = [line for line in out.splitlines() if "train_net.py" in line]
    evaluations = [line for line in out.splitlines() if "clip_direct_inference.py" in line]
    assert (len(trainings), len(evaluations)) == (3, 3)
    for training, evaluation in zip(trainings, evaluations, strict=True):
        folder = training.split("OUTPUT_DIR ")[1].split()[0]
        assert f"MODEL.WEIGHTS {folder}/model_final.pth" in evaluation
    folder = tmp_path / "out" / "miniature" / "table4_gkd" / "seed0"
    folder.mkdir(parents=True)
    figures = {"w_test_novel": {"novel/AP50": 12.5, "novel/AR50": 50.0}}
    (folder / "direct_inference.json").write_text(json.dumps({"figures": figures}))
    out = call("--table", "6", "--seeds", "0", "--collect")
    assert "| GKD | 1 | 12.5 | 23.3 | 50.0 |" in out
    assert "| IKD | 0 | not run |" in out


def test_the_upper_bound_needs_no_training(call):
    out = call("--table", "9", "--scale", "coco", "--dry-run")
    (command,) = out.splitlines()
    assert "tools/clip_upper_bound.py --config-file configs/hierkd_R50.yaml" in command


def test_wrong_rows_and_tables_are_named(call, trained):
    with pytest.raises(ValueError, match=r"5x5.*4x4 patches"):
        call("--table", "3", "--rows", "5x5")
    with pytest.raises(SystemExit):
        call("--table", "12")
    assert trained == []


def test_the_command_line_ends_with_a_message(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        reproduce.main(["--table", "3", "--rows", "5x5", "--output", str(tmp_path)])
    assert error.value.code == 2
    assert capsys.readouterr().err.startswith("reproduce.py: error: --rows ['5x5']: table 3 has")


def test_the_commands_of_the_usage_are_accepted():
    parser = reproduce.get_parser()
    text = reproduce.__doc__.replace("\\\n", " ")
    commands = [line.strip() for line in text.splitlines() if line.strip().startswith("python too")]
    used = [words for c in commands if (words := shlex.split(c))[1] == "tools/reproduce.py"]
    assert len(used) == 5
    for words in used:
        args = parser.parse_args(words[2:])
        assert reproduce.choose_rows(TABLES[args.table], args.rows)
    assert (Path(reproduce.ROOT) / "tools" / "reproduce.py").is_file()
