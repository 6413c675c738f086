"""tools/prepare_miniature.py and tools/miniature_study.py: what is made, kept, run and reported."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

import hierkd.experiments.runs as runs_module
from hierkd.experiments.runs import Run
from hierkd.miniature.clip import TinyCLIPSpec
from hierkd.miniature.world import MiniatureSpec
from tools import miniature_study, prepare_miniature

METRICS = ("base/AP50", "novel/AP50", "all/AP50", "novel/AR50")

# ------------------------------------------------------------------------------ prepare


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Trainings that only write a file; returns the names of what was trained."""
    done: list[str] = []

    def train(path: Path, *_: Any, **__: Any) -> dict[str, float]:
        done.append(Path(path).name)
        Path(path).write_bytes(b"weights")
        return {"seconds": 1.0, "accuracy": 0.5}

    monkeypatch.setattr("hierkd.miniature.clip.train_tiny_clip", train)
    monkeypatch.setattr(
        "hierkd.miniature.warm_start.train_warm_start", lambda _, path, *args, **kwargs: train(path)
    )
    return done


def test_files_are_made_once_per_recipe(tmp_path: Path, trainings: list[str]) -> None:
    clip, world, config = TinyCLIPSpec(), MiniatureSpec(), prepare_miniature.CONFIG
    # specs hold tuples, the stamps lists: still the same
    other, larger = replace(clip, steps=clip.steps + 1), replace(world, size=96)
    for count, spec, pictures in (
        *((1, clip, world), (1, clip, world), (2, other, world), (3, other, larger)),
    ):
        prepare_miniature.make_teacher(tmp_path / "teacher.pt", spec, pictures)
        assert len(trainings) == count
    stamp = json.loads((tmp_path / "teacher.json").read_text())
    assert stamp["recipe"]["world"] == asdict(larger)
    assert stamp["figures"] == {"seconds": 1.0, "accuracy": 0.5}
    (tmp_path / "teacher.pt").unlink()
    prepare_miniature.make_teacher(tmp_path / "teacher.pt", other, larger)
    slim = tmp_path / "slim.yaml"
    slim.write_text(
        f"_BASE_: {Path(config).resolve()}\nMODEL: {{SLIM_RESNET: {{WIDTHS: [8, 12, 16, 24]}}}}"
    )
    for count, pictures, file in (
        *((5, world, config), (5, world, config), (6, larger, config), (7, larger, str(slim))),
    ):
        prepare_miniature.make_warm_start(tmp_path / "backbone.pth", pictures, file)
        assert len(trainings) == count


def test_after_an_interrupted_training_the_old_stamp_does_not_vouch_for_the_file(
    tmp_path: Path, trainings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new file is there, the new stamp not yet: the old recipe must not find it current."""
    path, old, new = tmp_path / "teacher.pt", TinyCLIPSpec(), TinyCLIPSpec(seed=1)
    prepare_miniature.make_teacher(path, old, MiniatureSpec())

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("hierkd.files.write_json_atomically", interrupted)
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

    monkeypatch.setattr("hierkd.miniature.world.ensure_miniature", render)
    seconds = prepare_miniature.prepare(MiniatureSpec(seed=5))
    assert trainings == ["world", "teacher.pt", "backbone.pth"]
    assert list(seconds) == ["world", "teacher", "warm start"]


# ------------------------------------------------------------------------------ study


def complete(run: Run, start: float) -> None:
    """Write the record of a complete run; its figures are start, start + 1, ..."""
    names = eval(run.opts[1])
    keys = [f"{name}/bbox/{metric}" for name in names for metric in METRICS]
    metrics = {key: start + 10 * i for i, key in enumerate(keys)}
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "run.json").write_text(json.dumps({**run.identity(), "metrics": metrics}))


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_has_mean_and_range_of_the_complete_runs(tmp_path: Path) -> None:
    runs = [
        miniature_study.build_run(config, seed, tmp_path, "test", [])
        for config in ("ikd", "gkd")
        for seed in (0, 1, 2, 5)
    ]
    for run, start in zip(runs[:2] + runs[3:4], (1.0, 2.0, 6.0), strict=True):
        complete(run, start)
    header, _, ikd, gkd = map(cells, miniature_study.format_table(runs).split("\n"))
    assert header[:3] == ["config", "seeds", "ZSD novel AP50"]
    by_name = dict(zip(header, ikd, strict=True))
    assert (by_name["config"], by_name["seeds"]) == ("ikd", "3")  # seed 2 is missing
    # Datasets are novel, base, all; metrics are in the order of METRICS, ten apart.
    assert by_name["ZSD novel AP50"] == "13.0 (11.0-16.0)"
    assert by_name["GZSD base AP50"] == "83.0 (81.0-86.0)"
    assert gkd == ["gkd", "0"] + ["not run"] * len(miniature_study.COLUMNS)


def test_the_command_runs_every_config_with_every_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[Run] = []

    def train(run: Run, root: Path, threads: int) -> int:
        trained.append(run)
        complete(run, 0.0)
        return 0

    monkeypatch.setattr(runs_module, "_train", train)
    output = tmp_path / "study"
    arguments = ["--configs", "atss", "gkd", "--seeds", "0", "1", "--split", "val", "--output"]
    opts = ["--opts", "SOLVER.MAX_ITER", "9"]
    monkeypatch.setattr(sys, "argv", ["study", *arguments, str(output), *opts])
    miniature_study.main()
    assert {p.name for p in output.iterdir() if p.is_dir()} == {
        *("atss_seed0", "atss_seed1", "gkd_seed0", "gkd_seed1")
    }
    assert all(run.opts[-2:] == ("SOLVER.MAX_ITER", "9") for run in trained)
    assert len(trained) == 4
    table = (output / "table.md").read_text()
    assert table == miniature_study.format_table(trained) + "\n"
    assert table in capsys.readouterr().out
