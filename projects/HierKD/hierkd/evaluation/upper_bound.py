"""How well CLIP alone names perfectly localised objects (Table 9, "upper bound").

CLIP classifies every ground-truth box, and the boxes with CLIP's probabilities go through the same
evaluator as a detector's output. It bounds what distilling this CLIP can give a detector.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
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

    Every box is detected once per class of the vocabulary, with CLIP's softmax probability over
    the vocabulary (there is no background: the box is known to hold something) as its score. All
    classes rather than the best one alone, because average precision ranks: a detector also
    offers its second guess, at a lower score. As for a detector, the ``max_detections`` best pairs
    of an image count. Crops come from the images at their stored resolution; crowd regions, which
    are no single object, are not classified.

    Args:
        teacher: CLIP.
        dataset_name: A registered dataset; its ``thing_classes`` are the vocabulary.
        crop_scale: Side of the crop over side of the box (1.5 in §3.2 and Table 2).
        image_format: Channel order the teacher was built for, "RGB" or "BGR".
        images_per_batch: Images whose boxes go to the teacher in one call.
        max_detections: (box, class) pairs kept per image; COCO's 100.

    Returns:
        The figures of :class:`SplitCOCOEvaluator`, e.g. ``"novel/AP50"``, in percent.

    Raises:
        ValueError: The crop scale is not positive, or a picture cannot be decoded.
    """
    if not crop_scale > 0:
        raise ValueError(f"the crop scale must be positive, got {crop_scale}")
    evaluator = SplitCOCOEvaluator(
        dataset_name, distributed=False, max_dets_per_image=max_detections
    )
    evaluator.reset()
    dataset = DatasetCatalog.get(dataset_name)
    class_embeddings = teacher.encode_classes(MetadataCatalog.get(dataset_name).thing_classes)
    progress = tqdm(dataset, desc=f"CLIP on the boxes of {dataset_name}", unit="picture")
    for records in _batches(progress, images_per_batch):
        images = [_read_tensor(record["file_name"], image_format) for record in records]
        boxes = [_ground_truth_boxes(record) for record in records]
        regions = teacher.encode_regions(images, boxes, crop_scale)
        logits = teacher.logit_scale * regions @ class_embeddings.to(regions.device).T
        probs = logits.softmax(dim=1).cpu().split([len(b) for b in boxes])
        for record, image, image_boxes, image_probs in zip(
            records, images, boxes, probs, strict=True
        ):
            size = (image.shape[1], image.shape[2])
            instances = _as_detections(image_boxes, image_probs, size, max_detections)
            evaluator.process([record], [{"instances": instances}])
    return dict(evaluator.evaluate()["bbox"])


def _batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def _read_tensor(file_name: str, image_format: str) -> Tensor:
    """Return the stored image as (3, H, W), 0..255."""
    return torch.from_numpy(read_picture(file_name, image_format)).permute(2, 0, 1)


def _ground_truth_boxes(record: dict[str, Any]) -> Tensor:
    """Return the (M, 4) XYXY boxes, in pixels of the stored image, of all but crowd regions."""
    boxes: Sequence[Any] = [
        BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
        for annotation in record["annotations"]
        if not annotation.get("iscrowd", 0)
    ]
    return torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)


def _as_detections(
    boxes: Tensor, probs: Tensor, image_size: tuple[int, int], max_detections: int
) -> Instances:
    """Turn (M, 4) boxes and their (M, K) probabilities into the best (box, class) pairs."""
    num_kept = min(max_detections, probs.numel())
    scores, pairs = probs.flatten().topk(num_kept)
    return Instances(
        image_size,
        pred_boxes=Boxes(boxes[pairs // probs.shape[1]]),
        scores=scores,
        pred_classes=pairs % probs.shape[1],
    )
