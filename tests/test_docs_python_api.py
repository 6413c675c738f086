"""The examples of docs/python_api.md, and the commands of docs/demo.md, do what they say."""

import re
import shlex
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

import demo
import tiny_training
from hierkd.reports import demonstration

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def replaced(tmp_path_factory):
    """Change the paths of a page to those of a tiny world."""
    root = tmp_path_factory.mktemp("docs")
    tiny_training.write_world(root)
    clip = tiny_training.write_clip(root / "clip.pt")
    test = root / "miniature" / "test"
    test.mkdir()
    for number in (340, 341):
        with Image.open(root / "miniature" / "val" / f"{number - 339}.png") as image:
            image.save(test / f"{number:05}.jpg")
    writer = cv2.VideoWriter(
        str(root / "trip.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 25.0, (64, 48)
    )
    for i in range(12):
        writer.write(np.full((48, 64, 3), 20 * i, np.uint8))
    writer.release()
    (root / "names.txt").write_text("dog\ncup\n")
    (root / "output").mkdir()
    with pytest.MonkeyPatch.context() as patch, tiny_training.miniature_at(root):
        patch.setenv("HIERKD_CACHE", str(root / "cache"))
        tiny_training.write_run(root / "run", clip, "TEST.DETECTIONS_PER_IMAGE", "6")
        paths = {
            "output/demo/hierkd": f"{root}/run",
            "datasets/miniature/val/0000*.jpg": f"{root}/miniature/val/*.png",
            "datasets/miniature": f"{root}/miniature",
            "output/d": f"{root}/output/d",
            "trip.mp4": f"{root}/trip.mp4",
            "names.txt": f"{root}/names.txt",
        }

        def _replace(text):
            for old, new in paths.items():
                text = re.sub(rf"(?<![\w/]){re.escape(old)}", new, text)
            return text

        yield _replace


def blocks(page, language):
    text = (ROOT / "docs" / page).read_text()
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_python_examples(replaced, capsys):
    examples = blocks("python_api.md", "python")
    assert len(examples) >= 6
    names: dict = {}
    for example in examples:
        code = replaced(example)
        assert "output/demo" not in code
        exec(compile(code, "docs/python_api.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "('bicycle', 'red elephant')" in printed
    assert "image 1: an array must have shape (H, W, 3)" in printed
    assert len(names["several"]) == 3
    assert len(names["batch"]) == 2


COMMANDS = [
    line
    for block in blocks("demo.md", "bash")
    for line in block.splitlines()
    if line.startswith("python demo.py") and "--webcam" not in line  # needs a camera
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_demo(replaced, command, tmp_path, monkeypatch):
    for module in (demo, demonstration):
        monkeypatch.setattr(module, "DEFAULT_RUN", replaced("output/demo/hierkd"))
    _, _, *arguments = shlex.split(replaced(command))
    if "--output" not in arguments:
        arguments = ["--output", str(tmp_path), *arguments]
    demo.main(arguments)
    output = Path(arguments[arguments.index("--output") + 1])
    assert (output / "detections.json").is_file()


def test_every_option_is_on_the_page():
    page = (ROOT / "docs" / "demo.md").read_text()
    options = set(re.findall(r"--[a-z][a-z-]+", demo.get_parser().format_help())) - {"--help"}
    assert {option for option in options if option not in page} == set()
