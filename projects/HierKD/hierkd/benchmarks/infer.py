"""HierKD from picture to detections against detectron2's RetinaNet, alone and in batches.

Random weights and one random picture. RetinaNet is the model zoo's ``retinanet_R_50_FPN_1x`` as it
is, with one number changed: its classification bias is moved so that as many (box, class) pairs
pass its score threshold on this picture as HierKD sends to NMS, which random weights would not do.
Both keep 100 detections. The rows below HierKD's show what MODEL.CHANNELS_LAST, TEST.AMP and
TEST.COMPILE change; compiling takes a minute or two before anything is timed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from detectron2.modeling import build_model
from torch import Tensor, nn

from hierkd.benchmarks.timing import (
    Report,
    measure,
    median,
    peak_memory,
    random_hierkd,
    ratio,
    tame,
)

__all__ = ["random_retinanet", "run"]

_AMP = ("TEST.AMP.ENABLED", "True")
_COMPILE = ("TEST.COMPILE", "True")
# Name to the KEY VALUE pairs on top of the config.
_VARIANTS = {
    "HierKD": (),
    "HierKD, contiguous": ("MODEL.CHANNELS_LAST", "False"),
    "HierKD, AMP": _AMP,
    "HierKD, compiled": _COMPILE,
    "HierKD, compiled, AMP": (*_AMP, *_COMPILE),
}
_RETINANET = "RetinaNet"


def run(
    device: torch.device,
    *,
    rounds: int | None,
    size: tuple[int, int] | None,
    batch: int,
    classes: int,
    compiled: bool,
    config_file: str,
) -> Report:
    """Time one picture, and a batch of it, with each variant.

    ``size`` is (height, width) of the picture; None: 800 x 1333 on a GPU, 320 x 533 on a CPU.
    ``classes`` is the number of names in HierKD's vocabulary.
    """
    gpu = device.type == "cuda"
    height, width = size or ((800, 1333) if gpu else (320, 533))
    inputs = [{"image": torch.randint(0, 256, (3, height, width), dtype=torch.uint8)}]
    models: dict[str, Any] = {
        name: random_hierkd(config_file, classes, device, opts).eval()
        for name, opts in _VARIANTS.items()
        if compiled or _COMPILE[0] not in opts
    }
    models[_RETINANET] = random_retinanet(device)
    notes = []
    with torch.inference_mode():
        pairs = models["HierKD"].inference_settings.topk_pairs
        balance_retinanet(models[_RETINANET], inputs, pairs)
        for name, model in list(models.items()):
            model(inputs)  # compiles
            if _COMPILE[0] in _VARIANTS.get(name, ()) and not model.compile_test:
                del models[name]
                notes.append(f"{name}: torch.compile does not work here, see the log.")
        rows = _rows(models, inputs, batch, rounds or (20 if gpu else 5), device)
    return Report(
        "Inference",
        device,
        {
            "picture": f"{height} x {width}",
            "classes": classes,
            "batch": batch,
            "pairs to NMS": pairs,
        },
        rows,
        [
            "Seconds and memory are those of one picture; of a batch, its time divided by its size "
            "and its whole memory. Memory comes on top of the weights.",
            f"AMP is {'float16' if gpu else 'bfloat16'}; RetinaNet runs as it comes, in float32 "
            "and contiguous order.",
            *notes,
        ],
    )


def random_retinanet(device: torch.device) -> nn.Module:
    """Build detectron2's own RetinaNet-R50-FPN in inference mode, with random weights."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
        from detectron2 import model_zoo
    cfg = model_zoo.get_config("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    cfg.MODEL.DEVICE = str(device)
    model: nn.Module = build_model(cfg)
    tame(model)
    return model.eval()


def balance_retinanet(model: nn.Module, inputs: list[dict[str, Tensor]], pairs: int) -> None:
    """Move the classification bias so that ``pairs`` scores of a picture pass the threshold."""
    detector: Any = model
    features = detector.backbone(detector.preprocess_image(inputs).tensor)
    logits, _ = detector.head([features[f] for f in detector.head_in_features])
    flat = torch.cat([of_level.flatten() for of_level in logits])
    last = flat.topk(min(pairs + 1, len(flat))).values[-1]
    threshold = detector.test_score_thresh
    detector.head.cls_score.bias.data += math.log(threshold / (1 - threshold)) - last


def _rows(
    models: Mapping[str, Any],
    inputs: list[dict[str, Tensor]],
    size: int,
    rounds: int,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Time every model on one picture, and those that are not compiled on a batch of it."""
    jobs = {name: (model, inputs) for name, model in models.items()}
    for name, model in models.items():
        if _COMPILE[0] not in _VARIANTS.get(name, ()):
            jobs[f"{name}, batch of {size}"] = model, inputs * size
    calls = {name: (lambda m=m, given=given: m(given)) for name, (m, given) in jobs.items()}
    times = measure(calls, device, rounds)
    return [
        {
            "detector": name,
            "seconds": median(times[name]) / len(jobs[name][1]),
            "over RetinaNet": ratio(times[name], times[_RETINANET]) / len(jobs[name][1]),
            "over HierKD": ratio(times[name], times["HierKD"]) / len(jobs[name][1]),
            "peak MiB": peak_memory(calls[name], device),
        }
        for name in sorted(jobs, key=lambda name: not name.startswith(_RETINANET))
    ]
