"""HierKD from picture to detections against detectron2's RetinaNet, alone and in batches.

Random weights and one random picture. RetinaNet is the model zoo's ``retinanet_R_50_FPN_1x`` as it
is, with one number changed: its classification bias is moved so that as many (box, class) pairs
pass its score threshold on this picture as HierKD sends to NMS, which random weights would not do.
Both keep 100 detections. The rows below HierKD's show what MODEL.CHANNELS_LAST, TEST.AMP and
TEST.COMPILE change; compiling takes a minute or two before anything is timed.
"""

from __future__ import annotations

import math
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hierkd.benchmarks.random_models import random_hierkd, random_retinanet
from hierkd.benchmarks.timing import Report, measure, peak_memory, ratio

__all__ = ["add_arguments", "run"]

_CONTIGUOUS = ("MODEL.CHANNELS_LAST", "False")
_AMP = ("TEST.AMP.ENABLED", "True")
_COMPILE = ("TEST.COMPILE", "True")
# Name to the KEY VALUE pairs on top of the config.
_VARIANTS = {
    "HierKD": (),
    "HierKD, contiguous": _CONTIGUOUS,
    "HierKD, AMP": _AMP,
    "HierKD, compiled": _COMPILE,
    "HierKD, compiled, AMP": (*_AMP, *_COMPILE),
}
_RETINANET = "RetinaNet"


def add_arguments(parser: ArgumentParser) -> None:
    """Add sizes."""
    parser.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--batch", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--classes", type=int, default=65, help="default: %(default)s")
    parser.add_argument("--no-compile", action="store_true", help="leave out what is compiled")
    parser.add_argument("--config-file", default="configs/hierkd_R50.yaml", metavar="YAML")


def run(args: Namespace, device: torch.device) -> Report:
    """Time one picture, and a batch, with each variant.

    Args:
        args: of :func:`add_arguments`, and ``rounds``; ``size`` is 800 x 1333 on a GPU and
            320 x 533 on a CPU by default.
        device: where they run.
    """
    height, width = args.size or ((800, 1333) if device.type == "cuda" else (320, 533))
    picture = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    inputs = [{"image": picture}]
    models: dict[str, Any] = {
        name: _same_random_hierkd(args, device, opts)
        for name, opts in _VARIANTS.items()
        if not (args.no_compile and _COMPILE[0] in opts)
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
        rows = _rows(models, inputs, args, device)
    return Report(
        "Inference",
        device,
        {
            "picture": f"{height} x {width}",
            "classes": args.classes,
            "batch": args.batch,
            "pairs to NMS": pairs,
        },
        rows,
        [
            "Seconds and memory are those of one picture; of a batch, its time divided by its size "
            "and its whole memory. Memory comes on top of the weights.",
            f"AMP is {'float16' if device.type == 'cuda' else 'bfloat16'}; RetinaNet runs as it "
            "comes, in float32 and contiguous order.",
            *notes,
        ],
    )


def balance_retinanet(model: nn.Module, inputs: list[dict[str, Tensor]], pairs: int) -> None:
    """Move the classification bias so that ``pairs`` scores of a picture pass the threshold."""
    detector: Any = model
    features = detector.backbone(detector.preprocess_image(inputs).tensor)
    logits, _ = detector.head([features[f] for f in detector.head_in_features])
    flat = torch.cat([of_level.flatten() for of_level in logits])
    last = flat.topk(min(pairs + 1, len(flat))).values[-1]
    threshold = detector.test_score_thresh
    detector.head.cls_score.bias.data += math.log(threshold / (1 - threshold)) - last


def _same_random_hierkd(args: Namespace, device: torch.device, opts: tuple[str, ...]) -> Any:
    torch.manual_seed(0)
    options = ("MODEL.WEIGHTS", "", *opts)
    return random_hierkd(args.config_file, args.classes, device, options)


def _rows(
    models: Mapping[str, Any],
    inputs: list[dict[str, Tensor]],
    args: Namespace,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Time every model on one picture, and those that are not compiled on a batch of it."""
    batch = inputs * args.batch
    jobs = {name: (model, inputs) for name, model in models.items()}
    for name, model in models.items():
        if _COMPILE[0] not in _VARIANTS.get(name, ()):
            jobs[f"{name}, batch of {args.batch}"] = model, batch
    calls = {name: (lambda m=m, given=given: m(given)) for name, (m, given) in jobs.items()}
    rounds = args.rounds or (20 if device.type == "cuda" else 5)
    times = measure(calls, device=device, rounds=rounds)
    return [
        {
            "detector": name,
            "seconds": times[name].median / len(jobs[name][1]),
            "over RetinaNet": ratio(times[name], times[_RETINANET]) / len(jobs[name][1]),
            "over HierKD": ratio(times[name], times["HierKD"]) / len(jobs[name][1]),
            "peak MiB": peak_memory(calls[name], device),
        }
        for name in sorted(jobs, key=lambda name: not name.startswith(_RETINANET))
    ]
