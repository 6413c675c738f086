"""How well CLIP alone names perfectly localised objects (Table 9, "upper bound").

CLIP classifies every ground-truth box, and the boxes with CLIP's probabilities go through the same
evaluator as a detector's output. It bounds what distilling this CLIP can give a detector.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, BoxMode, Instances
from torch import Tensor
from tqdm import tqdm

from hierkd.data.mapper import read_picture
from hierkd.evaluation.split_coco_evaluation import SplitCOCOEvaluator
from hierkd.teachers.protocol import Teacher

__all__ = ["clip_upper_bound"]


@torch.no_grad()
def clip_upper_bound(
    teacher: Teacher,
    dataset_name: str,
    crop_scale: float = 1.5,
    *,
    image_format: str = "RGB",
    images_per_batch: int = 16,
    max_detections: int = 100,
) -> dict[str, float]:
    """Score CLIP on the ground-truth boxes of a dataset.

    Every box is detected once, as the class that CLIP's softmax over the vocabulary prefers (there
    is no background: the box is known to hold something), with its probability as the score. The
    paper's AR50 of 70.7 beside its AP50 of 68.0 says so: with every class of every box the recall
    would be 100. Crops come from the images at their stored resolution. Crowd regions, which are no
    single object, are not classified.

    Args:
        teacher: CLIP.
        dataset_name: A registered dataset; its ``thing_classes`` are the vocabulary.
        crop_scale: Side of the crop over side of the box. [ours: 1.5, Table 2's best]
        image_format: Channel order the teacher was built for, "RGB" or "BGR".
        images_per_batch: Images whose boxes go to the teacher in one call.
        max_detections: Boxes kept per image; COCO's 100.

    Returns:
        The figures of :class:`SplitCOCOEvaluator`, e.g. ``"novel/AP50"``, in percent.

    Raises:
        ValueError: A picture cannot be decoded.
    """
    evaluator = SplitCOCOEvaluator(
        dataset_name, distributed=False, max_dets_per_image=max_detections
    )
    dataset = DatasetCatalog.get(dataset_name)
    class_embeddings = teacher.encode_classes(MetadataCatalog.get(dataset_name).thing_classes)
    progress = tqdm(dataset, desc=f"CLIP on the boxes of {dataset_name}", unit="picture")
    batches = iter(progress)
    while records := list(itertools.islice(batches, images_per_batch)):
        images = [
            torch.from_numpy(read_picture(record["file_name"], image_format)).permute(2, 0, 1)
            for record in records
        ]
        boxes = [_ground_truth_boxes(record) for record in records]
        regions = teacher.encode_regions(images, boxes, crop_scale)
        logits = teacher.logit_scale * regions @ class_embeddings.to(regions.device).T
        best = logits.softmax(dim=1).cpu().max(dim=1)
        counts = [len(of_image) for of_image in boxes]
        for record, image, pred_boxes, scores, classes in zip(
            records, images, boxes, best.values.split(counts), best.indices.split(counts),
            strict=True,
        ):  # fmt: skip
            size = (image.shape[1], image.shape[2])
            found = Instances(
                size, pred_boxes=Boxes(pred_boxes), scores=scores, pred_classes=classes
            )
            kept = scores.topk(min(max_detections, len(scores))).indices
            evaluator.process([record], [{"instances": found[kept]}])
    return dict(evaluator.evaluate()["bbox"])


def _ground_truth_boxes(record: dict[str, Any]) -> Tensor:
    """Return the (M, 4) XYXY boxes, in pixels of the stored image, of all but crowd regions."""
    boxes: Sequence[Any] = [
        BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
        for annotation in record["annotations"]
        if not annotation.get("iscrowd", 0)
    ]
    return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
