"""Datasets, category splits and the dataset mapper. Importing it registers the datasets."""

from hierkd.data.coco import register_coco_ovd

register_coco_ovd()
