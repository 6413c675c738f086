"""What bad input gets: an error before the first step that names the file or key and what to do.

Each case goes through ``train_net.main``; the checks themselves are tested with their modules, an
unusable vocabulary with ``demo.py``.
"""

import json
import re
import runpy
import sys
import urllib.request
from pathlib import Path
from urllib.error import URLError

import pytest
import torch

import tiny_training
import train_net
from hierkd.checkpoint import HierKDCheckpointer
from tiny_training import BASE, call_main, command_line

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A CLIP file, and a text cache of its own for all tests of this module."""
    folder = tmp_path_factory.mktemp("clip")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HIERKD_CACHE", str(folder / "cache"))
        patch.setenv("PYTHONHASHSEED", "0")  # detectron2 sets it; undone with the rest
        yield tiny_training.write_clip(folder / "clip.pt")


@pytest.fixture
def world(tmp_path):
    """The folder of a fresh world, for a test to spoil."""
    tiny_training.write_world(tmp_path)
    with tiny_training.miniature_at(tmp_path):
        yield tmp_path / "miniature"


@pytest.fixture
def run(world, clip):
    """One iteration of training, or ``--eval-only``; returns the log."""

    def _run(*extra):
        output = world / "output"
        call_main(command_line(output, clip, *extra, "SOLVER.MAX_ITER", "1"))
        return (output / "log.txt").read_text()

    return _run


@pytest.fixture
def refused(run, monkeypatch):
    """The message of the error that comes instead of a first step."""

    def _refused(*extra, error=ValueError):
        def trained(self):
            pytest.fail("training started")

        monkeypatch.setattr(train_net.Trainer, "run_step", trained)
        with pytest.raises(error) as caught:
            run(*extra)
        return str(caught.value)

    return _refused


def edit(json_file, change):
    content = json.loads(json_file.read_text())
    change(content)
    json_file.write_text(json.dumps(content))


def truncate(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def test_the_unspoiled_world_trains(run):
    assert "Loaded 6 images with 7 boxes" in run()


# ------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("part", ["train", "val"])
def test_missing_image_folder(world, refused, part):
    (world / part).rename(world / "elsewhere")
    message = refused(error=FileNotFoundError)
    assert f"Image folder {world / part} does not exist" in message


@pytest.mark.parametrize("part", ["train", "val"])
def test_missing_image(world, refused, part):
    (world / part / "3.png").unlink()
    message = refused(error=FileNotFoundError)
    assert f"1 of 6 images do not exist in {world / part}: '3.png'" in message


@pytest.mark.parametrize("name", ["train_base", "val_novel", "val_all"])
def test_missing_json(world, refused, name):
    json_file = world / "annotations" / f"{name}.json"
    json_file.unlink()
    assert f"Annotation file {json_file} does not exist" in refused(error=FileNotFoundError)


@pytest.mark.parametrize("name", ["train_base", "val_all"])
def test_broken_json(world, refused, name):
    json_file = world / "annotations" / f"{name}.json"
    truncate(json_file)
    message = refused()
    assert f"{json_file} is not valid JSON" in message
    assert "line 1 column " in message


@pytest.mark.parametrize("name", ["train_base", "val_all"])
def test_missing_category(world, refused, name):
    json_file = world / "annotations" / f"{name}.json"

    def forget(content):
        gone = next(c for c in content["categories"] if c["name"] == BASE[1])
        content["categories"].remove(gone)
        boxes = content["annotations"]
        content["annotations"] = [box for box in boxes if box["category_id"] != gone["id"]]

    edit(json_file, forget)
    message = refused()
    assert str(json_file) in message
    assert BASE[1] in message


@pytest.mark.parametrize("part", ["train", "val"])
def test_image_that_cannot_be_decoded(world, refused, part):
    truncate(world / part / "2.png")
    message = refused()
    assert "1 of 6 images cannot be decoded" in message
    assert str(world / part / "2.png") in message
    if part == "train":
        assert "DATALOADER.SKIP_BROKEN_IMAGES True" in message


def test_broken_training_images_are_skipped_by_key(world, run):
    truncate(world / "train" / "2.png")
    log = run("DATALOADER.SKIP_BROKEN_IMAGES", "True")
    assert f"Skipped: 1 of 6 images cannot be decoded, first: {world}/train/2.png" in log


def test_broken_images_are_named_and_never_skipped_in_evaluation(world, refused, monkeypatch):
    truncate(world / "val" / "2.png")
    monkeypatch.setattr(HierKDCheckpointer, "check_trained", lambda self: None)
    message = refused("--eval-only", "DATALOADER.SKIP_BROKEN_IMAGES", "True")
    assert f"{world}/val/2.png" in message


# -------------------------------------------------------------------------------------- annotations


@pytest.mark.parametrize("captions", [None, [], ["  "]])
def test_image_without_a_caption(world, refused, captions):
    json_file = world / "annotations" / "train_base.json"

    def forget(content):
        if captions is None:
            del content["images"][3]["captions"]
        else:
            content["images"][3]["captions"] = captions

    edit(json_file, forget)
    message = refused()
    assert str(json_file) in message
    assert f"{world}/train/4.png" in message
    assert "MODEL.GKD.LOSS_WEIGHT 0.0" in message


def test_no_captions_are_needed_without_gkd(world, run):
    def forget(content):
        for image in content["images"]:
            del image["captions"]

    edit(world / "annotations" / "train_base.json", forget)
    run("MODEL.GKD.LOSS_WEIGHT", "0.0")


def test_boxes_are_clipped_or_dropped_and_counted(world, run):
    json_file = world / "annotations" / "train_base.json"
    boxes = [[4, 4, 0, 60], [20, 24, 68, -1], [200, 8, 64, 64], [8, 30, 500, 64]]

    def spoil(content):
        for annotation, box in zip(content["annotations"], boxes, strict=False):
            annotation["bbox"] = box

    edit(json_file, spoil)
    assert (
        f"Loaded 6 images with 4 boxes from {json_file}; clipped 1 boxes to their image, dropped 3 "
        "(2 without area, 1 outside, 0 non-finite)."
    ) in run()


# ------------------------------------------------------------------------------- CLIP and weights


def test_clip_of_another_embedding_size(refused, clip):
    message = refused("MODEL.TEXT_CLASSIFIER.EMBED_DIM", "512")
    assert "MODEL.TEXT_CLASSIFIER.EMBED_DIM is 512" in message
    assert f"embeddings of size {tiny_training.EMBED_DIM}" in message
    assert str(clip) in message


@pytest.mark.parametrize("flags", [(), ("--eval-only",)])
def test_checkpoint_of_another_embedding_size(refused, tmp_path, flags):
    checkpoint = tmp_path / "other.pth"
    torch.save({"model": {"text_classifier.background_embedding": torch.zeros(24)}}, checkpoint)
    message = refused(*flags, "MODEL.WEIGHTS", str(checkpoint))
    assert str(checkpoint) in message
    assert f"embeddings have 24 dimensions, this detector's {tiny_training.EMBED_DIM}" in message
    assert "MODEL.TEXT_CLASSIFIER.EMBED_DIM" in message


def test_unknown_clip(refused):
    message = refused("MODEL.TEACHER.WEIGHTS", "ViT-X/7", error=FileNotFoundError)
    assert "MODEL.TEACHER.WEIGHTS: 'ViT-X/7'" in message
    assert "ViT-B/32" in message


def test_file_that_is_no_clip(refused, tmp_path):
    (tmp_path / "other.pt").write_bytes(b"no weights")
    message = refused("MODEL.TEACHER.WEIGHTS", str(tmp_path / "other.pt"))
    assert f"{tmp_path}/other.pt cannot be read as a CLIP" in message


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def test_no_network_for_clip(refused, no_network, tmp_path, monkeypatch):
    monkeypatch.setenv("HIERKD_CACHE", str(tmp_path / "cold"))
    message = refused(
        *("MODEL.TEACHER.WEIGHTS", "RN50", "MODEL.TEACHER.DOWNLOAD_ROOT", str(tmp_path)),
        *("MODEL.TEXT_CLASSIFIER.EMBED_DIM", "1024"),
        error=FileNotFoundError,
    )
    assert "no route to host" in message
    assert re.search(r"download https://\S+RN50\.pt to ", message)
    assert f"{tmp_path}/RN50.pt" in message
    assert "MODEL.TEACHER.WEIGHTS" in message


def test_no_network_for_the_backbone(refused, no_network, tmp_path, monkeypatch):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    weights = "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
    message = refused("MODEL.WEIGHTS", weights, error=ConnectionError)
    assert f"MODEL.WEIGHTS: could not download '{weights}'" in message
    assert "no route to host" in message
    assert "pass its path as MODEL.WEIGHTS" in message


@pytest.mark.parametrize("flags", [(), ("--eval-only",)])
def test_missing_weights(refused, flags):
    message = refused(*flags, "MODEL.WEIGHTS", "gone/model.pth", error=FileNotFoundError)
    assert "MODEL.WEIGHTS: no file 'gone/model.pth'" in message


# ------------------------------------------------------------------------------------ command line


def command(monkeypatch, *arguments):
    """Run train_net.py as a script, in this process."""
    monkeypatch.setattr(sys, "argv", ["train_net.py", *map(str, arguments)])
    with tiny_training.own_log_handlers():
        runpy.run_path(str(ROOT / "train_net.py"), run_name="__main__")


def told(monkeypatch, capsys, *arguments):
    """The one line that train_net.py as a script ends with, with status 2."""
    with pytest.raises(SystemExit) as ended:
        command(monkeypatch, *arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_unknown_key_on_the_command_line(monkeypatch, capsys):
    said = told(monkeypatch, capsys, "--config-file", tiny_training.CONFIG, "MODEL.IKD.WEIGHT", 1)
    assert re.search(r"error: KEY VALUE pair.*MODEL\.IKD\.WEIGHT", said)


def test_unknown_key_in_the_yaml(monkeypatch, capsys, tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text(f"_BASE_: {ROOT / tiny_training.CONFIG}\nMODEL:\n  IKD:\n    WEIGHT: 1.0\n")
    said = told(monkeypatch, capsys, "--config-file", config)
    assert re.search(r"error: .*mine\.yaml.*MODEL\.IKD\.WEIGHT", said)


def test_missing_config(monkeypatch, capsys, tmp_path):
    said = told(monkeypatch, capsys, "--config-file", tmp_path / "gone.yaml")
    assert re.search(r"error: --config-file: no file .*gone\.yaml", said)


@pytest.mark.parametrize("extra", [1, 100])
def test_more_gpus_than_there_are(monkeypatch, extra):
    available = torch.cuda.device_count()
    wanted = max(available, 1) + extra
    with pytest.raises(SystemExit, match=f"--num-gpus {wanted}: .* {available} CUDA devices"):
        command(
            monkeypatch,
            *("--config-file", tiny_training.CONFIG, "--num-gpus", wanted, "MODEL.DEVICE", "cuda"),
        )
