"""tools/cache_teacher.py: what it writes, resuming after a kill, and training without CLIP."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image
from torchvision.ops import box_iou

from hierkd.inference.predictor import OpenVocabularyPredictor
from hierkd.load_config import load_config
from hierkd.teachers.clip import build_teacher
from hierkd.teachers.region_cache import RegionCache, RegionCacheWriter
from log_handlers import exit_status
from tiny_training import (
    BASE,
    PICTURES,
    call_main,
    command_line,
    miniature_at,
    write_clip,
    write_run,
    write_world,
)
from tools import cache_teacher

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with a world and a CLIP."""
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    write_clip(folder / "clip.pt")
    return folder


def tool_arguments(world: Path, output: Path, *extra: str) -> list[str]:
    """The training's command line as the tool takes it, two images a chunk."""
    overrides = ("MODEL.IKD.BOXES", "gt", "MODEL.TEACHER.TEXT_CACHE_DIR", str(world / "texts"))
    training = command_line(world / "output", world / "clip.pt", *overrides)
    flags = ["--output", str(output), "--images-per-chunk", "2", "--threads", "1"]
    return [*training[:2], *flags, *training[2:], *extra]


@pytest.fixture(scope="module")
def folder(world) -> Path:
    """A finished cache."""
    with miniature_at(world):
        assert exit_status(cache_teacher.main, *tool_arguments(world, world / "cache")) == 0
    return world / "cache"


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def test_rows_are_clips_own_of_the_image_and_its_mirror_image(world, folder) -> None:
    arguments = tool_arguments(world, folder)
    cfg = load_config(arguments[1], [*arguments[8:]])
    teacher, cache = build_teacher(cfg), RegionCache(folder)
    boxes = 0
    for number, objects in enumerate(PICTURES, start=1):
        picture = np.array(Image.open(world / "miniature" / "train" / f"{number}.png"))
        for place, (name, (x0, y0, x1, y1)) in enumerate(objects):
            if name not in BASE:
                continue
            boxes += 1
            for flipped, (left, right) in enumerate(((x0, x1), (96 - x1, 96 - x0))):
                pixels = picture[:, ::-1].copy() if flipped else picture
                image = torch.from_numpy(pixels).permute(2, 0, 1)
                box = torch.tensor([[left, y0, right, y1]], dtype=torch.float32)
                (expected,) = teacher.encode_regions([image], [box], 1.5)
                (found,) = cache.regions(np.array([100 * number + place]), flipped=flipped > 0)
                assert float(expected @ torch.from_numpy(found)) > 0.9999
    assert cache.contents.num_boxes == boxes
    texts = ["a photo of background.", f"a photo of a {BASE[0]}.", f"a picture of {BASE[0]}."]
    found_texts = cache.texts(texts)
    for text in texts:
        expected = teacher.encode_captions([text])[0]
        assert float(expected @ torch.from_numpy(found_texts[text])) > 0.9999


KILLED = """
import os, signal, sys
from hierkd.teachers.region_cache import RegionCacheWriter
write, calls = RegionCacheWriter._write, []
def kill_in_the_third_call(target, start, rows):
    calls.append(start)
    if len(calls) == 3:
        target[start] = 5.0  # part of a row reaches the file
        target.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    write(target, start, rows)
RegionCacheWriter._write = staticmethod(kill_in_the_third_call)
from tools import cache_teacher
cache_teacher.main(sys.argv[1:])
"""


def test_after_a_kill_it_goes_on_and_the_files_are_the_same(world, folder, tmp_path) -> None:
    arguments = tool_arguments(world, tmp_path / "cache")
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments],
        cwd=ROOT,
        env={**os.environ, "DETECTRON2_DATASETS": str(world), "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        timeout=300,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    progress = json.loads((tmp_path / "cache" / "progress.json").read_text())
    assert (progress["texts_done"] > 0, progress["boxes_done"]) == (True, 2)
    with pytest.raises(FileNotFoundError, match="not complete"):
        RegionCache(tmp_path / "cache")
    with miniature_at(world):
        assert exit_status(cache_teacher.main, *arguments) == 0
    assert digests(tmp_path / "cache") == digests(folder)


def test_a_broken_image_stops_the_tool_or_is_left_out(world, tmp_path, capsys) -> None:
    for name in ("miniature", "clip.pt"):
        copy = shutil.copytree if (world / name).is_dir() else shutil.copy
        copy(world / name, tmp_path / name)
    (tmp_path / "miniature" / "train" / "1.png").write_bytes(b"no picture")
    arguments = tool_arguments(tmp_path, tmp_path / "cache")
    with miniature_at(tmp_path):
        assert exit_status(cache_teacher.main, *arguments) == 2
        assert "train/1.png cannot be decoded" in capsys.readouterr().err
        skipping = ("DATALOADER.SKIP_BROKEN_IMAGES", "True")
        assert exit_status(cache_teacher.main, *arguments, *skipping) == 0
    cache = RegionCache(tmp_path / "cache")
    assert cache.regions(np.array([200, 300]), flipped=True).any(axis=1).all()
    with pytest.raises(ValueError, match=r"\[100\]"):  # of that image: training leaves it out, too
        cache.regions(np.array([200, 100]), flipped=True)


def metrics(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]


def train(world: Path, clip: Path, output: Path, *extra: str) -> dict[str, Any]:
    """Losses of the last iteration; the text cache is empty."""
    texts = ("MODEL.TEACHER.TEXT_CACHE_DIR", str(output / "texts"), "MODEL.IKD.BOXES", "gt")
    one_step = ("SOLVER.MAX_ITER", "3", "MODEL.IKD.IOU_THRESH", "0.0", "DATASETS.TEST", "()")
    with miniature_at(world):
        call_main(command_line(output, clip, *texts, *one_step, *extra))
    return metrics(output)[-1]


def test_training_with_the_cache_has_the_losses_of_training_with_clip(
    world, folder, tmp_path, monkeypatch
) -> None:
    clip = tmp_path / "clip.pt"
    shutil.copy(world / "clip.pt", clip)
    expected = train(world, clip, tmp_path / "clip_output")
    clip.unlink()  # from here on nothing can load CLIP
    opened, open_cache = [], RegionCache.__init__
    monkeypatch.setattr(
        RegionCache, "__init__", lambda self, at: (opened.append(at), open_cache(self, at))[1]
    )
    found = train(world, clip, tmp_path / "output", "MODEL.TEACHER.CACHE", str(folder))
    assert opened == [str(folder)]  # once: opening hashes the annotations and CLIP's weights
    losses = [key for key in expected if "loss" in key]
    assert {"loss_ikd", "loss_gkd_image", "loss_cls"} <= set(losses)
    assert found["num_distilled_regions"] == expected["num_distilled_regions"] > 0
    for key in losses:
        assert found[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-3), key


def test_proposals_are_embedded_once_and_distilled_without_clip(
    world, tmp_path, monkeypatch, capsys
) -> None:
    rpn, clip, cached = "configs/miniature/rpn.yaml", tmp_path / "clip.pt", tmp_path / "cache"
    shutil.copy(world / "clip.pt", clip)
    torch.manual_seed(0)
    weights = build_model(load_config(rpn, ["MODEL.DEVICE", "cpu"])).state_dict()
    torch.save({"model": weights}, tmp_path / "rpn.pth")
    two = ("MODEL.IKD.PROPOSALS_PER_IMAGE", "2")

    def fill(output: Path, *extra: str) -> int:
        with miniature_at(world):
            return exit_status(cache_teacher.main, *tool_arguments(world, output, *two, *extra))

    source = ("--proposals-from", rpn, str(tmp_path / "rpn.pth"))
    assert fill(tmp_path / "whole", *source) == 0
    write, calls = RegionCacheWriter.write_regions, []

    def fail_in_the_second_chunk(self: RegionCacheWriter, rows: Any) -> None:
        calls.append(len(rows))
        if len(calls) == 2:
            raise ValueError("no space")
        write(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(RegionCacheWriter, "write_regions", fail_in_the_second_chunk)
        assert fill(cached, *source) == 2
    assert fill(cached, *source) == 0
    assert digests(cached) == digests(tmp_path / "whole")

    arguments = tool_arguments(world, cached)
    teacher, cache = build_teacher(load_config(arguments[1], arguments[8:])), RegionCache(cached)
    for number, objects in enumerate(PICTURES, start=1):
        labelled = {100 * number + i: box for i, (name, box) in enumerate(objects) if name in BASE}
        picture = np.array(Image.open(world / "miniature" / "train" / f"{number}.png"))
        image = torch.from_numpy(picture).permute(2, 0, 1)
        for pixels, flipped in ((image, False), (image.flip(2), True)):
            corners, rows = cache.proposals(np.array([*labelled]), flipped=flipped)
            boxes = torch.from_numpy(corners)
            assert len(boxes) == 2
            assert box_iou(boxes, torch.tensor([*labelled.values()]).float()).max() < 0.3
            assert boxes.min() >= 0
            assert 48 < boxes.max() <= 96  # pixels of the picture
            if flipped:
                boxes = torch.stack(
                    [96 - boxes[:, 2], boxes[:, 1], 96 - boxes[:, 0], boxes[:, 3]], 1
                )
            expected = teacher.encode_regions([pixels], [boxes], 1.5)
            assert ((expected * torch.from_numpy(rows)).sum(dim=1) > 0.9999).all()

    clip.unlink()
    with_cache = (*two, "MODEL.TEACHER.CACHE", str(cached))
    later = train(world, clip, tmp_path / "later", *with_cache, "MODEL.IKD.PROPOSALS_START", "9")
    found = train(world, clip, tmp_path / "output", *with_cache)
    assert found["num_distilled_regions"] > later["num_distilled_regions"] > 0
    with pytest.raises(ValueError, match="proposals_per_image found 2, expected 0"):
        train(world, clip, tmp_path / "none", "MODEL.TEACHER.CACHE", str(cached))
    torch.save({"model": weights, "iteration": 1}, tmp_path / "rpn.pth")
    capsys.readouterr()
    for extra, message in (
        (source, "proposals_sha256: found"),
        ((), "MODEL.IKD.PROPOSALS_PER_IMAGE is 2: expected --proposals-from"),
        (("--proposals-from", arguments[1], source[2]), "'HierKD', expected 'ProposalNetwork'"),
    ):
        assert fill(cached, *extra) == 2
        assert message in capsys.readouterr().err


def test_detecting_asks_the_cache_for_texts_alone(world, folder, tmp_path) -> None:
    clip = tmp_path / "clip.pt"
    shutil.copy(world / "clip.pt", clip)
    texts = ("MODEL.TEACHER.TEXT_CACHE_DIR", str(tmp_path / "texts"))
    with miniature_at(world):
        run = write_run(tmp_path / "run", clip)
        clip.unlink()
        # neither boxes nor crops are those of the cache: training would be refused
        cached = (*texts, "MODEL.TEACHER.CACHE", str(folder), "MODEL.IKD.CROP_SCALE", "1.2")
        predictor = OpenVocabularyPredictor.from_checkpoint(run, opts=cached)
        predictor.set_vocabulary(BASE)
        predictor.predict(world / "miniature" / "val" / "1.png")
        with pytest.raises(FileNotFoundError, match=r"does not hold .a photo of a zebra"):
            predictor.set_vocabulary(["zebra"])


def test_wrong_input_ends_with_a_message(world, folder, tmp_path, capsys) -> None:
    with miniature_at(world):
        other = tool_arguments(world, folder, "MODEL.IKD.CROP_SCALE", "1.2")
        assert exit_status(cache_teacher.main, *other) == 2
        assert "crop_scale: found 1.5, expected 1.2" in capsys.readouterr().err
        gone = tool_arguments(world, tmp_path / "x", "MODEL.TEACHER.WEIGHTS", "/gone.pt")
        assert exit_status(cache_teacher.main, *gone) == 2
        assert "/gone.pt" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cache_teacher.main([*tool_arguments(world, tmp_path / "x"), "--images-per-chunk", "0"])
