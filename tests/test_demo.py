"""demo.py from the command line, with a small random detector; the commands of its page."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from PIL import Image

import demo
import hierkd.inference.detectors
import hierkd.reports.annotated
import tiny_training
from hierkd import OpenVocabularyPredictor
from hierkd.inference.video import Video, VideoFile
from hierkd.miniature.world import MINIATURE_CLASSES

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Pictures, a video of 10 grey frames, and a training's folder ``run``."""
    root = tmp_path_factory.mktemp("demo")
    with tiny_training.prepared(root):
        run = tiny_training.write_run(
            root / "run", root / "clip.pt", "TEST.DETECTIONS_PER_IMAGE", "15"
        )
        with VideoFile(root / "trip.mp4", 10.0) as video:
            for i in range(10):
                video.write(np.full((48, 64, 3), 20 * i, np.uint8))
        images = root / "miniature" / "val"
        yield SimpleNamespace(root=root, run=run, images=images, picture=images / "1.png")


@pytest.fixture
def call(world, tmp_path, capsys):
    """Run the demo with a threshold that keeps everything -> its folder, and detections.json."""

    def _call(*arguments, threshold=0):
        output = tmp_path / "out"
        base = ["--run", world.run, "--confidence-threshold", threshold, "--output", output]
        demo.main([str(each) for each in [*base, *arguments]])
        return output, json.loads((output / "detections.json").read_text())

    def _fail(*arguments):
        with pytest.raises(SystemExit) as stopped:
            _call(*arguments)
        return stopped.value.code, capsys.readouterr().err

    _call.fails = _fail
    return _call


def test_a_folder_with_the_datasets_vocabulary(call, world, capsys):
    output, content = call("--input", world.images)
    assert content["vocabulary"] == list(MINIATURE_CLASSES)
    said = "".join(capsys.readouterr())
    assert said.count("rendered icons only: run.") == 1
    assert "90 detections in 6 pictures: see " in said
    assert [entry["file_name"] for entry in content["images"]] == [
        str(world.images / f"{i}.png") for i in range(1, 7)
    ]
    for entry in content["images"]:
        with Image.open(output / entry["annotated"]) as annotated:
            assert max(annotated.size) == 640  # enlarged, so that labels can be read
        assert (entry["height"], entry["width"]) == (96, 96)
        assert len(entry["detections"]) == 15
        scores = [d["score"] for d in entry["detections"]]
        assert scores == sorted(scores, reverse=True)
        for detection in entry["detections"]:
            x0, y0, x1, y1 = detection["box_xyxy"]
            assert 0 <= x0 <= x1 <= 96
            assert 0 <= y0 <= y1 <= 96
            assert detection["class"] in MINIATURE_CLASSES


def test_names_and_thresholds_from_files(call, world, tmp_path):
    (tmp_path / "names.txt").write_text("traffic cone\ncup, red\n")
    (tmp_path / "scores.txt").write_text("cup, red=1\n")
    second = tmp_path / "elsewhere" / "1.png"  # of the same name
    second.parent.mkdir()
    Image.fromarray(np.zeros((30, 60, 3), np.uint8)).save(second)
    output, content = call(
        *("--input", world.picture, second, "--vocabulary", tmp_path / "names.txt"),
        *("--class-thresholds", tmp_path / "scores.txt"),
    )
    assert content["vocabulary"] == ["traffic cone", "cup, red"]
    assert {d["class"] for d in content["images"][0]["detections"]} == {"traffic cone"}
    assert content["class_thresholds"] == {"cup, red": 1}
    assert [entry["annotated"] for entry in content["images"]] == ["1.jpg", "1_1.jpg"]
    with Image.open(output / "1_1.jpg") as annotated:
        assert annotated.size == (640, 320)


def test_inputs_and_files_are_not_written_over(call, world, tmp_path):
    before = {path: path.read_bytes() for path in world.images.iterdir()}
    link = tmp_path / "link"
    link.symlink_to(world.images)
    for output in (world.images, link):
        options = ("--annotated", "png", "--output", output)
        code, message = call.fails("--input", world.images / "3.png", *options)
        assert (code, "3.png is an input" in message) == (2, True)
    assert {path: path.read_bytes() for path in world.images.iterdir()} == before
    (tmp_path / "file").write_text("mine")
    code, message = call.fails("--input", world.picture, "--output", tmp_path / "file")
    assert (code, str(tmp_path / "file") in message) == (2, True)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["broken.png", "broken.mp4"])
def test_a_broken_input_is_named_and_does_not_stop_the_others(call, world, tmp_path, name):
    (tmp_path / name).write_bytes(b"\x89PNG\r\n\x1a\ntruncated")
    code, message = call.fails("--input", tmp_path / name, world.picture)
    assert (code, "not all inputs could be read" in message) == (1, True)
    output = tmp_path / "out"
    content = json.loads((output / "detections.json").read_text())
    assert [entry["file_name"] for entry in content["images"]] == [str(world.picture)]
    assert content["videos"] == []
    assert sorted(path.name for path in output.iterdir()) == ["1.jpg", "detections.json"]


def test_ctrl_c_keeps_what_is_done(call, world, tmp_path, monkeypatch):
    save = hierkd.reports.annotated.save_picture

    def stop_at_the_second(path, image):
        if path.name == "2.jpg":
            raise KeyboardInterrupt
        save(path, image)

    monkeypatch.setattr(hierkd.reports.annotated, "save_picture", stop_at_the_second)
    code, said = call.fails("--input", world.images, "--html", "--export", "coco")
    assert (code, "Traceback" in said) == (130, False)
    content = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert [entry["annotated"] for entry in content["images"]] == ["1.jpg"]
    assert (tmp_path / "out" / "index.html").is_file()
    assert len(json.loads((tmp_path / "out" / "coco.json").read_text())["images"]) == 1


def test_a_video_and_a_page(call, world):
    output, content = call(
        *("--input", world.root / "trip.mp4", world.picture, "--every", 4, "--html", "--top-k", 2)
    )
    (entry,) = content["videos"]
    assert entry["num_frames"] == 3
    lines = [json.loads(line) for line in (output / "trip.jsonl").read_text().splitlines()]
    assert [line["frame"] for line in lines] == [0, 4, 8]
    assert [line["seconds"] for line in lines] == [0, 0.4, 0.8]
    assert all(len(line["detections"]) <= 2 for line in lines)
    with Video(output / "trip.mp4") as video:
        assert (len(list(video.frames())), video.fps) == (3, 2.5)
    page = (output / "index.html").read_text()
    assert 'href="trip.mp4"' in page
    assert '<img src="1.jpg"' in page


def test_without_annotated_copies(call, world, capsys):
    some = ("--input", world.root / "trip.mp4", world.images, "--every", 5)
    output, content = call(*some, "--annotated", "none", threshold=1)
    assert sorted(path.name for path in output.iterdir()) == ["detections.json", "trip.jsonl"]
    assert len(content["images"]) == 6
    assert not any("annotated" in entry for entry in content["images"] + content["videos"])
    said = "".join(capsys.readouterr())
    assert re.search(r"0 detections in 6 pictures and 1 video, the best score is \d", said)


def test_a_camera(call, world, monkeypatch):
    opened = []
    capture = cv2.VideoCapture
    monkeypatch.setattr(
        cv2, "VideoCapture", lambda n: opened.append(n) or capture(str(world.root / "trip.mp4"))
    )
    draw = hierkd.reports.annotated._draw

    def interrupted(detectors, image, found):
        if image.mean() > 50:  # the fourth frame
            raise KeyboardInterrupt
        return draw(detectors, image, found)

    monkeypatch.setattr(hierkd.reports.annotated, "_draw", interrupted)
    output, content = call("--webcam", "--top-k", 1)
    monkeypatch.undo()
    assert opened == [0]
    assert content["videos"][0]["num_frames"] == 3
    assert content["videos"][0]["file_name"] == "camera 0"
    assert len((output / "webcam0.jsonl").read_text().splitlines()) == 3
    with Video(output / "webcam0.mp4") as video:
        assert len(list(video.frames())) >= 1


def test_side_by_side_with_heat_maps(call, world):
    compared = f"again={world.run / 'model_final.pth'}"
    output, content = call(
        "--input", world.picture, "--compare", compared, "--heat-maps", "--html", "one-file"
    )
    (entry,) = content["images"]
    assert content["detectors"] == ["run", "again"]
    assert entry["compared"] == {"again": entry["detections"]}
    with Image.open(output / "1.jpg") as sheet:
        assert sheet.width > 1280  # two panels of 640
    assert (output / entry["heat_maps"]).is_file()
    assert 'src="1' not in (output / "index.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--webcam"], "--webcam"),
        (["--max-frames", "-1"], "--max-frames"),
        (["--confidence-threshold", "30"], "score threshold must be 0 to 1, got 30"),
        (["--class-thresholds", "zebra=0.5"], "zebra"),
        (["--vocabulary", "gone.txt"], "gone.txt"),
        (["--compare", "gone/away"], "gone/away"),
        (["--heat-maps", "zebra"], "['zebra']"),
        (["--examples", "mug=gone.jpg"], "examples of 'mug', number 0: no picture 'gone.jpg'"),
        (["--html", "--annotated", "none"], "leave out --annotated none"),
        (["--input", "nowhere.png"], "nowhere.png"),
        (["--opts", "MODEL.WEIGHTS", "gone/model.pth"], "gone/model.pth"),
    ],
)
def test_wrong_options(call, world, arguments, named):
    code, text = call.fails("--input", world.picture, *arguments)
    assert code == 2
    assert named in text
    assert "Traceback" not in text


@pytest.mark.parametrize("module", ["demo", "tools.web_demo"])
def test_the_command_line_answers_before_pytorch_is_there(module):
    code = f"import atexit, sys; from {module} import main\n"
    code += "atexit.register(lambda: print('torch' in sys.modules))\nmain(sys.argv[1:])"
    for arguments, status in ((["--help"], 0), (["a.jpg", "--nonsense"], 2)):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True)
        assert done.returncode == status, done.stderr.decode()
        assert done.stdout.endswith(b"False\n")


# --- docs/demo.md ---------------------------------------------------------------------------------


def blocks(page, language):
    text = (ROOT / "docs" / page).read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


COMMANDS = [
    line
    for block in blocks("demo.md", "bash")
    for line in block.splitlines()
    if line.startswith("python demo.py") and "--webcam" not in line  # needs a camera
]


@pytest.fixture(scope="module")
def of_the_page(world):
    """Change the paths of a page to those of the world."""
    test = world.root / "miniature" / "test"
    test.mkdir()
    for number in (340, 341):
        with Image.open(world.images / f"{number - 339}.png") as image:
            image.save(test / f"{number:05}.jpg")
    (world.root / "names.txt").write_text("dog\ncup\n")
    paths = {
        "output/demo/hierkd": world.run,
        "datasets/miniature/val/0000*.jpg": f"{world.images}/*.png",
        "datasets/miniature": world.root / "miniature",
        "output/d": f"{world.root}/d",
        "trip.mp4": world.root / "trip.mp4",
        "names.txt": world.root / "names.txt",
    }

    def _replace(text):
        for old, new in paths.items():
            text = re.sub(rf"(?<![\w/]){re.escape(old)}", str(new), text)
        return text

    return _replace


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_page(world, of_the_page, command, tmp_path, monkeypatch):
    monkeypatch.setattr(hierkd.inference.detectors, "DEFAULT_RUN", str(world.run))
    _, _, *arguments = shlex.split(of_the_page(command))
    if "--output" not in arguments:
        arguments = ["--output", str(tmp_path), *arguments]
    demo.main(arguments)
    output = Path(arguments[arguments.index("--output") + 1])
    assert (output / "detections.json").is_file()


def test_every_option_is_on_the_page():
    page = (ROOT / "docs" / "demo.md").read_text()
    options = set(re.findall(r"--[a-z][a-z-]+", demo.get_parser().format_help())) - {"--help"}
    assert {option for option in options if option not in page} == set()


def test_python_examples(of_the_page, capsys):
    examples = blocks("python_api.md", "python")
    assert len(examples) >= 6
    names: dict = {}
    for example in examples:
        code = of_the_page(example)
        assert "output/demo" not in code
        exec(compile(code, "docs/python_api.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "('bicycle', 'red elephant')" in printed
    assert "image 1: an image must be an array of shape (H, W, 3)" in printed
    assert len(names["several"]) == 3
    assert len(names["batch"]) == 2


def test_tiles_and_tracks(of_the_page, capsys):
    pytest.importorskip("supervision")
    pytest.importorskip("trackers")
    (example,) = blocks("python_api.md", "python supervision")
    rgb = np.array(Image.open(of_the_page("datasets/miniature/test/00340.jpg")))
    predictor = OpenVocabularyPredictor.from_checkpoint(of_the_page("output/demo/hierkd"))
    names = {"np": np, "rgb": rgb, "predictor": predictor}
    code = of_the_page(example).replace("score_threshold=0.3", "score_threshold=0.0")
    exec(compile(code, "docs/python_api.md", "exec"), names)
    assert "15 objects at once, " in capsys.readouterr().out
    assert len(names["tiled"]) > 15  # each tile has its own 15
    assert names["tracked"].tracker_id is not None
