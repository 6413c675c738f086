"""Operations and bytes of a step and of inference, counted on paper (nothing is computed).

The models run on PyTorch's meta device, which knows shapes only. Operations are multiply-adds of
convolutions and matrix products. Bytes are what every operation reads and writes in float32, as if
nothing stayed in a cache: operations that merely look at a tensor differently count nothing. The
two, divided by what a device can do, are the time below which no implementation of the same
network gets without fusing operations.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from detectron2.modeling import build_backbone
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from hierkd.benchmarks.random_models import random_retinanet
from hierkd.benchmarks.timing import Report
from hierkd.load_config import load_config
from hierkd.modeling.head import ATSSHead
from hierkd.teachers.teacher import import_clip

__all__ = ["add_arguments", "count", "run"]

# CLIP ViT-B/32, as its authors publish it. The text tower is counted per text of 77 tokens.
_VIT_B_32 = {
    "embed_dim": 512,
    "image_resolution": 224,
    "vision_layers": 12,
    "vision_width": 768,
    "vision_patch_size": 32,
    "context_length": 77,
    "vocab_size": 49408,
    "transformer_width": 512,
    "transformer_heads": 8,
    "transformer_layers": 12,
}


def add_arguments(parser: ArgumentParser) -> None:
    """Add the sizes."""
    parser.add_argument("--height", type=int, default=800, help="default: %(default)s")
    parser.add_argument(
        "--width", type=int, default=1344, help="padded to a multiple of 32; default: %(default)s"
    )
    parser.add_argument("--images", type=int, default=8, help="of a step; default: %(default)s")
    parser.add_argument(
        "--crops", type=int, default=450, help="distilled points of a step; default: %(default)s"
    )
    parser.add_argument("--config-file", default="configs/hierkd_R50.yaml", metavar="YAML")


class _CountBytes(TorchDispatchMode):
    """Sums what operations read and write."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        # An operation whose schema says that the result shares memory with an input is a view.
        views = not func._schema.is_mutable and any(r.alias_info for r in func._schema.returns)
        if not views:
            tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
            self.total += sum(t.numel() * t.element_size() for t in tensors)
        return result


def count(call: Callable[[], object]) -> tuple[float, float]:
    """Count a call on meta tensors.

    Returns:
        Multiply-adds and bytes, both in units of 10^9.
    """
    with FlopCounterMode(display=False) as flops:
        call()
    with _CountBytes() as moved:
        call()
    return flops.get_total_flops() / 2e9, moved.total / 1e9


def run(args: Namespace, device: torch.device) -> Report:
    """Count inference of one picture and a training step.

    Args:
        args: of :func:`add_arguments`.
        device: ignored; the counts hold anywhere.
    """
    rows = [*_inference_rows(args), *_training_rows(args)]
    settings = {
        "picture": f"{args.height} x {args.width}, as the network gets it",
        "step": f"{args.images} pictures, {args.crops} crops",
    }
    return Report("Operations and bytes, on paper", device, settings, rows)


def _row(part: str, counted: tuple[float, float]) -> dict[str, Any]:
    operations, moved = counted
    return {"part": part, "10^9 multiply-adds": operations, "10^9 bytes, float32": moved}


def _detector(config_file: str) -> tuple[nn.Module, nn.Module, list[str]]:
    cfg = load_config(config_file, ["MODEL.DEVICE", "meta"])
    atss, text = cfg.MODEL.ATSS, cfg.MODEL.TEXT_CLASSIFIER
    with torch.device("meta"):
        backbone = build_backbone(cfg)
        head = ATSSHead(
            in_channels=backbone.output_shape()[atss.IN_FEATURES[0]].channels,
            embed_dim=text.EMBED_DIM,
            num_levels=len(atss.IN_FEATURES),
            num_convs=atss.NUM_CONVS,
            norm=atss.NORM,
            with_quality=atss.QUALITY != "none",
        )
    return backbone, head, list(atss.IN_FEATURES)


def _inference_rows(args: Namespace) -> list[dict[str, Any]]:
    backbone, head, names = _detector(args.config_file)
    picture = torch.empty(1, 3, args.height, args.width, device="meta")
    with torch.no_grad():
        maps = backbone(picture)
        features = [maps[name] for name in names]
        embeddings = torch.cat([e.flatten(2) for e in head(features)[0]], dim=2)[0].T
        rows = [
            _row("inference: backbone and FPN", count(lambda: backbone(picture))),
            _row("inference: head", count(lambda: head(features))),
        ]
        for classes in (17, 65, 1203, 20000):
            texts = torch.empty(classes + 1, embeddings.shape[1], device="meta")
            classify = partial(_classify, embeddings, texts)
            rows.append(
                _row(
                    f"inference: {len(embeddings)} points x {classes} classes",
                    count(classify),
                )
            )
        with torch.device("meta"):
            retinanet = random_retinanet(torch.device("meta"))
        rows.append(
            _row(
                "inference: RetinaNet-R50-FPN, backbone, FPN and head",
                count(lambda: _retinanet_maps(retinanet, picture)),
            )
        )
    return rows


def _classify(embeddings: Tensor, texts: Tensor) -> Tensor:
    return F.linear(embeddings, texts).softmax(dim=1)


def _retinanet_maps(model: Any, picture: Tensor) -> object:
    maps = model.backbone(picture)
    return model.head([maps[name] for name in model.head_in_features])


def _training_rows(args: Namespace) -> list[dict[str, Any]]:
    backbone, head, names = _detector(args.config_file)
    pictures = torch.empty(args.images, 3, args.height, args.width, device="meta")

    def forward() -> Tensor:
        maps = backbone(pictures)
        outputs = head([maps[name] for name in names])
        return torch.stack([m.sum() for output in outputs if output for m in output]).sum()

    with torch.device("meta"):
        clip = import_clip().model.CLIP(**_VIT_B_32)
    crops = torch.empty(args.crops, 3, 224, 224, device="meta")
    tokens = torch.zeros(args.images, 77, dtype=torch.int64, device="meta")
    with torch.no_grad():
        teacher = count(lambda: clip.encode_image(crops))
        captions = count(lambda: clip.encode_text(tokens))
    return [
        _row("step: backbone, FPN and head, forward", count(forward)),
        _row("step: the same, forward and backward", count(lambda: forward().backward())),
        _row(f"step: CLIP ViT-B/32 on {args.crops} crops", teacher),
        _row(f"step: CLIP on {args.images} captions", captions),
    ]
