"""The detector's parts; importing this package fills detectron2's registries."""

from hierkd.modeling.backbone import build_atss_resnet_fpn_backbone, build_slim_resnet_fpn_backbone
from hierkd.modeling.meta_arch import HierKD

__all__ = ["HierKD", "build_atss_resnet_fpn_backbone", "build_slim_resnet_fpn_backbone"]
