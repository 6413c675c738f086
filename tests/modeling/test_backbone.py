"""The backbones: names, strides and channels, where P6 comes from, and that both train."""

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone

from hierkd.config import add_hierkd_config
from hierkd.modeling.backbone import (
    build_atss_resnet_fpn_backbone,
    build_slim_resnet_fpn_backbone,
)

RGB = ShapeSpec(channels=3)


def resnet_cfg():
    cfg = get_cfg()
    add_hierkd_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = "build_atss_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.DEPTH = 18  # the paper's is 50: the same builder, three times the time
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 32
    return cfg


def slim_cfg():
    cfg = resnet_cfg()
    cfg.MODEL.BACKBONE.NAME = "build_slim_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.FPN.NORM = "BN"
    return cfg


def image(n=1, seed=0):
    return torch.randn(n, 3, 128, 192, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("cfg", "strides"),
    [
        (resnet_cfg(), {"p3": 8, "p4": 16, "p5": 32, "p6": 64, "p7": 128}),
        (slim_cfg(), {"p3": 8, "p4": 16, "p5": 32}),
    ],
    ids=["resnet", "slim"],
)
def test_names_strides_and_channels(cfg, strides):
    backbone = build_backbone(cfg).eval()
    declared = backbone.output_shape()
    assert {name: shape.stride for name, shape in declared.items()} == strides
    assert {shape.channels for shape in declared.values()} == {32}
    with torch.no_grad():
        outputs = backbone(image())
    assert list(outputs) == list(strides)  # finest first
    for name, stride in strides.items():
        height, width = -(-128 // stride), -(-192 // stride)
        assert tuple(outputs[name].shape) == (1, 32, height, width), name


def maps_without_p5(backbone):
    """The maps of an image before and after the last convolution of P5 is zeroed."""
    backbone.eval()
    with torch.no_grad():
        before = backbone(image())
        backbone.fpn_output5.weight.zero_()
        backbone.fpn_output5.bias.zero_()
        return before, backbone(image())


def test_p6_comes_from_p5():
    before, after = maps_without_p5(build_atss_resnet_fpn_backbone(resnet_cfg(), RGB))
    assert after["p5"].abs().max() == 0
    for name in ("p6", "p7"):
        assert (before[name] - after[name]).abs().max() > 1e-4, name
    for name in ("p3", "p4"):
        assert torch.equal(before[name], after[name]), name


def test_slim_widths_and_depths():
    cfg = slim_cfg()
    cfg.MODEL.SLIM_RESNET.WIDTHS = [8, 16, 24, 40]
    cfg.MODEL.SLIM_RESNET.BLOCKS = [1, 2, 1, 3]
    backbone = build_slim_resnet_fpn_backbone(cfg, RGB).eval()
    stages = [getattr(backbone.bottom_up, name) for name in ("res2", "res3", "res4", "res5")]
    assert [len(stage) for stage in stages] == [1, 2, 1, 3]
    with torch.no_grad():
        maps = backbone.bottom_up(image())
    assert {name: tuple(x.shape[1:]) for name, x in maps.items()} == {
        "res3": (16, 16, 24),
        "res4": (24, 8, 12),
        "res5": (40, 4, 6),
    }


def test_slim_stages_of_one_width():
    cfg = slim_cfg()
    cfg.MODEL.SLIM_RESNET.WIDTHS = [8, 16, 16, 24]
    with pytest.raises(ValueError, match=r"SLIM_RESNET\.WIDTHS.*\[8, 16, 16, 24\]"):
        build_slim_resnet_fpn_backbone(cfg, RGB)
