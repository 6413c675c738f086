"""HierKD beside other open-vocabulary detectors and RetinaNet: time, memory and parameters.

From the picture as the network gets it to boxes with classes and scores; random weights, which have
the speed of trained ones. OWLv2 and Grounding DINO come from ``transformers``
(``pip install -e '.[peers]'``) and are built from the published sizes of ``owlv2-base-patch16``
and ``grounding-dino-tiny``. Every detector gets the picture at the size its authors use, scaled by
the same factor (``--scale``); OWLv2's square has fewer pixels than the rectangle of the others. On
a CPU, HierKD is also timed as an exported graph in onnxruntime, float32 and 8-bit integers.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from detectron2.layers import batched_nms
from torch import Tensor, nn

from hierkd.benchmarks.infer import random_retinanet
from hierkd.benchmarks.timing import Report, measure, median, peak_memory, random_hierkd, ratio
from hierkd.inference.export import check_output, export_graph, load_graph
from hierkd.inference.predictor import OpenVocabularyPredictor

__all__ = ["run"]

_SIZE = (800, 1333)  # of HierKD, RetinaNet and Grounding DINO
_OWL_SIDE = 960
_DETECTIONS = 100
_OURS = "HierKD-R50, vocabulary set before"
_ONNX = "onnxruntime"
# Tokens that the names of COCO's 65 base and novel classes take in Grounding DINO's one text,
# separators included. It reads at most 256, so more classes need several passes.
_GROUNDING_TOKENS = 165
_TOKENS_OF_A_NAME = 16  # OWLv2's context


def run(
    device: torch.device,
    *,
    rounds: int | None,
    classes: int,
    scale: float | None,
    config_file: str,
) -> Report:
    """Time one picture with each detector and ``classes`` names.

    Raises:
        ImportError: ``transformers`` is missing, or on a CPU a package that ONNX needs.
    """
    scale = scale or (1.0 if device.type == "cuda" else 0.6)
    height, width = (round(side * scale / 32) * 32 for side in _SIZE)
    picture = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    inputs = [{"image": picture, "height": height, "width": width}]
    hierkd = random_hierkd(config_file, classes, device).eval()
    retinanet = random_retinanet(device)
    side = round(_OWL_SIDE * scale / 16) * 16
    owl, owl_calls = _owlv2(classes, side, device)
    dino, dino_call = _grounding_dino((height, width), device)
    exported = _exported(hierkd, picture) if device.type == "cpu" else {}
    size = f"{height} x {width}"
    candidates: dict[str, tuple[nn.Module, str, Callable[[], object]]] = {
        "RetinaNet-R50-FPN (closed: 80 classes)": (retinanet, size, lambda: retinanet(inputs)),
        _OURS: (hierkd, size, lambda: hierkd(inputs)),
        **{f"{_OURS}, {how}": (hierkd, size, call) for how, call in exported.items()},
        **{
            f"OWLv2 base/16, {how}": (owl, f"{side} x {side}", call)
            for how, call in owl_calls.items()
        },
        "Grounding DINO tiny, texts with every picture": (dino, size, dino_call),
    }
    calls = {name: call for name, (_, _, call) in candidates.items()}
    rounds = rounds or (20 if device.type == "cuda" else 5)
    with torch.inference_mode():
        times = measure(calls, device, rounds)
        memory = {
            name: math.nan if _ONNX in name else peak_memory(call, device)
            for name, call in calls.items()
        }
    rows = [
        {
            "detector": name,
            "picture": shown,
            "seconds": median(times[name]),
            "least": min(times[name]),
            "over HierKD": ratio(times[name], times[_OURS]),
            "peak MiB": memory[name],
            "10^6 parameters": sum(p.numel() for p in model.parameters()) / 1e6,
        }
        for name, (model, shown, _) in candidates.items()
    ]
    return Report(
        "Open-vocabulary detectors on one picture",
        device,
        {"classes": classes, "scale": scale, "rounds": rounds},
        rows,
        [
            "Random weights: speed only, nothing is said about accuracy.",
            "Memory comes on top of the weights. HierKD's parameters do not hold CLIP, "
            "which inference with a set vocabulary does not load. What onnxruntime keeps between "
            "calls cannot be measured so.",
        ],
    )


def _exported(model: nn.Module, picture: Tensor) -> dict[str, Callable[[], object]]:
    """HierKD as graphs in onnxruntime; the ranges of 8-bit integers are those of this picture."""
    array = picture.permute(1, 2, 0).contiguous().numpy()
    sides = array.shape[:2]
    predictor = OpenVocabularyPredictor(model=model, min_size=min(sides), max_size=max(sides))
    calls: dict[str, Callable[[], object]] = {}
    with TemporaryDirectory() as folder:
        for how, calibration in ((_ONNX, None), (f"{_ONNX}, int8", [array])):
            path = Path(folder, f"{len(calls)}.onnx")
            check_output(path)
            export_graph(predictor, path, calibration=calibration)
            calls[how] = partial(load_graph(path), array)
    return calls


def _owlv2(
    classes: int, side: int, device: torch.device
) -> tuple[nn.Module, dict[str, Callable[[], object]]]:
    transformers = _import_transformers()
    sizes = {"vision_config": {"image_size": side, "patch_size": 16}}
    config = transformers.Owlv2Config.from_dict(sizes)
    model: Any = transformers.Owlv2ForObjectDetection(config).eval().to(device)
    pixels = torch.randn(1, 3, side, side, device=device)
    tokens = torch.randint(1, 49000, (classes, _TOKENS_OF_A_NAME), device=device)
    tokens[:, -1] = config.text_config.eos_token_id
    mask = torch.ones_like(tokens)
    with torch.inference_mode():
        texts = model(input_ids=tokens, pixel_values=pixels, attention_mask=mask).text_embeds

    def with_texts() -> object:
        out = model(input_ids=tokens, pixel_values=pixels, attention_mask=mask)
        return _best(out.logits[0], out.pred_boxes[0])

    def with_cached_texts() -> object:
        grid = model.image_embedder(pixels)[0]
        features = grid.flatten(1, 2)
        logits = model.class_predictor(features, texts.reshape(1, classes, -1))[0]
        return _best(logits[0], model.box_predictor(features, grid)[0])

    calls = {"texts encoded before": with_cached_texts, "texts with every picture": with_texts}
    return model, calls


def _grounding_dino(
    size: tuple[int, int], device: torch.device
) -> tuple[nn.Module, Callable[[], object]]:
    transformers = _import_transformers()
    model: Any = transformers.GroundingDinoForObjectDetection(transformers.GroundingDinoConfig())
    model = model.eval().to(device)
    pixels = torch.randn(1, 3, *size, device=device)
    tokens = torch.randint(2000, 30000, (1, _GROUNDING_TOKENS), device=device)
    tokens[0, 0], tokens[0, -1] = 101, 102  # BERT's [CLS] and [SEP]
    tokens[0, 2:-1:2] = 1012  # a full stop behind every name
    mask = torch.ones_like(tokens)

    def call() -> object:
        out = model(pixel_values=pixels, input_ids=tokens, attention_mask=mask)
        return _best(out.logits[0], out.pred_boxes[0])

    return model, call


def _best(logits: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """The best detections, after NMS as users of these models do it."""
    scores, classes = logits.sigmoid().max(dim=1)
    half = boxes[:, 2:] / 2
    corners = torch.cat([boxes[:, :2] - half, boxes[:, :2] + half], dim=1)
    keep = batched_nms(corners, scores, classes, 0.5)[:_DETECTIONS]
    return corners[keep], scores[keep]


def _import_transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "the peers come from transformers, which is missing: pip install 'transformers>=5'"
        ) from error
    logging.getLogger("transformers").setLevel(logging.ERROR)
    return transformers
