"""What a training batch must hold, checked while it is still in the CPU's memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

__all__ = ["check_ground_truth"]

# Pixels. [ours] Far beyond any picture, and far from where areas leave float32's range.
_LARGEST_COORDINATE = 1e7


def check_ground_truth(batched_inputs: Sequence[Mapping[str, Any]], num_classes: int) -> None:
    """Refuse ground truth that would make losses NaN or index past the vocabulary.

    The mapper clips boxes and drops those without area, so that this is about datasets and mappers
    of one's own. Ground truth that is on a GPU already is not looked at: that would wait for it.

    Args:
        batched_inputs: N dicts with ``instances``, that is ``gt_boxes`` (M, 4), XYXY in pixels of
            the network input, and ``gt_classes`` (M,).
        num_classes: K, the size of the vocabulary.

    Raises:
        ValueError: A coordinate is not finite or beyond ten million pixels, a box ends before it
            begins, or a class is not one of the K. The image and its first such box are named.
    """
    for index, given in enumerate(batched_inputs):
        boxes, classes = given["instances"].gt_boxes.tensor, given["instances"].gt_classes
        if boxes.device.type != "cpu" or len(boxes) == 0:
            continue
        usable = (boxes.abs() <= _LARGEST_COORDINATE).all(dim=1)  # false for NaN
        usable &= (boxes[:, 2:] >= boxes[:, :2]).all(dim=1)
        known = (classes >= 0) & (classes < num_classes)
        if bool(usable.all() & known.all()):
            continue
        row = int((~(usable & known)).to(torch.uint8).argmax())
        found = (
            f"the box {boxes[row].tolist()}, expected XYXY in pixels"
            if not usable[row]
            else f"class {int(classes[row])}, expected one of the {num_classes} of the vocabulary"
        )
        name = given.get("file_name", f"number {index} of the batch")
        raise ValueError(
            f"Image {name} (id {given.get('image_id')!r}): ground truth {row} has {found}."
        )
