"""tools/clip_on_boxes.py from its command line, with a small random detector and a fake CLIP."""

import json

import pytest
import torch
from detectron2.modeling import build_model

import hierkd.modeling.detector as meta_arch
from fake_teacher import FakeTeacher
from hierkd.evaluation.split_coco_evaluation import METRICS
from hierkd.experiments.reproduce import read_evaluation
from hierkd.load_config import load_config
from log_handlers import exit_status
from tools import clip_on_boxes
from toy_world import register_toy_world


@pytest.fixture(autouse=True)
def _without_log_handlers(monkeypatch):
    """detectron2 would keep the stream that the first test captures."""
    monkeypatch.setattr("detectron2.utils.logger.setup_logger", lambda **options: None)


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Dataset name, config and checkpoint."""
    dataset = register_toy_world(tmp_path / "world")
    cfg = load_config(
        "configs/miniature/hierkd.yaml",
        ["MODEL.DEVICE", "cpu", "DATASETS.TRAIN", "()", "DATASETS.TEST", f"('{dataset}',)"],
    )
    monkeypatch.setattr(
        meta_arch, "build_teacher", lambda cfg: FakeTeacher(cfg.MODEL.TEXT_CLASSIFIER.EMBED_DIM)
    )
    monkeypatch.setattr("hierkd.teachers.clip.build_teacher", lambda cfg: FakeTeacher(64))
    torch.manual_seed(0)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "model.pth")
    return dataset


@pytest.fixture
def config(world, tmp_path):
    return str(tmp_path / "config.yaml")


@pytest.fixture
def opts(world, tmp_path):
    return ["--opts", "MODEL.WEIGHTS", str(tmp_path / "model.pth")]


def refused(capsys, *arguments: object) -> str:
    """The message that ends the command."""
    assert exit_status(clip_on_boxes.main, *arguments) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


# ------------------------------------------------------------------------------ Table 6


def test_direct_inference_writes_its_figures(world, config, opts, tmp_path, capsys):
    output = tmp_path / "new" / "figures.json"
    arguments = ["--max-anchors", "9", "--crop-scale", "1.25", "--images-per-batch", "4"]
    arguments += ["--with-iou", "--output", str(output), *opts]
    clip_on_boxes.main(["predicted", "--config-file", config, *arguments])
    record = json.loads(output.read_text())
    assert list(record["figures"]) == [world]
    expected = {f"{g}/{m}" for g in ("base", "novel", "all") for m in METRICS}
    assert expected <= set(record["figures"][world])
    assert record["weights"].endswith("model.pth")
    assert record["command"].startswith("python tools/clip_on_boxes.py predicted --config-file ")
    assert capsys.readouterr().out.count(f"| {world} ") == 3  # a line per group
    # What tools/reproduce.py reads.
    found = read_evaluation(output)[f"{world}/bbox/novel/AP50"]
    assert found == record["figures"][world]["novel/AP50"]


def test_a_picture_that_cannot_be_decoded_stops_it_before_clip_is_asked(
    world, config, opts, capsys, tmp_path, monkeypatch
):
    (tmp_path / "world" / "images" / "3.png").write_bytes(b"no picture")
    monkeypatch.setattr("hierkd.evaluation.direct_inference.DirectInference", None)
    message = refused(capsys, "predicted", "--config-file", config, *opts)
    assert "3.png" in message


# ------------------------------------------------------------------------------ Table 9


def test_the_upper_bound_writes_its_figures(world, config, tmp_path, capsys):
    output = tmp_path / "figures.json"
    arguments = ["gt", "--config-file", config, "--crop-scale", "1.25"]
    clip_on_boxes.main([*arguments, "--output", str(output)])
    for group in ("base", "novel", "all"):
        # each box has one label; which one is chance
        assert 0 <= read_evaluation(output)[f"{world}/bbox/{group}/AR50"] < 100
    (headers,) = [line for line in capsys.readouterr().out.split("\n") if "| dataset " in line]
    assert [c.strip() for c in headers.strip("|").split("|")][2:] == [
        *("AP50", "APs", "APm", "APl", "AR50")
    ]


# ------------------------------------------------------------------------------ wrong input

DIRECT = ["predicted", "--config-file", "{config}"]
BOUND = ["gt", "--config-file", "{config}"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*DIRECT, "--datasets", "nowhere"], "Unknown dataset 'nowhere'"),
        ([*DIRECT, "--crop-scale", "0"], "--crop-scale and --images-per-batch must be positive"),
        (["predicted", "--config-file", "gone.yaml"], "no file 'gone.yaml'"),
        ([*BOUND, "--crop-scale", "-1"], "--crop-scale and --images-per-batch must be"),
        ([*BOUND, "--datasets", "nowhere"], "Unknown dataset 'nowhere'"),
        ([*BOUND, "--with-iou"], "--max-anchors and --with-iou are of predicted boxes"),
    ],
)
def test_wrong_input_ends_with_a_message(config, opts, capsys, arguments, message):
    given = [each.format(config=config) for each in arguments]
    assert message in refused(capsys, *given, *opts)
