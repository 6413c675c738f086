"""tools/{clip_direct_inference,clip_upper_bound}.py from their command lines, with a small random
detector and a fake CLIP."""

import json

import pytest
import torch
from detectron2.modeling import build_model

import hierkd.modeling.detector as meta_arch
from fake_teacher import FakeTeacher
from hierkd.evaluation.direct_inference import DETECTOR
from hierkd.evaluation.split_coco_evaluation import METRICS
from hierkd.experiments.reproduce import read_evaluation
from hierkd.load_config import load_config
from tools import clip_direct_inference, clip_upper_bound
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


def refused(tool, capsys, *arguments: object) -> str:
    """The message that ends the command."""
    with pytest.raises(SystemExit) as stopped:
        tool.main([str(each) for each in arguments])
    message = capsys.readouterr().err
    assert stopped.value.code == 2
    assert "Traceback" not in message
    return message


# ------------------------------------------------------------------------------ Table 6


def test_direct_inference_measures_each_combination(world, config, opts, tmp_path, capsys):
    output = tmp_path / "new" / "figures.json"
    arguments = ["--tau", "own", "100", "--background", "learned", "none", "--max-anchors", "9"]
    arguments += ["--crop-scale", "1.25", "--images-per-batch", "4", "--with-iou"]
    arguments += ["--output", str(output)]
    arguments = ["--config-file", config, *arguments, *opts]
    clip_direct_inference.main(arguments)
    record = json.loads(output.read_text())
    rows = [
        f"tau {t}, background {b}, times IoU" for t in ("own", "100") for b in ("learned", "none")
    ]
    assert list(record["rows"]) == record["dataset"] == [world]
    assert list(record["rows"][world]) == [DETECTOR, *rows]
    assert record["figures"][world] == record["rows"][world][rows[0]]
    for figures in record["rows"][world].values():
        assert {f"{g}/{m}" for g in ("base", "novel", "all") for m in METRICS} <= set(figures)
    assert record["options"]["tau"] == dict(zip(rows, [10.0, 10.0, 100.0, 100.0], strict=True))
    assert record["options"]["crop_scale"] == 1.25
    assert record["options"]["fuse_iou"] is True
    assert record["options"]["max_anchors"] == 9
    assert record["weights"].endswith("model.pth")
    assert record["command"].startswith("python tools/clip_direct_inference.py --config-file ")
    table = capsys.readouterr().out
    assert table.count(f"| {world} ") == 3 * 5  # a line per row and group
    # What tools/reproduce.py reads.
    expected = record["rows"][world][rows[0]]["novel/AP50"]
    assert read_evaluation(output)[f"{world}/bbox/novel/AP50"] == expected


def test_a_picture_that_cannot_be_decoded_stops_it_before_clip_is_asked(
    world, config, opts, capsys, tmp_path, monkeypatch
):
    (tmp_path / "world" / "images" / "3.png").write_bytes(b"no picture")
    monkeypatch.setattr("hierkd.evaluation.direct_inference.DirectInference", None)
    message = refused(clip_direct_inference, capsys, "--config-file", config, *opts)
    assert "3.png" in message


# ------------------------------------------------------------------------------ Table 9


def test_upper_bound_at_several_crop_scales(world, config, tmp_path, capsys):
    output = tmp_path / "figures.json"
    arguments = ["--config-file", config, "--crop-scales", "1", "1.5", "1.0"]
    clip_upper_bound.main([*arguments, "--output", str(output)])
    record = json.loads(output.read_text())
    assert list(record["rows"][world]) == ["crop 1", "crop 1.5"]
    assert record["figures"][world] == record["rows"][world]["crop 1"]
    for figures in record["rows"][world].values():
        for group in ("base", "novel", "all"):
            # each box has one label; which one is chance
            assert 0 <= figures[f"{group}/AR50"] < 100
            assert {f"{group}/{m}" for m in clip_upper_bound.COLUMNS} <= set(figures)
    assert record["options"]["crop_scales"] == [1.0, 1.5]
    assert record["weights"] == ""
    assert read_evaluation(output)[f"{world}/bbox/novel/AR50"] is not None
    headers = [line for line in capsys.readouterr().out.split("\n") if "| dataset " in line]
    assert [[c.strip() for c in h.strip("|").split("|")][3:] for h in headers] == [
        ["AP50", "APs", "APm", "APl", "AR50"]
    ]


# ------------------------------------------------------------------------------ wrong input

DIRECT = [clip_direct_inference, "--config-file", "{config}"]
BOUND = [clip_upper_bound, "--config-file", "{config}"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*DIRECT, "--tau", "hot"], "--tau: invalid tau value: 'hot'"),
        ([*DIRECT, "--tau", "-1"], "--tau: invalid tau value: '-1'"),
        ([*DIRECT, "--datasets", "nowhere"], "Unknown dataset 'nowhere'"),
        ([*DIRECT, "--crop-scale", "0"], "--crop-scale and --images-per-batch must be positive"),
        ([*DIRECT, "--background", "sky"], "invalid choice: 'sky'"),
        ([clip_direct_inference, "--config-file", "gone.yaml"], "no file 'gone.yaml'"),
        ([*BOUND, "--crop-scales", "1", "-1"], "--crop-scales and --images-per-batch must be"),
        ([*BOUND, "--datasets", "nowhere"], "Unknown dataset 'nowhere'"),
        ([*DIRECT], "3.png"),
    ],
)
def test_wrong_input_ends_with_a_message(config, opts, tmp_path, capsys, arguments, message):
    images = tmp_path / "world" / "images"
    (images / "3.png").write_bytes(b"no picture")
    tool, *given = arguments
    given = [each.format(config=config) for each in given]
    assert message in refused(tool, capsys, *given, *opts)
