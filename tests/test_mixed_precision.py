"""Half precision against float32: what stays float32, and that the losses hardly move.

On a CPU autocast computes in bfloat16 what it computes in float16 on a GPU.
"""

import json
from collections import defaultdict
from typing import Any

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from torch.utils._python_dispatch import TorchDispatchMode

import tiny_training
from hierkd.load_config import load_config
from hierkd.modeling import inference
from hierkd.modeling.detector import HierKD

SIZE = 96
CLASSES = ("dog", "cat", "car", "cup")
HALF = (torch.bfloat16, torch.float16)
# What may run in half precision: convolutions, what lies between two of them, and conversions.
BETWEEN_CONVOLUTIONS = {
    "convolution",
    "mkldnn_convolution",
    "native_batch_norm",
    "relu",
    "relu_",
    "add",
    "add_",
    "max_pool2d_with_indices",
    "upsample_nearest2d",
    "_to_copy",
    "clone",
    "detach",
    "view",
    "empty_like",
}


class DtypeRecorder(TorchDispatchMode):
    """Notes in which precision every operation below autocast ran."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, set[torch.dtype]] = defaultdict(set)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        results = result if isinstance(result, tuple | list) else (result,)
        for each in (*args, *results):
            for tensor in each if isinstance(each, tuple | list) else (each,):
                if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                    self.seen[func.overloadpacket.__name__].add(tensor.dtype)
        return result

    def in_half(self) -> set[str]:
        return {name for name, dtypes in self.seen.items() if dtypes.intersection(HALF)}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> HierKD:
    """The miniature's detector, smaller, with a random CLIP."""
    folder = tmp_path_factory.mktemp("mixed_precision")
    clip = tiny_training.write_clip(folder / "clip.pt")
    small = {
        "MODEL.WEIGHTS": "",
        "MODEL.TEACHER.WEIGHTS": clip,
        "MODEL.TEACHER.TEXT_CACHE_DIR": folder / "cache",
        "MODEL.TEXT_CLASSIFIER.EMBED_DIM": tiny_training.EMBED_DIM,
        "MODEL.SLIM_RESNET.WIDTHS": [8, 12, 16, 20],
        "MODEL.FPN.OUT_CHANNELS": 16,
        # every positive is distilled, so that the same ones are in both precisions
        "MODEL.IKD.IOU_THRESH": 0.0,
        "MODEL.IKD.MAX_CROPS_PER_IMAGE": 0,
        "DATASETS.TRAIN": "()",
    }
    overrides = [str(each) for pair in small.items() for each in pair]
    cfg = load_config(tiny_training.CONFIG, overrides)
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


def test_all_but_the_convolutions_stays_float32_in_training(model):
    with DtypeRecorder() as recorder:
        found = losses(model, half=True)
    assert any("conv" in name for name in recorder.in_half())  # autocast was at work
    assert recorder.in_half() <= BETWEEN_CONVOLUTIONS
    # normalise; cosines (of anchors, patches and CLIP); softmax; the two sides of the IoUs
    for name in ("linalg_vector_norm", "mm", "bmm", "_log_softmax", "_softmax", "minimum"):
        assert recorder.seen[name] == {torch.float32}, name
    assert {loss.dtype for loss in found.values()} == {torch.float32}


@pytest.mark.parametrize("in_blocks", [False, True])
def test_all_but_the_convolutions_stays_float32_at_inference(model, in_blocks, monkeypatch):
    model.eval()
    if in_blocks:
        monkeypatch.setattr(inference, "_BLOCK_ELEMENTS", 1)
        monkeypatch.setattr(inference, "_MIN_BLOCK_ROWS", 20)
    recorder = DtypeRecorder()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), recorder:
        outputs = model([{"image": each["image"]} for each in batch()])
    assert any("conv" in name for name in recorder.in_half())
    assert recorder.in_half() <= BETWEEN_CONVOLUTIONS
    for name in ("linalg_vector_norm", "mm", "_softmax", "nms"):
        assert recorder.seen[name] == {torch.float32}, name
    for output in outputs:
        assert len(output["instances"]) > 0
        assert output["instances"].scores.dtype == torch.float32
        assert output["instances"].pred_boxes.tensor.dtype == torch.float32


def test_losses_are_those_of_float32_but_for_rounding(model):
    exact, half = losses(model, half=False), losses(model, half=True)
    assert exact.keys() == half.keys()
    assert exact["loss_ikd"] > 0
    for name, loss in exact.items():
        torch.testing.assert_close(half[name], loss, rtol=0.03, atol=1e-3, msg=name)
    assert any(half[name] != loss for name, loss in exact.items())  # it was not float32 twice


@pytest.mark.gpu
def test_training_with_amp_on_a_gpu_follows_float32(tmp_path, monkeypatch):
    """The same four steps with and without SOLVER.AMP.ENABLED."""
    tiny_training.write_world(tmp_path)
    clip = tiny_training.write_clip(tmp_path / "clip.pt")
    monkeypatch.setenv("HIERKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONHASHSEED", "0")  # detectron2 sets it; undone with the rest
    last = {}
    with tiny_training.miniature_at(tmp_path):
        for amp in (False, True):
            output = tmp_path / str(amp)
            keys = {"MODEL.DEVICE": "cuda", "SOLVER.AMP.ENABLED": amp, "SEED": 0}
            pairs = [str(each) for pair in keys.items() for each in pair]
            tiny_training.call_main(tiny_training.command_line(output, clip, *pairs))
            lines = (output / "metrics.json").read_text().splitlines()
            last[amp] = next(m for m in map(json.loads, lines) if "total_loss" in m)
    assert last[True]["total_loss"] == pytest.approx(last[False]["total_loss"], rel=0.1)
