"""Watching a training, and its report: on real runs of a world of six pictures."""

import io
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import tiny_training
import train_net
from hierkd.reports.metrics import read_run_metrics
from log_handlers import exit_status, own_log_handlers
from tiny_training import call_main, command_line
from tools import report

ROOT = Path(__file__).resolve().parents[1]
NOVEL, ALL = "miniature_ovd_val_novel", "miniature_ovd_val_all"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with tiny_training.prepared(tmp_path_factory.mktemp("watching")) as root:
        yield root


@pytest.fixture(scope="module")
def train(folder):
    def _train(name, *extra):
        call_main(command_line(folder / name, folder / "clip.pt", *extra))
        return folder / name

    return _train


@pytest.fixture(scope="module")
def watched(train):
    """A run with evaluations and pictures on the way."""
    return train("watched", "VIS_PERIOD", "2", "TEST.EVAL_PERIOD", "2", "TEST.VIS_PICTURES", "2")


@pytest.fixture(scope="module")
def resumed(train):
    """A run that was stopped in its fourth step and resumed."""
    run_step = train_net.Trainer.run_step

    def stop(self):
        if self.iter == 3:
            raise InterruptedError
        run_step(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_net.Trainer, "run_step", stop)
        with pytest.raises(InterruptedError):
            train("resumed")
    return train("resumed", "--resume")


# ----------------------------------------------------------------------------- during a training


def test_watching_changes_no_bit_of_the_result(train, watched):
    plain = train("plain", "VIS_PERIOD", "0")
    ours, theirs = (
        torch.load(each / "model_final.pth", weights_only=True) for each in (watched, plain)
    )
    assert ours["model"].keys() == theirs["model"].keys()
    unequal = [k for k, v in ours["model"].items() if not torch.equal(v, theirs["model"][k])]
    assert unequal == []
    moments, expected = (e["trainer"]["_trainer"]["optimizer"]["state"] for e in (ours, theirs))
    for key, values in expected.items():
        assert all(torch.equal(moments[key][k], value) for k, value in values.items())


def test_tensorboard_has_the_pictures_and_the_scalars(watched):
    (path,) = watched.glob("events.out.tfevents.*")
    events = EventAccumulator(str(path), {"images": 0, "scalars": 0}).Reload()
    assert sorted(events.Tags()["images"]) == ["detections/1", "detections/2"]
    for tag in events.Tags()["images"]:
        drawn = events.Images(tag)
        assert [each.step for each in drawn] == [1, 3]
        picture = Image.open(io.BytesIO(drawn[1].encoded_image_string)).convert("RGB")
        assert picture.width > 2 * 480
        assert len(picture.getcolors(1 << 20)) > 100
    scalars = {tag: [e.value for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert {"tau_c", "tau_m", "cls_weight", "num_pos_anchors", "iou_pos_anchors"} <= scalars.keys()
    assert {"num_distilled_regions", "background_class_cosine"} <= scalars.keys()
    assert 0.9 < scalars["background_start_cosine"][-1] <= 1 + 1e-6  # after four steps
    assert 0 < scalars["cls_weight"][-1] < 1  # exp(-w), w from 1
    assert all(0 <= value <= 1 for value in scalars["iou_pos_anchors"])
    for name, groups in {NOVEL: ("novel",), ALL: ("base", "novel", "all")}.items():
        for group in groups:
            steps = [e.step for e in events.Scalars(f"{name}/bbox/{group}/AP50")]
            assert steps == [1, 4]  # on the way, and at the end


def test_starts_are_recorded(watched, resumed):
    (only,) = json.loads((watched / "environment.json").read_text())
    assert (only["iteration"], only["num_processes"]) == (0, 1)
    first, second = json.loads((resumed / "environment.json").read_text())
    assert (first["iteration"], second["iteration"]) == (0, 2)


# ------------------------------------------------------------------------------------ the report


def write(run, output, *arguments):
    """Call the tool; the page's visible text."""
    with own_log_handlers():
        report.main([str(run), "--output", str(output), *map(str, arguments)])
    html = output.read_text(encoding="utf-8")
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", html.split("</style>")[1]))


def test_report_of_a_run(watched, tmp_path):
    text = write(watched, tmp_path / "new" / "x.html", "--pictures", 3)
    curves = read_run_metrics(watched / "metrics.json").curves
    for kind, dataset, group in (("ZSD", NOVEL, "novel"), ("GZSD", ALL, "base")):
        value = curves[f"{dataset}/bbox/{group}/AP50"][1][-1]
        assert f"{kind} {group} {dataset} {value:.1f}" in text
    assert "finished, 4 iterations" in text
    assert "in training, iteration 1" in text  # the evaluation on the way
    assert "detections of its last evaluation" in text
    assert text.count("ground truth detected") == 3
    (start,) = json.loads((watched / "environment.json").read_text())
    for value in (start["date"], start["commit"], start["versions"]["torch"]):
        assert value is None or value in text
    assert "SOLVER.MAX_ITER 4 40000" in text  # detectron2's own default
    assert "MODEL.ATSS.FOCAL_GAMMA" not in text.split("The whole config")[0]  # it has its default


def test_report_of_a_killed_run(resumed, tmp_path):
    killed = shutil.copytree(resumed, tmp_path / "killed")
    for name in ("model_final.pth", "model_0000003.pth"):
        (killed / name).unlink()
    (killed / "last_checkpoint").write_text("model_0000001.pth")
    shutil.rmtree(killed / "inference")
    lines = (killed / "metrics.json").read_text().splitlines()
    before = [line for line in lines if json.loads(line)["iteration"] <= 2]
    (killed / "metrics.json").write_text("\n".join(before) + '\n{"iteration": 3, "tot')
    text = write(killed, tmp_path / "killed.html")
    assert "unfinished, at least 3 of 4 iterations; last checkpoint model_0000001.pth" in text
    assert "Nothing was evaluated yet" in text
    assert "There are no pictures: no evaluation has left" in text


def test_report_of_an_evaluation_alone(folder, watched, tmp_path, capsys):
    output = tmp_path / "evaluated"
    weights = ("MODEL.WEIGHTS", str(watched / "model_final.pth"))
    results = call_main(command_line(output, folder / "clip.pt", "--eval-only", *weights))
    text = write(output, tmp_path / "evaluated.html")
    assert "evaluated only" in text
    assert "note: There is no metrics.json" in capsys.readouterr().out
    assert f"--eval-only of {watched / 'model_final.pth'}" in text
    value = results[NOVEL]["bbox"]["novel/AP50"]
    assert f"novel {NOVEL} {value:.1f}" in text
    assert text.count("ground truth detected") == 3  # all that show a novel class


def test_what_is_no_run_is_named(tmp_path, capsys):
    assert exit_status(report.main, tmp_path) == 2
    message = capsys.readouterr().err
    assert message.startswith("report.py: error: ")
    assert "none of config.yaml, metrics.json, evaluations.json" in message
    assert exit_status(report.main, tmp_path, "--pictures", "-1") == 2
    assert "--pictures must be 0 or more" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


# --------------------------------------------------------------------------------------- the page

PAGE = ROOT / "docs" / "monitoring.md"


def test_every_scalar_of_a_run_is_explained(watched):
    curves = read_run_metrics(watched / "metrics.json").curves
    found = {name for name in curves if "/" not in name}
    (table,) = re.findall(r"\| scalar \|.*?\n\n", PAGE.read_text(), re.DOTALL)
    names = [row.split("|")[1] for row in table.splitlines() if row.startswith("|")]
    explained = {name for cell in names for name in re.findall(r"`(\w+)`", cell)}
    assert explained == found
