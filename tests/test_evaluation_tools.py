"""tools/{clip_direct_inference,clip_upper_bound,plot_heat_maps,compare_detections}.py from their
command lines, with a small random detector and a fake CLIP."""

import json

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from PIL import Image

import hierkd.modeling.detector as meta_arch
from fake_teacher import FakeTeacher
from hierkd.evaluation.direct_inference import DETECTOR
from hierkd.evaluation.split_coco_evaluation import METRICS
from hierkd.experiments.reproduce import read_evaluation
from hierkd.load_config import load_config
from hierkd.reports import charts
from tools import (
    clip_direct_inference,
    clip_upper_bound,
    compare_detections,
    plot_heat_maps,
)
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


# ------------------------------------------------------------------------------ Figure 4


@pytest.fixture
def picture(world):
    return DatasetCatalog.get(world)[3]["file_name"]


def test_heat_maps_of_any_class(config, opts, picture, tmp_path):
    output = tmp_path / "figure4"
    other = tmp_path / "wide.jpg"
    Image.new("RGB", (300, 100), "green").save(other)
    arguments = ["--config-file", config, "--input", picture, str(other), "--panel-px", "120"]
    plot_heat_maps.main([*arguments, "--classes", "bee,ice cream", "--output", str(output), *opts])
    assert sorted(p.name for p in output.iterdir()) == ["4.png", "wide.png"]
    with Image.open(output / "4.png") as square, Image.open(output / "wide.png") as wide:
        assert square.width == wide.width > 4 * 120  # the picture and three levels
        assert square.height - wide.height == 2 * (120 - 40)  # two rows


# ------------------------------------------------------------------------------ Figure 5


@pytest.fixture
def compare(world, config, tmp_path):
    """Arguments that compare the detector with itself."""
    run = f"{config}:{tmp_path / 'model.pth'}"
    runs = ["--run", f"IKD={run}", "--run", f"HierKD={run}"]
    output = ["--panel-px", "100", "--output", str(tmp_path / "figure5.png")]
    return ["--dataset", world, *runs, *output]


@pytest.fixture
def columns(monkeypatch):
    """What reaches ``draw_comparison``."""
    seen = []
    draw = charts.draw_comparison

    def record(runs, captions, **options):
        seen.append((runs, captions))
        return draw(runs, captions, **options)

    monkeypatch.setattr(charts, "draw_comparison", record)
    return seen


def test_a_column_per_run_and_a_row_per_picture(compare, columns, tmp_path):
    compare_detections.main([*compare, "--image-ids", "4", "1"])
    ((runs, captions),) = columns
    assert list(runs) == ["IKD", "HierKD"]
    assert captions == [
        "4.png (id 4) · novel: dog, bee; base: elk",
        "1.png (id 1) · base: ant",
    ]
    for samples in runs.values():
        assert [len(s.truth) for s in samples] == [3, 1]
        assert [len(s.detections) for s in samples] == [3, 1]  # as many as objects
    assert runs["IKD"][0].detections == runs["HierKD"][0].detections
    with Image.open(tmp_path / "figure5.png") as sheet:
        assert sheet.format == "PNG"
        assert sheet.width > 3 * 100
        assert sheet.height > 2 * 100


def test_novel_classes_in_turn_and_random_pictures_with_a_seed(compare, columns):
    chosen = []
    for which in (["--novel", "3"], *(["--random", "3", "--seed", s] for s in ("1", "2"))):
        compare_detections.main([*compare, *which])
        chosen.append([caption.split(" ")[0] for caption in columns[-1][1]])
    assert chosen[0] == ["2.png", "3.png", "4.png"]  # bee, dog, the next with a bee
    assert chosen[1] != chosen[2]


def test_threshold_and_judged_classes(compare, columns):
    compare_detections.main([*compare, "--image-ids", "4", "--threshold", "0", "--judge", "novel"])
    ((runs, _),) = columns
    (sample,) = runs["IKD"]
    assert len(sample.detections) > 3
    verdicts = {box.class_name: box.verdict for box in sample.truth}
    assert verdicts == {"dog": "correct", "bee": "correct", "elk": "uncounted"}
    assert {b.verdict for b in sample.detections if b.class_name in ("bee", "dog")} <= {
        *("correct", "wrong")
    }
    compare_detections.main([*compare, "--image-ids", "4", "--threshold", "1"])
    assert columns[-1][0]["IKD"][0].detections == ()


# ------------------------------------------------------------------------------ wrong input

DIRECT, BOUND, HEAT = (
    [clip_direct_inference, "--config-file", "{config}"],
    [clip_upper_bound, "--config-file", "{config}"],
    [plot_heat_maps, "--config-file", "{config}", "--output", "{tmp}/out", "--classes"],
)


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
        (
            [*HEAT, "cow", "--input", "{4}", "--vocabulary", "bee"],
            "not in --vocabulary",
        ),
        ([*HEAT, "bee", "--input", "{4}", "--panel-px", "3"], "--panel-px must be at least 64"),
        ([*HEAT, "bee", "--input", "{3}"], "3.png cannot be decoded"),
        ([*HEAT, "bee", "--input", "{4}", "gone.png"], "['gone.png']"),
        ([*HEAT, "bee", "--input", "{4}", "{4}"], "several pictures are called ['4']"),
        ([*DIRECT], "3.png"),
    ],
)
def test_wrong_input_ends_with_a_message(config, opts, tmp_path, capsys, arguments, message):
    images = tmp_path / "world" / "images"
    (images / "3.png").write_bytes(b"no picture")
    paths = [images / f"{number}.png" for number in range(5)]
    tool, *given = arguments
    given = [each.format(*paths, config=config, tmp=tmp_path) for each in given]
    assert message in refused(tool, capsys, *given, *opts)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image-ids", "4", "99"], "has no images ['99']"),
        (["--image-ids", "4"], "4.png cannot be decoded"),
        (["--novel", "1", "--threshold", "30"], "--threshold must be 0 to 1, got 30.0"),
        (["--novel", "1", "--output", "sheet.gif"], "--output: expected one of"),
        (["--novel", "1", "--dataset", "nowhere"], "Unknown dataset 'nowhere'"),
        (["--novel", "1", "--run", "GKD"], "--run: expected NAME=CONFIG:WEIGHTS, got 'GKD'"),
        (["--novel", "1", "--run", "GKD=a.yaml:b.pth"], "--run GKD: no file 'a.yaml'"),
        ([], "one of the arguments --image-ids --random --novel is required"),
    ],
)
def test_wrong_input_of_the_comparison(compare, tmp_path, capsys, arguments, message):
    (tmp_path / "world" / "images" / "4.png").write_bytes(b"no picture")
    assert message in refused(compare_detections, capsys, *compare, *arguments)
    assert not (tmp_path / "figure5.png").exists()
