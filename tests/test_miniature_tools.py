"""tools/prepare_miniature.py and tools/miniature_study.py: what is made, kept, run and reported."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hierkd.data.miniature import MiniatureSpec
from hierkd.engine.tiny_clip import TinyCLIPSpec
from tools import miniature_study, prepare_miniature

METRICS = ("base/AP50", "novel/AP50", "all/AP50", "novel/AR50")

# ------------------------------------------------------------------------------ prepare


def test_a_file_is_current_only_with_the_stamp_of_its_recipe(tmp_path: Path) -> None:
    path, stamp = tmp_path / "teacher.pt", tmp_path / "teacher.json"
    recipe = {"clip": {"steps": 3, "vision_layers": [1, 1]}, "world": {"seed": 0}}
    assert not prepare_miniature.is_current(path, recipe)
    path.write_bytes(b"weights")
    assert not prepare_miniature.is_current(path, recipe), "no stamp"
    stamp.write_text(json.dumps({"recipe": recipe, "figures": {"accuracy": 1.0}}))
    assert prepare_miniature.is_current(path, recipe)
    assert not prepare_miniature.is_current(path, {**recipe, "world": {"seed": 1}})
    assert not prepare_miniature.is_current(path, {"clip": recipe["clip"]})
    path.unlink()
    assert not prepare_miniature.is_current(path, recipe), "no file"


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Trainings that only write a file; returns the names of what was trained."""
    done: list[str] = []

    def train(path: Path, *_: Any, **__: Any) -> dict[str, float]:
        done.append(Path(path).name)
        Path(path).write_bytes(b"weights")
        return {"seconds": 1.0, "accuracy": 0.5}

    monkeypatch.setattr(prepare_miniature, "train_tiny_clip", train)
    monkeypatch.setattr(
        prepare_miniature, "train_warm_start", lambda _, path, *args, **kwargs: train(path)
    )
    return done


def test_the_teacher_is_trained_once_per_clip_and_world(
    tmp_path: Path, trainings: list[str]
) -> None:
    path, clip, world = tmp_path / "teacher.pt", TinyCLIPSpec(), MiniatureSpec()
    for spec, pictures, expected in (
        (clip, world, 1),
        (clip, world, 1),  # specs hold tuples, the stamp lists: still the same
        (replace(clip, steps=clip.steps + 1), world, 2),
        (clip, replace(world, size=96), 3),
    ):
        prepare_miniature.make_teacher(path, spec, pictures)
        assert len(trainings) == expected
    stamp = json.loads((tmp_path / "teacher.json").read_text())
    assert stamp["recipe"]["world"] == asdict(replace(world, size=96))
    assert stamp["figures"] == {"seconds": 1.0, "accuracy": 0.5}


def test_the_warm_start_follows_the_world_and_the_backbone(
    tmp_path: Path, trainings: list[str]
) -> None:
    path = tmp_path / "backbone.pth"
    slim = tmp_path / "slim.yaml"
    base = Path(prepare_miniature.CONFIG).resolve()
    slim.write_text(f"_BASE_: {base}\nMODEL:\n  SLIM_RESNET:\n    WIDTHS: [8, 12, 16, 24]\n")
    for world, config, expected in (
        (MiniatureSpec(), prepare_miniature.CONFIG, 1),
        (MiniatureSpec(), prepare_miniature.CONFIG, 1),
        (MiniatureSpec(seed=1), prepare_miniature.CONFIG, 2),
        (MiniatureSpec(seed=1), str(slim), 3),
    ):
        prepare_miniature.make_warm_start(path, world, config)
        assert len(trainings) == expected


def test_after_an_interrupted_training_the_old_stamp_does_not_vouch_for_the_file(
    tmp_path: Path, trainings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new file is there, the new stamp not yet: the old recipe must not find it current."""
    path, old, new = tmp_path / "teacher.pt", TinyCLIPSpec(), TinyCLIPSpec(seed=1)
    prepare_miniature.make_teacher(path, old, MiniatureSpec())

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare_miniature, "write_json_atomically", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare_miniature.make_teacher(path, new, MiniatureSpec())
    prepare_miniature.make_teacher(path, old, MiniatureSpec())
    assert len(trainings) == 3


def test_prepare_makes_the_world_first_and_times_each_stage(
    tmp_path: Path, trainings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))

    def render(root: Path, spec: MiniatureSpec) -> None:
        assert spec == MiniatureSpec(seed=5)
        trainings.append("world")
        root.mkdir()

    monkeypatch.setattr(prepare_miniature, "ensure_miniature", render)
    seconds = prepare_miniature.prepare(seed=5)
    assert trainings == ["world", "teacher.pt", "backbone.pth"]
    assert list(seconds) == ["world", "teacher", "warm start"]
    assert all(value >= 0 for value in seconds.values())
    assert sorted(p.name for p in (tmp_path / "miniature").iterdir()) == [
        *("backbone.json", "backbone.pth", "teacher.json", "teacher.pt")
    ]


# ------------------------------------------------------------------------------ study


def fake_training(monkeypatch: pytest.MonkeyPatch, code: int = 0, start: float = 10.0) -> list[Any]:
    """Replace trainings: each writes the figures of every dataset; returns their commands."""
    commands: list[Any] = []

    def run(command: list[str], *, stdout: Any, env: dict[str, str], **_: Any) -> SimpleNamespace:
        commands.append((command, env))
        stdout.write("last words\n")
        options = dict(zip(command[4::2], command[5::2], strict=True))
        if code == 0:
            values = {"iteration": 599}
            names = eval(options["DATASETS.TEST"])
            for d, name in enumerate(names):
                for m, metric in enumerate(METRICS):
                    values[f"{name}/bbox/{metric}"] = start + 10 * d + m + int(options["SEED"])
            lines = [{"iteration": 299}, values]
            file = Path(options["OUTPUT_DIR"]) / "metrics.json"
            file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return SimpleNamespace(returncode=code)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_run_trains_its_config_with_its_seed_and_keeps_the_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str
) -> None:
    commands = fake_training(monkeypatch)
    folder = tmp_path / "gkd_seed3"
    opts = ["MODEL.GKD.LOSS_WEIGHT", "0.3"]
    miniature_study.run("gkd", 3, folder, split, opts, threads=2)
    ((command, env),) = commands
    assert command[:4] == [
        *(sys.executable, "train_net.py", "--config-file", "configs/miniature/gkd.yaml")
    ]
    assert command[-2:] == opts
    assert env["OMP_NUM_THREADS"] == "2"
    record = json.loads((folder / "figures.json").read_text())
    # Datasets are novel, base, all, ten apart; metrics are in the order of METRICS.
    assert record["figures"] == {
        "ZSD novel AP50": 14.0,
        "ZSD novel AR50": 16.0,
        "base AP50": 23.0,
        "GZSD novel AP50": 34.0,
        "GZSD base AP50": 33.0,
        "GZSD all AP50": 35.0,
    }
    assert (record["config"], record["seed"], record["split"]) == ("gkd", 3, split)
    assert record["opts"] == opts
    assert (miniature_study.ROOT / command[3]).is_file()


def test_a_complete_run_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = fake_training(monkeypatch)
    for _ in range(2):
        miniature_study.run("atss", 0, tmp_path / "atss_seed0", "val", [], 1)
    assert len(commands) == 1
    miniature_study.run("atss", 1, tmp_path / "atss_seed1", "val", [], 1)
    assert len(commands) == 2


@pytest.mark.parametrize(("split", "opts"), [("test", []), ("val", ["SOLVER.MAX_ITER", "900"])])
def test_figures_of_another_split_or_of_other_options_are_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str, opts: list[str]
) -> None:
    commands = fake_training(monkeypatch)
    folder = tmp_path / "atss_seed0"
    miniature_study.run("atss", 0, folder, "val", [], 1)
    before = (folder / "figures.json").read_bytes()
    with pytest.raises(ValueError, match=r"figures\.json.*'val'.*--output"):
        miniature_study.run("atss", 0, folder, split, opts, 1)
    assert (folder / "figures.json").read_bytes() == before
    assert len(commands) == 1


def test_a_failed_training_names_its_log_and_is_not_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_training(monkeypatch, code=1)
    folder = tmp_path / "hierkd_seed2"
    log = folder / "stdout.txt"
    with pytest.raises(RuntimeError, match=r"hierkd, seed 2") as caught:
        miniature_study.run("hierkd", 2, folder, "val", [], 1)
    assert str(log) in str(caught.value)
    assert log.read_text() == "last words\n"
    assert not (folder / "figures.json").exists()
    commands = fake_training(monkeypatch)
    miniature_study.run("hierkd", 2, folder, "val", [], 1)
    assert len(commands) == 1, "it is run again"
    assert (folder / "figures.json").is_file()


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_has_mean_and_range_of_the_complete_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_training(monkeypatch)
    for seed in (0, 1, 5):
        miniature_study.run("ikd", seed, tmp_path / f"ikd_seed{seed}", "test", [], 1)
    header, rule, ikd, gkd = miniature_study.table(["ikd", "gkd"], [0, 1, 2, 5], tmp_path).split(
        "\n"
    )
    names = cells(header)
    assert names[:3] == ["config", "seeds", "ZSD novel AP50"]
    assert len({len(cells(line)) for line in (header, rule, ikd, gkd)}) == 1
    by_name = dict(zip(names, cells(ikd), strict=True))
    assert by_name["config"] == "ikd"
    assert by_name["seeds"] == "3"  # seed 2 is missing
    assert by_name["ZSD novel AP50"] == "13.0 (11.0-16.0)"  # 11, 12 and 16
    assert by_name["GZSD base AP50"] == "32.0 (30.0-35.0)"
    assert cells(gkd) == ["gkd", "0"] + ["not run"] * len(miniature_study.COLUMNS)


def test_the_command_runs_every_config_with_every_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = fake_training(monkeypatch)
    output = tmp_path / "study"
    arguments = ["--configs", "atss", "gkd", "--seeds", "0", "1", "--split", "val", "--output"]
    opts = ["--opts", "SOLVER.MAX_ITER", "9"]
    monkeypatch.setattr(sys, "argv", ["study", *arguments, str(output), *opts])
    miniature_study.main()
    assert sorted(p.name for p in output.glob("*/figures.json")) == ["figures.json"] * 4
    assert {p.name for p in output.iterdir() if p.is_dir()} == {
        *("atss_seed0", "atss_seed1", "gkd_seed0", "gkd_seed1")
    }
    assert all(command[-2:] == ["SOLVER.MAX_ITER", "9"] for command, _ in commands)
    table = (output / "table.md").read_text()
    assert table == miniature_study.table(["atss", "gkd"], [0, 1], output) + "\n"
    assert table in capsys.readouterr().out


def test_the_examples_of_the_usage_put_the_options_of_the_training_last() -> None:
    """Everything after --opts goes to the training."""
    assert miniature_study.__doc__ is not None
    commands = miniature_study.__doc__.replace("\\\n", " ").split("python ")[1:]
    assert len(commands) == 2
    for command in commands:
        words = command.split("\n")[0].split()
        after = words[words.index("--opts") + 1 :] if "--opts" in words else []
        assert not [word for word in after if word.startswith("-")]
