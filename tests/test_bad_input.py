"""What bad input gets: one line before the first step, and status 2.

Each case is a whole command line; the checks themselves are tested with their modules.
"""

import json

import pytest
import torch

import tiny_training
import train_net
from hierkd.checkpoint import HierKDCheckpointer
from hierkd.training.trainer import Trainer
from tiny_training import BASE, call_main, command_line


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


def edit(json_file, change):
    content = json.loads(json_file.read_text())
    change(content)
    json_file.write_text(json.dumps(content))


def truncate(path):
    path.write_bytes(path.read_bytes()[:400])


def forget_a_category(world):
    def forget(content):
        gone = next(c for c in content["categories"] if c["name"] == BASE[1])
        content["categories"].remove(gone)
        boxes = content["annotations"]
        content["annotations"] = [box for box in boxes if box["category_id"] != gone["id"]]

    edit(world / "annotations" / "val_all.json", forget)


def forget_captions(world):
    path = world / "annotations" / "train_base.json"
    edit(path, lambda content: content["images"][3].update(captions=["  "]))


def all_crowd(world):
    def spoil(content):
        for box in content["annotations"]:
            box["iscrowd"] = 1

    edit(world / "annotations" / "train_base.json", spoil)


def write_other_checkpoint(world):
    content = {"model": {"text_classifier.background_embedding": torch.zeros(24)}}
    torch.save(content, world / "other.pth")


def write_config(world):
    (world / "mine.yaml").write_text("MODEL:\n  IKD:\n    WEIGHT: 1.0\n")


# What is spoiled, what the command line has more, and what the line must name.
CASES = {
    "no images": (lambda w: (w / "train").rename(w / "x"), [], "{world}/train does not exist"),
    "no image": (lambda w: (w / "val" / "3.png").unlink(), [], "{world}/val: '3.png'"),
    "half an image": (lambda w: truncate(w / "train" / "2.png"), [], "{world}/train/2.png"),
    "half of the annotations": (
        lambda w: truncate(w / "annotations" / "train_base.json"),
        [],
        "{world}/annotations/train_base.json is not valid JSON",
    ),
    "no category": (forget_a_category, [], BASE[1]),
    "crowd alone": (all_crowd, [], "{world}/annotations/train_base.json: no image has a box to"),
    "no caption": (forget_captions, [], "{world}/train/4.png"),
    "another CLIP": (None, ["MODEL.TEXT_CLASSIFIER.EMBED_DIM", "512"], "EMBED_DIM is 512"),
    "no CLIP": (None, ["MODEL.TEACHER.WEIGHTS", "ViT-X/7"], "MODEL.TEACHER.WEIGHTS: 'ViT-X/7'"),
    "another detector": (
        write_other_checkpoint,
        ["--eval-only", "MODEL.WEIGHTS", "{world}/other.pth"],
        "{world}/other.pth: its embeddings have 24 dimensions",
    ),
    "no weights": (None, ["MODEL.WEIGHTS", "gone.pth"], "MODEL.WEIGHTS: no file 'gone.pth'"),
    "no dataset": (None, ["DATASETS.TRAIN", "('miniature_ovd_bas',)"], "'miniature_ovd_bas'"),
    "no key": (None, ["SOLVR.BASE_LR", "1.0"], "SOLVR.BASE_LR; did you mean SOLVER.BASE_LR?"),
    "no key in the file": (write_config, ["--config-file={world}/mine.yaml"], "mine.yaml"),
    "no pair": (None, ["SEED=1"], "'SEED=1': expected KEY VALUE"),
    "no folder": (None, ["OUTPUT_DIR", "README.md"], "README.md"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_line_names_it(world, clip, monkeypatch, capsys, case):
    def trained(self):
        pytest.fail("training started")

    monkeypatch.setattr(Trainer, "run_step", trained)
    spoil, options, named = CASES[case]
    if spoil:
        spoil(world)
    options = [each.format(world=world) for each in options]
    with pytest.raises(SystemExit) as ended:
        train_net.command(command_line(world / "output", clip, *options))
    assert ended.value.code == 2
    (line,) = [each for each in capsys.readouterr().err.splitlines() if "train_net.py" in each]
    assert line.startswith("train_net.py: error: ")
    assert named.format(world=world) in line


def test_missing_data_is_found_before_anything_is_written_or_logged(world, clip, capfd):
    (world / "annotations" / "val_all.json").unlink()
    with pytest.raises(SystemExit):
        train_net.command(command_line(world / "output", clip))
    assert not (world / "output").exists()
    said = capfd.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)


def test_what_can_be_mended_is_mended_and_counted(world, clip):
    truncate(world / "train" / "5.png")
    json_file = world / "annotations" / "train_base.json"
    boxes = [[4, 4, 0, 60], [20, 24, 68, -1], [200, 8, 64, 64], [8, 30, 500, 64]]

    def spoil(content):
        for annotation, box in zip(content["annotations"], boxes, strict=False):
            annotation["bbox"] = box

    edit(json_file, spoil)
    mended = ("DATALOADER.SKIP_BROKEN_IMAGES", "True")
    call_main(command_line(world / "output", clip, *mended, "SOLVER.MAX_ITER", "1"))
    log = (world / "output" / "log.txt").read_text()
    assert (
        f"Loaded 6 images with 4 boxes from {json_file}; clipped 1 boxes to their image, dropped 3 "
        "(2 without area, 1 outside, 0 non-finite)."
    ) in log
    assert f"images cannot be decoded, first: {world}/train/5.png" in log


def test_broken_images_are_never_skipped_in_an_evaluation(world, clip, monkeypatch):
    truncate(world / "val" / "2.png")
    monkeypatch.setattr(HierKDCheckpointer, "check_trained", lambda self: None)
    options = ("--eval-only", "DATALOADER.SKIP_BROKEN_IMAGES", "True")
    with pytest.raises(ValueError, match=r"val/2\.png"):
        call_main(command_line(world / "output", clip, *options))
