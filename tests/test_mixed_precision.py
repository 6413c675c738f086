"""Half precision against float32: the losses hardly move.

On a CPU autocast computes in bfloat16 what it computes in float16 on a GPU.
"""

import json
import shutil
from typing import Any

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

import tiny_training
from hierkd.load_config import load_config
from hierkd.modeling.detector import HierKD

SIZE = 96
CLASSES = ("dog", "cat", "car", "cup")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> HierKD:
    """The miniature's detector, smaller, with a random CLIP."""
    folder = tmp_path_factory.mktemp("mixed_precision")
    clip = tiny_training.write_clip(folder / "clip.pt")
    # every positive is distilled, so that the same ones are in both precisions
    distilled = ("MODEL.IKD.IOU_THRESH", "0.0", "MODEL.IKD.MAX_CROPS_PER_IMAGE", "0")
    pairs = ("MODEL.TEACHER.TEXT_CACHE_DIR", str(folder), "DATASETS.TRAIN", "()", *distilled)
    arguments = tiny_training.command_line(folder, clip, *pairs)
    cfg = load_config(tiny_training.CONFIG, arguments[2:])
    torch.manual_seed(0)
    built = build_model(cfg)
    built.set_vocabulary(CLASSES)
    return built


def batch() -> list[dict[str, Any]]:
    rng = torch.Generator().manual_seed(3)
    inputs = []
    for number, boxes in enumerate(([[4, 4, 60, 66], [30, 20, 90, 80]], [[10, 14, 72, 76]])):
        instances = Instances((SIZE, SIZE))
        instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32))
        instances.gt_classes = torch.arange(len(boxes)) + number
        image = torch.randint(0, 256, (3, SIZE, SIZE), dtype=torch.uint8, generator=rng)
        caption = f"a photo of {CLASSES[number]}."
        inputs.append({"image": image, "instances": instances, "caption": caption})
    return inputs


def losses(model: HierKD, half: bool) -> dict[str, torch.Tensor]:
    model.train()
    torch.manual_seed(1)  # of the sampled negatives
    with EventStorage(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        return model(batch())


def test_losses_are_those_of_float32_but_for_rounding(model):
    exact, half = losses(model, half=False), losses(model, half=True)
    assert exact.keys() == half.keys()
    assert exact["loss_ikd"] > 0
    for name, loss in exact.items():
        torch.testing.assert_close(half[name], loss, rtol=0.03, atol=1e-3, msg=name)
    assert any(half[name] != loss for name, loss in exact.items())  # it was not float32 twice


@pytest.mark.gpu
def test_training_with_amp_on_a_gpu_follows_float32_also_resumed(tmp_path):
    """The same four steps without SOLVER.AMP.ENABLED, with it, and interrupted after two."""
    last, ends = {}, {}
    with tiny_training.prepared(tmp_path):
        for name in ("float32", "amp", "resumed"):
            output = tmp_path / name
            keys = {"MODEL.DEVICE": "cuda", "SOLVER.AMP.ENABLED": name != "float32", "SEED": 0}
            pairs = [str(each) for pair in keys.items() for each in pair]
            if name == "resumed":
                output.mkdir()
                shutil.copy(tmp_path / "amp" / "model_0000001.pth", output)
                (output / "last_checkpoint").write_text("model_0000001.pth")
                pairs = ["--resume", *pairs]
            tiny_training.call_main(
                tiny_training.command_line(output, tmp_path / "clip.pt", *pairs)
            )
            lines = (output / "metrics.json").read_text().splitlines()
            last[name] = next(m for m in map(json.loads, lines) if "total_loss" in m)
            ends[name] = torch.load(output / "model_final.pth", weights_only=True)
    assert last["amp"]["total_loss"] == pytest.approx(last["float32"]["total_loss"], rel=0.1)
    amp, resumed = (ends[name]["trainer"]["_trainer"] for name in ("amp", "resumed"))
    assert resumed["grad_scaler"] == amp["grad_scaler"]  # it counts the steps
    for name, weights in ends["amp"]["model"].items():  # a GPU adds in any order
        torch.testing.assert_close(ends["resumed"]["model"][name], weights, rtol=0.01, atol=0.01)
