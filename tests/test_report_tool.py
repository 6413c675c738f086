"""Watching a training, and its report: on real runs of a world of six pictures."""

import io
import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from detectron2.engine import default_argument_parser
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import tiny_training
import train_net
from hierkd.load_config import load_config
from hierkd.reports.metrics import read_run_metrics
from hierkd.reports.run_report import read_run
from log_handlers import own_log_handlers
from tiny_training import call_main, command_line
from tools import report

ROOT = Path(__file__).resolve().parents[1]
NOVEL, ALL = "miniature_ovd_val_novel", "miniature_ovd_val_all"


class StopError(Exception):
    """Stands for what ends a run in the middle."""


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
            raise StopError
        run_step(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_net.Trainer, "run_step", stop)
        with pytest.raises(StopError):
            train("resumed")
    return train("resumed", "--resume")


def write(run, output, *arguments):
    """Call the tool; the page's text."""
    with own_log_handlers():
        report.main([str(run), "--output", str(output), *map(str, arguments)])
    return output.read_text(encoding="utf-8")


def visible(html):
    """What is between the tags."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", html.split("</style>")[1]))


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
        for each in drawn:
            picture = Image.open(io.BytesIO(each.encoded_image_string)).convert("RGB")
            assert picture.size == (each.width, each.height)
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


def test_ap_over_time_is_in_metrics_json(watched):
    curves = read_run_metrics(watched / "metrics.json").curves
    assert curves[f"{ALL}/bbox/novel/AP50"][0] == [1, 4]
    # NaN, of sizes without objects, is written and read like any other value
    assert f"{ALL}/bbox/all/APl" in curves


def test_starts_are_recorded(watched, resumed):
    (only,) = json.loads((watched / "environment.json").read_text())
    assert (only["iteration"], only["num_processes"]) == (0, 1)
    first, second = json.loads((resumed / "environment.json").read_text())
    assert (first["iteration"], second["iteration"]) == (0, 2)


# ------------------------------------------------------------------------------------ the report


def test_report_of_a_run(watched, tmp_path):
    html = write(watched, tmp_path / "out" / "run.html", "--pictures", 3)
    text = visible(html)
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', html)
    assert sources
    assert all(s.startswith(("data:image/jpeg;base64,", "data:image/svg+xml;")) for s in sources)
    assert not re.search(r"<script|url\(|@import|https?:", html)
    curves = read_run_metrics(watched / "metrics.json").curves
    for dataset, group in ((NOVEL, "novel"), (ALL, "novel"), (ALL, "base"), (ALL, "all")):
        value = curves[f"{dataset}/bbox/{group}/AP50"][1][-1]
        assert f"{group} {dataset} {value:.1f}" in text
    assert f"ZSD novel {NOVEL}" in text
    assert f"GZSD base {ALL}" in text
    assert "finished, 4 iterations" in text
    assert "in training, iteration 1" in text  # the evaluation on the way
    assert html.count('class="pair"') == 3
    # Average precision over time: a figure for each dataset
    assert f"Average precision over time {NOVEL} {ALL}" in text
    (start,) = json.loads((watched / "environment.json").read_text())
    for value in (start["date"], start["commit"], start["versions"]["torch"], "SOLVER.MAX_ITER"):
        assert value is None or value in text
    assert re.search(r"SOLVER\.MAX_ITER 4 40000", text)  # detectron2's own default
    assert "MODEL.ATSS.FOCAL_GAMMA" not in text  # it has its default


def test_report_of_a_killed_run(folder, resumed, tmp_path):
    killed = tmp_path / "killed"
    shutil.copytree(resumed, killed)
    for name in ("model_final.pth", "model_0000003.pth"):
        (killed / name).unlink()
    (killed / "last_checkpoint").write_text("model_0000001.pth")
    shutil.rmtree(killed / "inference")
    lines = (killed / "metrics.json").read_text().splitlines()
    before = [line for line in lines if json.loads(line)["iteration"] <= 2]
    (killed / "metrics.json").write_text("\n".join(before) + '\nbroken\n{"iteration": 3, "tot')
    html = write(killed, tmp_path / "killed.html", "--pictures", 2, "--device", "cpu")
    text = visible(html)
    assert "unfinished, at least 3 of 4 iterations; last checkpoint model_0000001.pth" in text
    assert "2 broken lines of metrics.json were skipped" in text
    assert "Nothing was evaluated yet" in text
    assert "detections of model_0000001.pth" in text
    assert html.count('class="pair"') == 2


def test_report_of_a_resumed_run_tells_of_every_start(resumed, tmp_path):
    text = visible(write(resumed, tmp_path / "resumed.html", "--no-pictures"))
    assert "Starts 2, the last one" in text
    assert "Start 1 of 2: iteration 0" in text
    assert "From iteration 2" in text
    assert "Ground truth beside detections" not in text


def test_report_of_an_evaluation_alone(folder, watched, tmp_path):
    output = tmp_path / "evaluated"
    weights = ("MODEL.WEIGHTS", str(watched / "model_final.pth"))
    results = call_main(command_line(output, folder / "clip.pt", "--eval-only", *weights))
    assert not (output / "metrics.json").exists()
    html = write(output, tmp_path / "evaluated.html")
    text = visible(html)
    assert "evaluated only" in text
    assert "nothing was trained here" in text
    assert f"--eval-only of {watched / 'model_final.pth'}" in text
    for name in (NOVEL, ALL):
        value = results[name]["bbox"]["novel/AP50"]
        assert f"novel {name} {value:.1f}" in text
    assert html.count('class="pair"') == 3  # all that show a novel class
    assert "detections of the evaluation of" in text


def test_without_test_pictures_all_else_is_told(watched, tmp_path):
    config = (watched / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(config.replace("miniature_ovd_val", "nowhere_val"))
    (tmp_path / "metrics.json").write_text('{"iteration": 3, "total_loss": 1.0}\n')
    text = visible(write(tmp_path, tmp_path / "moved.html"))
    assert "There are no pictures: none of the datasets in DATASETS.TEST is registered" in text
    assert "finished, 4 iterations" in text


def test_runs_side_by_side(watched, resumed, tmp_path):
    html = write(watched, tmp_path / "both.html", "--no-pictures", "--compare", resumed)
    text = visible(html)
    ours, theirs = (read_run_metrics(r / "metrics.json").curves for r in (watched, resumed))
    name = f"{ALL}/bbox/base/AR50"
    assert f"Dataset Figure watched resumed {NOVEL}" in text
    assert f"{ALL} base/AR50 {ours[name][1][-1]:.1f} {theirs[name][1][-1]:.1f}" in text
    assert "iterations 4 4" in text


def test_what_is_no_run_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit, match="no folder"):
        report.main([str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match=r"none of config\.yaml, metrics\.json, evaluations\.json"):
        report.main([str(tmp_path)])
    with pytest.raises(SystemExit):
        report.main([str(tmp_path), "--pictures", "-1"])
    assert "--pictures must be 0 or more" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------------------------- hostile names

HOSTILE = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>\"'$_{"


def test_names_from_a_folder_are_no_html(tmp_path):
    run = tmp_path / "<svg onload=alert(3)>"
    run.mkdir()
    lines = [
        {"iteration": i, "total_loss": 1.0, f"loss_{HOSTILE}": 1.0, HOSTILE: 2.0}
        | {f"{HOSTILE}/bbox/novel/AP50": 1.0, f"{HOSTILE}/bbox/AP50-{HOSTILE}": 2.0}
        | {f"d/bbox/{HOSTILE}/AP50": 3.0, f"d/bbox/{HOSTILE}": 4.0}
        for i in (19, 39)
    ]
    (run / "metrics.json").write_text("".join(json.dumps(each) + "\n" for each in lines))
    (run / "config.yaml").write_text(json.dumps({HOSTILE: HOSTILE, "SEED": HOSTILE}))
    start = dict.fromkeys(("date", "command", "iteration", "commit", "num_processes"), HOSTILE)
    machine = {"gpus": [HOSTILE], "cores": HOSTILE, "processor": HOSTILE, "memory_gib": HOSTILE}
    start |= {"versions": {HOSTILE: HOSTILE}, "hardware": machine | {"system": HOSTILE}}
    (run / "environment.json").write_text(json.dumps([start, start]))
    evaluation = {"date": HOSTILE, "weights": HOSTILE, "figures": {f"{HOSTILE}/b/{HOSTILE}": 1.0}}
    (run / "evaluations.json").write_text(json.dumps([evaluation]))
    (run / "last_checkpoint").write_text(HOSTILE)
    other = tmp_path / "other" / HOSTILE.replace("/", "|")
    shutil.copytree(run, other)
    html = write(run, tmp_path / "page.html", "--compare", other)
    assert html.count("&lt;script&gt;alert(1)") > 15
    assert "<svg onload" not in html
    for piece in ("<script", "<img src=x", "onerror=alert(2)>\"'"):
        assert piece not in html


def test_starts_before_a_new_beginning_are_left_out(tmp_path):
    (tmp_path / "config.yaml").write_text("SEED: 1\n")
    starts = [{"iteration": i, "commit": c} for i, c in ((0, "a"), (50, "b"), (0, "c"), (20, "d"))]
    (tmp_path / "environment.json").write_text(json.dumps(starts))
    run = read_run(tmp_path)
    assert [each["commit"] for each in run.starts] == ["c", "d"]
    assert any("2 earlier starts" in note for note in run.notes)


@pytest.mark.parametrize(
    "starts",
    [
        "[{}]",
        '[{"hardware": 3, "versions": [1]}]',
        '[{"hardware": {"gpus": [[1], {}]}, "date": {}}]',
        "{}",
    ],
)
def test_records_of_other_shapes_are_no_obstacle(tmp_path, starts):
    (tmp_path / "environment.json").write_text(starts)
    (tmp_path / "evaluations.json").write_text('[{"figures": [1]}, {"figures": {"a/b/c": "?"}}]')
    (tmp_path / "config.yaml").write_text("DATASETS: 3\nSOLVER: []\n")
    html = write(tmp_path, tmp_path / "page.html")
    assert "There are no pictures" in visible(html)


def test_a_report_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    run, output = tmp_path / "run", tmp_path / "out" / "page.html"
    run.mkdir()
    (run / "config.yaml").write_text("SEED: 1\n")
    output.parent.mkdir()
    output.write_text("old")
    monkeypatch.setattr("pathlib.Path.write_text", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write(run, output, "--no-pictures")
    assert [path.name for path in output.parent.iterdir()] == ["page.html"]
    assert output.read_bytes() == b"old"


def test_curves_of_a_run_are_those_of_metrics_json(tmp_path):
    (tmp_path / "metrics.json").write_text(
        '{"iteration": 19, "total_loss": 5.0}\n{"iteration": 39, "total_loss": 4.0}\n'
        '{"iteration": 39, "total_loss": 3.0}\n'
    )
    run = read_run(tmp_path)
    assert run.metrics.curves == {"total_loss": ([19, 39], [5.0, 3.0])}
    assert run.last_iteration == 39
    assert any("back to an earlier iteration 1 times" in note for note in run.notes)


# --------------------------------------------------------------------------------------- the page

PAGE = ROOT / "docs" / "monitoring.md"


def test_every_scalar_of_a_run_is_explained(watched):
    curves = read_run_metrics(watched / "metrics.json").curves
    found = {name for name in curves if "/" not in name}
    (table,) = re.findall(r"\| scalar \|.*?\n\n", PAGE.read_text(), re.DOTALL)
    names = [row.split("|")[1] for row in table.splitlines() if row.startswith("|")]
    explained = {name for cell in names for name in re.findall(r"`(\w+)`", cell)}
    assert explained == found


def test_commands_of_the_page_are_understood():
    commands = re.findall(r"^python (tools/report|train_net)\.py (.*)$", PAGE.read_text(), re.M)
    assert len(commands) == 4
    for script, arguments in commands:
        if script == "tools/report":
            report.get_parser().parse_args(shlex.split(arguments))
        else:
            args = default_argument_parser().parse_args(shlex.split(arguments))
            cfg = load_config(str(ROOT / args.config_file), args.opts)
            assert cfg.VIS_PERIOD > 0
