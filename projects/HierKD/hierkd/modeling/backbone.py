"""Backbones: ResNet + FPN with P6 and P7 from P5, and a slim ResNet for the miniature."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone import FPN, BasicStem, ResNet, build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelP6P7
from detectron2.modeling.backbone.resnet import BasicBlock

__all__ = ["build_atss_resnet_fpn_backbone", "build_slim_resnet_fpn_backbone"]


@BACKBONE_REGISTRY.register()
def build_atss_resnet_fpn_backbone(cfg: Any, input_shape: ShapeSpec) -> Backbone:
    """ResNet + FPN, levels P3-P7, with P6 and P7 computed from P5 as in FCOS and ATSS.

    detectron2's own ``build_retinanet_resnet_fpn_backbone`` computes them from C5.
    """
    channels = cfg.MODEL.FPN.OUT_CHANNELS
    return FPN(
        bottom_up=build_resnet_backbone(cfg, input_shape),
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=channels,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelP6P7(channels, channels, in_feature="p5"),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


@BACKBONE_REGISTRY.register()
def build_slim_resnet_fpn_backbone(cfg: Any, input_shape: ShapeSpec) -> Backbone:
    """A narrow ResNet of basic blocks + FPN without extra levels, for small images on a CPU.

    Raises:
        ValueError: if two stages in a row have the same width.
    """
    widths, norm = cfg.MODEL.SLIM_RESNET.WIDTHS, cfg.MODEL.RESNETS.NORM
    if any(a == b for a, b in pairwise(widths)):
        # detectron2's BasicBlock projects its shortcut, and so strides it, only if widths differ
        raise ValueError(f"MODEL.SLIM_RESNET.WIDTHS: two stages in a row are equal: {widths}")
    stem = BasicStem(in_channels=input_shape.channels, out_channels=widths[0], norm=norm)
    stages, channels = [], widths[0]
    for index, (width, depth) in enumerate(zip(widths, cfg.MODEL.SLIM_RESNET.BLOCKS, strict=True)):
        strides = [1 if index == 0 else 2] + [1] * (depth - 1)
        stages.append(
            ResNet.make_stage(
                BasicBlock,
                depth,
                in_channels=channels,
                out_channels=width,
                stride_per_block=strides,
                norm=norm,
            )
        )
        channels = width
    bottom_up = ResNet(stem, stages, out_features=[*cfg.MODEL.FPN.IN_FEATURES])
    return FPN(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
