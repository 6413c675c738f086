"""demo.py from the command line, with a small random detector."""

import json
import os
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image

import demo
import hierkd.modeling.detector as meta_arch
import tiny_training
from fake_teacher import FakeTeacher
from hierkd.load_config import load_config
from toy_world import VOCABULARY, register_toy_world


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    """A training's folder as detectron2 leaves it: config.yaml beside model_final.pth."""
    dataset = register_toy_world(tmp_path / "world")
    cfg = load_config(
        "configs/miniature/hierkd.yaml",
        [
            *("MODEL.DEVICE", "cpu", "DATASETS.TRAIN", "()", "DATASETS.TEST", f"('{dataset}',)"),
            *("TEST.DETECTIONS_PER_IMAGE", "15"),  # drawing takes longer than detecting
        ],
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


@pytest.mark.parametrize(("trained_on", "warnings"), [("miniature_ovd_train_base", 1), ("", 0)])
def test_a_detector_of_icons_is_said_once(call, run_dir, capsys, tmp_path, trained_on, warnings):
    config = run_dir / "config.yaml"
    names = f"('{trained_on}',)" if trained_on else "()"
    changed = load_config(str(config), ["DATASETS.TRAIN", names])
    config.write_text(changed.dump())
    images = tmp_path / "world" / "images"
    call("--input", images / "1.png", images / "2.png")
    said = capsys.readouterr()
    assert (said.out + said.err).count("rendered icons only: run.") == warnings


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


def test_what_was_found_is_counted_in_words(call, capsys, tmp_path):
    images = tmp_path / "world" / "images"
    for arguments, words in (
        (["--input", images / "1.png", "--top-k", "1"], "1 detection in 1 picture: see "),
        (["--input", images / "1.png", images / "2.png", "--top-k", "1"], "2 detections in 2 pict"),
    ):
        call(*arguments)
        said = capsys.readouterr()
        assert words in said.out + said.err


@pytest.mark.parametrize("link", [False, True])
def test_inputs_are_not_written_over(call, capsys, tmp_path, link):
    folder = tmp_path / "world" / "images"
    before = {path: path.read_bytes() for path in folder.iterdir()}
    output = folder
    if link:
        output = tmp_path / "link"
        output.symlink_to(folder)
    code, message = failure(call, capsys, "--input", folder / "3.png", "--output", output)
    assert code == 2
    assert "3.png is an input" in message
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_an_output_that_is_a_file_is_named(call, capsys, tmp_path):
    (tmp_path / "file").write_text("mine")
    picture = tmp_path / "world" / "images" / "1.png"
    code, message = failure(call, capsys, "--input", picture, "--output", tmp_path / "file")
    assert code == 2
    assert str(tmp_path / "file") in message
    assert (tmp_path / "file").read_text() == "mine"


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
    assert "1 of the inputs could not be read" in message
    entries = json.loads((tmp_path / "out" / "detections.json").read_text())["images"]
    assert [entry["file_name"] for entry in entries] == [str(picture)]


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


def write_video(path, count=10):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), 10.0, (64, 48))
    for i in range(count):
        writer.write(np.full((48, 64, 3), 20 * i, np.uint8))
    writer.release()
    return path


def count_frames(path):
    capture = cv2.VideoCapture(str(path))
    count = 0
    while capture.grab():
        count += 1
    return count, capture.get(cv2.CAP_PROP_FPS)


def test_a_video_and_a_page(call, tmp_path):
    video = write_video(tmp_path / "trip.mp4")
    picture = tmp_path / "world" / "images" / "1.png"
    output, content = call("--input", video, picture, "--every", 4, "--html", "--top-k", 2)
    (entry,) = content["videos"]
    assert entry["num_frames"] == 3
    lines = [json.loads(line) for line in (output / "trip.jsonl").read_text().splitlines()]
    assert [line["frame"] for line in lines] == [0, 4, 8]
    assert [line["seconds"] for line in lines] == [0, 0.4, 0.8]
    assert all(len(line["detections"]) <= 2 for line in lines)
    assert count_frames(output / "trip.mp4") == (3, 2.5)
    page = (output / "index.html").read_text()
    assert "trip.mp4" in page
    assert '<img src="1.png"' in page


def test_a_broken_video_does_not_stop_the_others(call, capsys, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    picture = tmp_path / "world" / "images" / "1.png"
    code, _ = failure(call, capsys, "--input", tmp_path / "broken.mp4", picture)
    assert code == 1
    content = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert (len(content["images"]), content["videos"]) == (1, [])
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["1.png", "detections.json"]


def test_a_camera(call, tmp_path, monkeypatch):
    opened = []
    capture = cv2.VideoCapture
    video = write_video(tmp_path / "trip.mp4")
    monkeypatch.setattr(
        cv2, "VideoCapture", lambda number: opened.append(number) or capture(str(video))
    )
    output, content = call("--webcam", "--max-frames", 3)
    assert opened == [0]
    assert content["videos"][0]["file_name"] == "camera 0"
    assert len((output / "webcam0.jsonl").read_text().splitlines()) == 3
    monkeypatch.undo()
    assert count_frames(output / "webcam0.mp4")[0] >= 1


def test_side_by_side_with_heat_maps(call, run_dir, tmp_path):
    picture = tmp_path / "world" / "images" / "1.png"
    compared = f"again={run_dir / 'model_final.pth'}"
    output, content = call(
        "--input", picture, "--compare", compared, "--heat-maps", "--html", "one-file"
    )
    (entry,) = content["images"]
    assert content["detectors"] == ["run", "again"]
    assert entry["compared"] == {"again": entry["detections"]}
    with Image.open(output / "1.png") as sheet:
        assert sheet.width > 1280  # two panels of 640
    assert (output / entry["heat_maps"]).is_file()
    assert 'src="1' not in (output / "index.html").read_text()


def test_thresholds_of_classes_and_files(call, tmp_path):
    picture = tmp_path / "world" / "images" / "1.png"
    (tmp_path / "names.txt").write_text("traffic cone\ncup, red\n")
    (tmp_path / "scores.txt").write_text("cup, red=1\n")
    _, content = call(
        *("--input", picture, "--vocabulary", tmp_path / "names.txt"),
        *("--class-thresholds", tmp_path / "scores.txt"),
    )
    assert content["vocabulary"] == ["traffic cone", "cup, red"]
    assert {d["class"] for d in content["images"][0]["detections"]} == {"traffic cone"}


def test_coco_results(call, tmp_path):
    annotations = tmp_path / "annotations.json"
    categories = [{"id": 10 + i, "name": name} for i, name in enumerate(VOCABULARY)]
    images = [{"id": 70, "file_name": "somewhere/1.png", "height": 128, "width": 128}]
    annotations.write_text(
        json.dumps({"images": images, "annotations": [], "categories": categories})
    )
    picture = tmp_path / "world" / "images" / "1.png"
    output, content = call("--input", picture, "--coco-results", annotations)
    results = json.loads((output / "coco_results.json").read_text())
    expected = content["images"][0]["detections"]
    assert len(results) == len(expected) > 0
    for result, detection in zip(results, expected, strict=True):
        assert result["image_id"] == 70
        assert VOCABULARY[result["category_id"] - 10] == detection["class"]
        x, y, width, height = result["bbox"]
        assert [x, y, x + width, y + height] == pytest.approx(detection["box_xyxy"], abs=0.011)


def test_pictures_that_share_a_name_have_no_coco_id(call, capsys, tmp_path):
    annotations = tmp_path / "annotations.json"
    categories = [{"id": 10 + i, "name": name} for i, name in enumerate(VOCABULARY)]
    images = [
        {"id": i, "file_name": name, "height": 128, "width": 128}
        for i, name in enumerate(["a/1.png", "b/1.png", "a/2.png"])
    ]
    annotations.write_text(
        json.dumps({"images": images, "annotations": [], "categories": categories})
    )
    pictures = [tmp_path / "world" / "images" / f"{i}.png" for i in (1, 2)]
    code, text = failure(call, capsys, "--input", *pictures, "--coco-results", annotations)
    assert code == 2
    assert f"no image, or several, of the name of ['{pictures[0]}']" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--every", "0"], "--every must be at least 1"),
        (["--top-k", "0"], "--top-k must be at least 1"),
        (["--max-frames", "-1"], "--max-frames must be at least 1"),
        (["--class-thresholds", "zebra=0.5"], "not in the vocabulary: ['zebra']"),
        (["--class-thresholds", "zebra"], "expected NAME=SCORE, got 'zebra'"),
        (["--class-thresholds", "a=0.1,a=0.2"], "named more than once"),
        (["--class-thresholds", "a=1.5", "--vocabulary", "a"], "must be 0 to 1, got 1.5"),
        (["--class-thresholds", "gone.txt"], "gone.txt"),
        (["--vocabulary", "gone.txt"], "gone.txt"),
        (["--compare", "gone/away"], "gone/away"),
        (["--heat-maps", "zebra"], "['zebra'] are not in the vocabulary"),
        (["--coco-results", "gone.json"], "gone.json"),
        (["--run", "gone"], "no training's folder 'gone'"),
    ],
)
def test_wrong_options(call, capsys, tmp_path, arguments, message):
    picture = tmp_path / "world" / "images" / "1.png"
    code, text = failure(call, capsys, "--input", picture, *arguments)
    assert code == 2
    assert message in text


def test_an_empty_vocabulary_file(call, capsys, tmp_path):
    (tmp_path / "names.txt").write_text("\n\n")
    picture = tmp_path / "world" / "images" / "1.png"
    code, text = failure(call, capsys, "--input", picture, "--vocabulary", tmp_path / "names.txt")
    assert code == 2
    assert "names.txt" in text


def test_requests_leave_standard_output_to_the_answers(tmp_path, monkeypatch):
    root = tmp_path / "tiny"
    tiny_training.write_world(root)
    clip = tiny_training.write_clip(root / "clip.pt")
    monkeypatch.setenv("HIERKD_CACHE", str(root / "cache"))
    with tiny_training.miniature_at(root):
        tiny_training.write_run(root / "run", clip)
    picture = str(root / "miniature" / "val" / "1.png")
    request = json.dumps({"image": picture, "vocabulary": ["a"], "id": 1}).encode()
    done = subprocess.run(
        [sys.executable, "demo.py", "--run", str(root / "run"), "--input", "-"],
        input=b'nonsense\n{"image": "\xff"}\n' + request,  # the second line is not UTF-8
        capture_output=True,
        env={**os.environ, "DETECTRON2_DATASETS": str(root), "PYTHONUTF8": "1"},
    )
    assert done.returncode == 0, done.stderr.decode()
    bad, worse, first = (json.loads(line) for line in done.stdout.splitlines())
    assert first["id"] == 1
    assert {d["class"] for d in first["detections"]} == {"a"}
    assert min(d["score"] for d in first["detections"]) >= 0.3
    assert (bad["line"], worse["line"]) == (1, 2)
    assert "ready" in done.stderr.decode()
