"""The detector's parts; importing this package fills detectron2's registries."""

from hierkd.modeling.backbone import build_atss_resnet_fpn_backbone, build_slim_resnet_fpn_backbone
from hierkd.modeling.detector import HierKD

__all__ = ["HierKD", "build_atss_resnet_fpn_backbone", "build_slim_resnet_fpn_backbone"]
