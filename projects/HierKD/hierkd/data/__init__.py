"""Datasets, category splits and the dataset mapper. Importing it registers the datasets."""

from hierkd.data.datasets import register_coco_ovd
from hierkd.data.miniature import register_miniature

register_coco_ovd()
register_miniature()
