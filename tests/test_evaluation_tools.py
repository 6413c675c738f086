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
from hierkd.experiments.runs import find_figure
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
    arguments += ["--crop-scale", "1.25", "--images-per-batch", "4", "--output", str(output)]
    arguments = ["--config-file", config, *arguments, *opts]
    clip_direct_inference.main(arguments)
    record = json.loads(output.read_text())
    rows = [f"tau {t}, background {b}" for t in ("own", "100") for b in ("learned", "none")]
    assert list(record["rows"]) == record["dataset"] == [world]
    assert list(record["rows"][world]) == [DETECTOR, *rows]
    assert record["figures"][world] == record["rows"][world][rows[0]]
    for figures in record["rows"][world].values():
        assert {f"{g}/{m}" for g in ("base", "novel", "all") for m in METRICS} <= set(figures)
    assert record["options"]["tau"] == dict(zip(rows, [10.0, 10.0, 100.0, 100.0], strict=True))
    assert record["options"]["crop_scale"] == 1.25
    assert record["options"]["fuse_iou"] is False
    assert record["options"]["max_anchors"] == 9
    assert record["weights"].endswith("model.pth")
    assert record["command"].startswith("python tools/clip_direct_inference.py --config-file ")
    table = capsys.readouterr().out
    assert table.count(f"| {world} ") == 3 * 5  # a line per row and group


def test_direct_inference_as_printed_but_for_the_factor(world, config, opts, tmp_path):
    output = tmp_path / "figures.json"
    clip_direct_inference.main(
        ["--config-file", config, "--with-iou", "--output", str(output), *opts]
    )
    record = json.loads(output.read_text())
    (rows,) = record["rows"].values()
    assert list(rows) == [DETECTOR, "tau own, background none, times IoU"]
    assert (record["options"]["crop_scale"], record["options"]["fuse_iou"]) == (1.0, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tau", "hot"], "--tau: expected numbers or 'own', got 'hot'"),
        (["--tau", "-1"], "tau must be a positive number, got -1.0"),
        (["--datasets", "nowhere"], "Unknown dataset 'nowhere'"),
        (["--crop-scale", "0"], "crop scale must be positive"),
        (["--max-anchors", "-3"], "max_anchors must be 0"),
        (["--images-per-batch", "0"], "--images-per-batch: must be at least 1"),
        (["--background", "sky"], "invalid choice: 'sky'"),
    ],
)
def test_wrong_options_of_direct_inference(config, opts, capsys, arguments, message):
    arguments = ["--config-file", config, *arguments, *opts]
    assert message in refused(clip_direct_inference, capsys, *arguments)


def test_a_picture_that_cannot_be_decoded_stops_it_before_clip_is_asked(
    world, config, opts, capsys, tmp_path, monkeypatch
):
    (tmp_path / "world" / "images" / "3.png").write_bytes(b"no picture")
    monkeypatch.setattr("hierkd.evaluation.direct_inference.DirectInference", None)
    message = refused(clip_direct_inference, capsys, "--config-file", config, *opts)
    assert "3.png" in message


def weights_named(path, capsys, config, tool=clip_direct_inference):
    return refused(tool, capsys, "--config-file", config, "--opts", "MODEL.WEIGHTS", path)


def test_missing_checkpoint_is_named(config, capsys):
    assert "MODEL.WEIGHTS: no file 'gone.pth'" in weights_named("gone.pth", capsys, config)
    assert "MODEL.WEIGHTS is empty" in weights_named("", capsys, config)


def test_a_checkpoint_of_another_embedding_size_is_named(config, capsys, tmp_path):
    checkpoint = torch.load(tmp_path / "model.pth")
    checkpoint["model"]["text_classifier.background_embedding"] = torch.ones(512)
    torch.save(checkpoint, tmp_path / "other.pth")
    message = weights_named(tmp_path / "other.pth", capsys, config)
    assert "other.pth: its embeddings have 512 dimensions, this detector's 64" in message


def test_the_weights_of_a_backbone_are_no_detector(config, capsys, tmp_path):
    checkpoint = torch.load(tmp_path / "model.pth")["model"]
    backbone = {k: v for k, v in checkpoint.items() if k.startswith("backbone.")}
    torch.save({"model": backbone}, tmp_path / "warm_start.pth")
    message = weights_named(tmp_path / "warm_start.pth", capsys, config)
    assert "is no trained detector of this config" in message


def test_missing_config_is_named(capsys):
    for tool in (clip_direct_inference, clip_upper_bound):
        assert "no file 'gone.yaml'" in refused(tool, capsys, "--config-file", "gone.yaml")


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
    headers = [line for line in capsys.readouterr().out.split("\n") if "| dataset " in line]
    assert [[c.strip() for c in h.strip("|").split("|")][3:] for h in headers] == [
        ["AP50", "APs", "APm", "APl", "AR50"]
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--crop-scales", "1", "-1"], "--crop-scales must be positive, got [1.0, -1.0]"),
        (["--datasets", "nowhere"], "Unknown dataset 'nowhere'"),
        (["--images-per-batch", "0"], "--images-per-batch must be at least 1"),
    ],
)
def test_wrong_options_of_the_upper_bound(config, capsys, arguments, message):
    assert message in refused(clip_upper_bound, capsys, "--config-file", config, *arguments)


def test_a_config_without_datasets_needs_some(config, capsys):
    for tool in (clip_direct_inference, clip_upper_bound):
        arguments = ["--config-file", config, "--opts", "DATASETS.TEST", "()"]
        assert "--datasets: none given" in refused(tool, capsys, *arguments)


def test_the_tables_are_filled_from_the_files(world, config, opts, tmp_path):
    """What tools/reproduce.py reads."""
    output = tmp_path / "figures.json"
    clip_upper_bound.main(["--config-file", config, "--output", str(output)])
    metrics = read_evaluation(output)
    record = json.loads(output.read_text())
    expected = record["rows"][world]["crop 1.5"]["novel/AP50"]
    assert metrics[f"{world}/bbox/novel/AP50"] == expected
    renamed = {key.replace(world, "toy_val_novel"): value for key, value in metrics.items()}
    assert find_figure(renamed, "novel", "novel/AP50") == expected
    clip_direct_inference.main(["--config-file", config, "--output", str(output), *opts])
    metrics = read_evaluation(output)
    assert metrics[f"{world}/bbox/novel/AR50"] is not None


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--classes", "cow", "--vocabulary", "bee,wasp"], "['cow'] are not in --vocabulary"),
        (["--classes", ""], "the vocabulary is empty"),
        (["--classes", "bee", "--vocabulary", " , "], "the vocabulary is empty"),
        (["--classes", "bee,bee"], "repeats 'bee'"),
        (["--classes", "bee", "--panel-px", "3"], "--panel-px must be at least 64"),
    ],
)
def test_wrong_classes_of_heat_maps(config, opts, picture, capsys, tmp_path, arguments, message):
    base = ["--config-file", config, "--input", picture, "--output", tmp_path / "figure4"]
    assert message in refused(plot_heat_maps, capsys, *base, *arguments, *opts)
    assert not (tmp_path / "figure4").exists()


def test_wrong_pictures_of_heat_maps(config, opts, picture, capsys, tmp_path):
    base = ["--config-file", config, "--classes", "bee", "--output", tmp_path / "f", "--input"]
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    assert "broken.png cannot be decoded" in refused(plot_heat_maps, capsys, *base, broken, *opts)
    assert "['gone.png']" in refused(plot_heat_maps, capsys, *base, picture, "gone.png", *opts)
    message = refused(plot_heat_maps, capsys, *base, picture, picture, *opts)
    assert "several pictures are called ['4']" in message


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
    for which in (["--novel", "3"], *(["--random", "3", "--seed", s] for s in ("1", "1", "2"))):
        compare_detections.main([*compare, *which])
        chosen.append([caption.split(" ")[0] for caption in columns[-1][1]])
    assert chosen[0] == ["2.png", "3.png", "4.png"]  # bee, dog, the next with a bee
    assert chosen[1] == chosen[2] != chosen[3]


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


def test_jpeg_by_suffix(compare, tmp_path):
    arguments = [*compare, "--image-ids", "6", "--output", str(tmp_path / "sheet.jpg")]
    compare_detections.main(arguments)  # a picture without objects
    with Image.open(tmp_path / "sheet.jpg") as sheet:
        assert sheet.format == "JPEG"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image-ids", "4", "99"], "has no images ['99']"),
        (["--random", "0"], "must be at least 1, got 0"),
        (["--novel", "1", "--threshold", "30"], "--threshold must be 0 to 1, got 30.0"),
        (["--novel", "1", "--output", "sheet.gif"], "--output: expected one of"),
        (["--novel", "1", "--dataset", "nowhere"], "Unknown dataset 'nowhere'"),
        (["--novel", "1", "--run", "GKD"], "--run: expected NAME=CONFIG:WEIGHTS, got 'GKD'"),
        (["--novel", "1", "--run", "GKD=a.yaml:b.pth"], "--run GKD: no file 'a.yaml'"),
        ([], "one of the arguments --image-ids --random --novel is required"),
    ],
)
def test_wrong_options_of_the_comparison(compare, capsys, arguments, message):
    assert message in refused(compare_detections, capsys, *compare, *arguments)


def test_two_runs_of_one_name(compare, capsys):
    message = refused(compare_detections, capsys, *compare, *compare[2:4], "--novel", "1")
    assert "--run: several are called 'IKD'" in message


def test_a_broken_picture_of_the_comparison_is_named(compare, capsys, tmp_path):
    (tmp_path / "world" / "images" / "4.png").write_bytes(b"no picture")
    message = refused(compare_detections, capsys, *compare, "--image-ids", "4")
    assert "4.png cannot be decoded" in message
    assert not (tmp_path / "figure5.png").exists()
