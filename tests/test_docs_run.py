"""The pages' commands, run one after the other in a copy of the checkout, do what the pages say.

World and detector are those that ``make demo`` left here; where there are none, they are made, with
a shorter training. Trainings of the pages are shortened, too. What is not run is listed, with why.
"""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest
from docs_pages import PAGES, ROOT, Command, commands_of, fenced_blocks, name_of

pytestmark = pytest.mark.slow

# A part of a command -> why it is not run here.
NOT_RUN = {
    "pip install": "would change the environment",
    "pip download": "3 GB",
    "make ": "this is what runs the tests",
    "source ": "an environment of its own",
    "configs/hierkd_R50.yaml": "needs COCO and OpenAI's CLIP",
    "configs/COCO-": "needs COCO and OpenAI's CLIP",
    "coco_ovd_": "needs OpenAI's CLIP",
    "ViT-B": "needs OpenAI's CLIP",
    "lvis.yaml": "needs LVIS",
    "datasets/prepare_coco.py": "needs COCO; tests/data/test_prepare.py",
    "--config-file cluster.yaml": "needs COCO and OpenAI's CLIP",
    "curl ": "the internet",
    "$ROOT": "needs COCO",
    "--scale coco": "needs COCO, and days",
    "tools/reproduce.py --table 4": "takes hours",
    "--webcam": "needs a camera",
    "--num-gpus 2": "two processes: tests/test_launching.py",
    "torchrun": "several processes: tests/test_launching.py",
    "srun": "a cluster",
    "scontrol": "a cluster",
    "$status": "a cluster",
    "lock_hashes.py": "asks PyPI",
    "tools/web_demo.py": "does not end by itself; tests/test_web_demo.py",
    "tensorboard": "does not end by itself",
    "HIERKD_CACHE": "the reader's folder",
}
# Exceptions, which start no training.
RUN = ("--scale coco --num-gpus 4 --dry-run", "--scale coco --collect", "--table 4 --collect")
SHORT = "SOLVER.MAX_ITER 4 SOLVER.WARMUP_ITERS 1 SOLVER.CHECKPOINT_PERIOD 4"
# What a page promises to leave, besides what --output and OUTPUT_DIR name.
PROMISES = {
    "README.md": ["output/detections/index.html"],
    "docs/custom_data.md": [
        *("output/mydata/train.json", "output/mydata/captions_train.json"),
        *("output/mydata/check/mydata_train_base.png", "output/mydata/hierkd/model_final.pth"),
        *("output/mydata/detections/0006.png", "output/mydata/detections/detections.json"),
    ],
    "docs/transfer.md": ["output/glyphs/inference/transfer.json"],
    "docs/demo.md": [
        *("output/detections/00340.png", "output/detections/detections.json"),
        *("output/detections/video/trip.webm", "output/detections/video/trip.jsonl"),
        *("output/detections/video/index.html", "output/detections/page/index.html"),
        *("output/detections/page/00340_heat_maps.png", "output/detections/coco/coco_results.json"),
    ],
    "docs/export.md": ["detector.onnx", "any_classes.onnx", "mine.npz"],
    "docs/training_with_cache.md": ["output/miniature_cache/manifest.json"],
    "docs/monitoring.md": ["output/demo/hierkd/report.html", "hierkd.html"],
}
PREREQUISITES = {"docs/transfer.md": "docs/custom_data.md"}  # whose first three commands it needs
NEEDS = {
    "docs/export.md": ("onnx", "onnxscript", "onnxruntime"),
    "docs/teachers.md": ("open_clip",),
}
WITH_PYTHON = {"README.md", "docs/teachers.md"}  # what is in Python is run before the commands
LIMIT = 900  # seconds a command


@dataclass
class Checkout:
    """A copy of the repository's folder that commands run in."""

    root: Path
    environment: dict[str, str]

    def run(self, command: str) -> str:
        """What a command printed on standard output; an error shows the end of the rest."""
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=self.root,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Checkout:
    root = tmp_path_factory.mktemp("checkout")
    for entry in ROOT.iterdir():
        if entry.name not in ("output", "datasets", ".git"):
            (root / entry.name).symlink_to(entry)
    (root / "datasets").mkdir()
    for entry in (ROOT / "datasets").iterdir():
        if entry.name not in ("coco", "miniature"):
            (root / "datasets" / entry.name).symlink_to(entry)
    programs = root / "programs"
    programs.mkdir()
    (programs / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (programs / "python").chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "projects" / "HierKD"),
        "HIERKD_CACHE": str(root / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("DETECTRON2_DATASETS", None)
    made = Checkout(root, environment)
    world, demo = ROOT / "datasets" / "miniature", ROOT / "output" / "demo"
    if (world / "teacher.pt").exists() and (demo / "hierkd" / "model_final.pth").exists():
        (root / "datasets" / "miniature").symlink_to(world)
        shutil.copytree(demo, root / "output" / "demo", ignore=shutil.ignore_patterns("model_0*"))
    else:
        made.run(f"python tools/run_demo.py --output output/demo {SHORT.replace(' 4', ' 40')}")
    (root / "names.txt").write_text("dog\ncup\n")
    writer = cv2.VideoWriter(
        str(root / "trip.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 25.0, (64, 48)
    )
    for i in range(12):
        writer.write(np.full((48, 64, 3), 20 * i, np.uint8))
    writer.release()
    return made


def commands_to_run(page: Path) -> list[Command]:
    """What is run of a page, each line once."""
    kept: dict[int, Command] = {}
    for command in commands_of(page):
        line = command.source if command.heredoc is None else command.source.split("\n")[0]
        runs = any(part in line for part in RUN)
        if runs or not any(part in line for part in NOT_RUN):
            kept.setdefault(command.line, command)
    return list(kept.values())


def shortened(command: Command) -> str:
    """The command; a training of a few steps, whatever the page says."""
    trains = "train_net.py" in command.source and "--eval-only" not in command.source
    without_comment = re.sub(r"\s#[^'\"]*$", "", command.source)
    return f"{without_comment} {SHORT}" if trains else command.source


def named_outputs(command: Command) -> list[str]:
    pairs = itertools.pairwise(command.words)
    return [value for flag, value in pairs if flag in ("--output", "OUTPUT_DIR")]


PAGES_THAT_RUN = [page for page in PAGES if commands_to_run(page)]


@pytest.mark.parametrize("page", PAGES_THAT_RUN, ids=name_of)
def test_page(page, checkout):
    name = name_of(page)
    for module in NEEDS.get(name, ()):
        pytest.importorskip(module)
    before = PREREQUISITES.get(name)
    if before and not (checkout.root / "output" / "mydata" / "val.json").exists():
        for command in commands_to_run(ROOT / before)[:3]:
            checkout.run(command.source)
    if name in WITH_PYTHON:
        run_python(page, checkout)
    printed = []
    for command in commands_to_run(page):
        printed.append(checkout.run(shortened(command)))
        for path in named_outputs(command):
            assert (checkout.root / path).exists(), f"{command} did not write {path}"
    for path in PROMISES.get(name, ()):
        assert (checkout.root / path).is_file(), f"{name} promises {path}"
    if name == "docs/demo.md":
        check_json_answer(page, "".join(printed))


def check_json_answer(page: Path, printed: str) -> None:
    """The answer has the fields of the one that is shown."""
    (shown,) = [json.loads(b.text) for b in fenced_blocks(page.read_text()) if b.language == "json"]
    (answer,) = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    assert {**answer, "detections": []} == {**shown, "detections": []}
    for detections in (answer["detections"], shown["detections"]):
        assert all(each.keys() == {"class", "score", "box_xyxy"} for each in detections)


def run_python(page: Path, checkout: Checkout) -> None:
    blocks = [b.text for b in fenced_blocks(page.read_text()) if b.language == "python"]
    assert blocks
    (checkout.root / "page.py").write_text("\n".join(blocks))
    checkout.run("python page.py")


def test_the_python_api(checkout):
    run_python(ROOT / "docs" / "python_api.md", checkout)  # has no commands
    assert (checkout.root / "output" / "drawn.png").is_file()


def test_what_is_promised_is_run():
    assert set(PROMISES) <= {name_of(page) for page in PAGES_THAT_RUN}
    lines = [command.source for page in PAGES for command in commands_of(page)]
    for part in (*NOT_RUN, *RUN):
        assert any(part in line for line in lines), f"no command of the pages has {part!r}"
