"""demo.py from the command line, with a small random detector."""

import json

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image

import demo
import hierkd.modeling.meta_arch as meta_arch
from fake_teacher import FakeTeacher
from hierkd.engine.config import load_config
from toy_world import VOCABULARY, register_toy_world


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    """A training's folder as detectron2 leaves it: config.yaml beside model_final.pth."""
    dataset = register_toy_world(tmp_path / "world")
    cfg = load_config(
        "configs/miniature/hierkd.yaml",
        ["MODEL.DEVICE", "cpu", "DATASETS.TRAIN", "()", "DATASETS.TEST", f"('{dataset}',)"],
    )
    teacher = FakeTeacher(cfg.MODEL.TEXT_CLASSIFIER.EMBED_DIM)
    monkeypatch.setattr(meta_arch, "build_teacher", lambda cfg: teacher)
    torch.manual_seed(0)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(cfg.dump())
    torch.save({"model": build_model(cfg).state_dict()}, folder / "model_final.pth")
    return folder


@pytest.fixture
def call(run_dir, tmp_path):
    """Run the demo on the detector of ``run_dir`` with a threshold that keeps everything."""

    def _call(*arguments):
        output = tmp_path / "out"
        base = ["--config-file", str(run_dir / "config.yaml"), "--output", str(output)]
        demo.main([*base, "--confidence-threshold", "0", *map(str, arguments)])
        return output, json.loads((output / "detections.json").read_text())

    return _call


def test_a_folder_with_the_datasets_vocabulary(call, tmp_path):
    folder = tmp_path / "world" / "images"
    output, content = call("--input", folder)
    assert content["vocabulary"] == list(VOCABULARY)
    assert [entry["file_name"] for entry in content["images"]] == [
        str(folder / f"{i}.png") for i in range(1, 7)
    ]
    for entry in content["images"]:
        with Image.open(output / entry["annotated"]) as annotated:
            assert max(annotated.size) == 640  # enlarged, so that labels can be read
        assert (entry["height"], entry["width"]) == (128, 128)
        assert 0 < len(entry["detections"]) <= 100
        scores = [d["score"] for d in entry["detections"]]
        assert scores == sorted(scores, reverse=True)
        for detection in entry["detections"]:
            x0, y0, x1, y1 = detection["box_xyxy"]
            assert 0 <= x0 <= x1 <= 128
            assert 0 <= y0 <= y1 <= 128
            assert detection["class"] in VOCABULARY


def test_any_vocabulary(call, tmp_path):
    picture = tmp_path / "world" / "images" / "2.png"
    _, content = call("--input", picture, "--vocabulary", "traffic cone, umbrella")
    assert content["vocabulary"] == ["traffic cone", "umbrella"]
    (entry,) = content["images"]
    assert {d["class"] for d in entry["detections"]} == {"traffic cone", "umbrella"}


def test_threshold(run_dir, tmp_path):
    arguments = ["--config-file", str(run_dir / "config.yaml"), "--output", str(tmp_path / "out")]
    picture = str(tmp_path / "world" / "images" / "2.png")
    demo.main([*arguments, "--input", picture, "--confidence-threshold", "0.999"])
    content = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert content["images"][0]["detections"] == []
    assert (tmp_path / "out" / "2.png").is_file()


def test_named_weights_win_over_those_beside_the_config(call, run_dir, tmp_path):
    other = tmp_path / "other.pth"
    (run_dir / "model_final.pth").rename(other)
    picture = tmp_path / "world" / "images" / "1.png"
    _, content = call("--input", picture, "--opts", "MODEL.WEIGHTS", other)
    assert len(content["images"]) == 1


def test_pictures_of_the_same_name_do_not_overwrite_each_other(call, tmp_path):
    first = tmp_path / "world" / "images" / "1.png"
    second = tmp_path / "elsewhere" / "1.png"
    second.parent.mkdir()
    Image.fromarray(np.zeros((30, 60, 3), np.uint8)).save(second)
    output, content = call("--input", first, second, str(tmp_path / "elsewhere" / "*.png"))
    assert [entry["annotated"] for entry in content["images"]] == ["1.png", "1_1.png"]
    with Image.open(output / "1_1.png") as annotated:
        assert annotated.size == (640, 320)


def failure(call, capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        call(*arguments)
    return stopped.value.code, capsys.readouterr().err


@pytest.mark.parametrize("missing", ["nowhere.png", "no/folder", "*.nothing"])
def test_input_without_a_match_is_named(call, capsys, tmp_path, missing):
    code, message = failure(call, capsys, "--input", tmp_path / missing)
    assert code == 2
    assert missing in message
    assert "Traceback" not in message


def test_folder_without_pictures_is_named(call, capsys, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "notes.txt").write_text("no picture")
    code, message = failure(call, capsys, "--input", empty)
    assert code == 2
    assert str(empty) in message


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\ntruncated"])
def test_broken_picture_is_named_and_does_not_stop_the_others(
    call, capsys, caplog, tmp_path, content
):
    broken = tmp_path / "broken.png"
    broken.write_bytes(content)
    picture = tmp_path / "world" / "images" / "1.png"
    code, message = failure(call, capsys, "--input", broken, picture)
    assert code == 1
    assert "1 of the pictures could not be read" in message
    entries = json.loads((tmp_path / "out" / "detections.json").read_text())["images"]
    assert [entry["file_name"] for entry in entries] == [str(picture)]


def test_broken_picture_by_itself(tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"broken\.png cannot be decoded"):
        demo.detect(None, broken, tmp_path / "out.png", 0.5)


@pytest.mark.parametrize(
    ("vocabulary", "message"), [("", "empty"), ("cat,cat", "cat"), ("cat,,dog", "blank")]
)
def test_unusable_vocabulary(call, capsys, tmp_path, vocabulary, message):
    picture = tmp_path / "world" / "images" / "1.png"
    code, text = failure(call, capsys, "--input", picture, "--vocabulary", vocabulary)
    assert code == 2
    assert message in text


def test_missing_weights_are_named(call, capsys, tmp_path):
    picture = tmp_path / "world" / "images" / "1.png"
    code, message = failure(
        call, capsys, "--input", picture, "--opts", "MODEL.WEIGHTS", "gone/model.pth"
    )
    assert code == 2
    assert "gone/model.pth" in message


def test_without_make_demo_the_message_says_so(capsys, tmp_path, monkeypatch):
    register_toy_world(tmp_path / "world")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        demo.main(["--input", str(tmp_path / "world" / "images")])
    assert "run `make demo` first" in capsys.readouterr().err


def test_threshold_out_of_range(capsys, tmp_path):
    with pytest.raises(SystemExit):
        demo.main(["--input", "x.png", "--confidence-threshold", "30"])
    assert "--confidence-threshold must be 0 to 1, got 30" in capsys.readouterr().err
