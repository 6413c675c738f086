"""Find boxes so alike that one look of the teacher serves them all (§3.2).

Many points of an object predict nearly the same box, and the teacher's embedding of nearly the same
crop is nearly the same.
"""

import torch
from torch import Tensor
from torchvision.ops import box_iou, nms

__all__ = ["merge_boxes", "number_objects"]

# Pairs of boxes compared at once: 16 MB per array of float32, whatever the number of boxes. [ours]
_PAIRS_AT_ONCE = 2**22


def number_objects(image_idxs: Tensor, gt_boxes: Tensor) -> Tensor:
    """Give the points of the same object the same number.

    Args:
        image_idxs: (P,) image of each point.
        gt_boxes: (P, 4) box of the object that each point belongs to.

    Returns:
        (P,) int64, from 0; points agree exactly if image and box do.
    """
    keys = torch.cat([image_idxs[:, None].to(gt_boxes), gt_boxes], dim=1)
    numbers: Tensor = torch.unique(keys, dim=0, return_inverse=True)[1]
    return numbers.view(len(keys))


def merge_boxes(
    boxes: Tensor, scores: Tensor, objects: Tensor, iou_thresh: float
) -> tuple[Tensor, Tensor]:
    """Choose boxes that stand for all, as non-maximum suppression within each object would.

    Args:
        boxes: (P, 4) XYXY.
        scores: (P,) the higher, the sooner a box is chosen.
        objects: (P,) int64, number >= 0 of the object; boxes of different objects stay apart.
        iou_thresh: a box overlaps with the one that stands for it by more than this.

    Returns:
        chosen: (U,) indices of the boxes chosen, increasing.
        stand_in: (P,) position in `chosen` of the most overlapping box of the same object; a chosen
            box stands for itself.
    """
    if len(boxes) == 0:
        empty = torch.zeros(0, dtype=torch.int64, device=boxes.device)
        return empty, empty
    # Moved apart in float64: far from the origin, float32 would round the boxes.
    exact = boxes.double()
    stride = exact.max() - exact.min() + 1
    chosen = nms(exact + (objects * stride)[:, None], scores.double(), iou_thresh).sort().values
    stand_in = torch.empty_like(objects)
    order = objects.argsort(stable=True)
    candidates = objects[chosen].argsort(stable=True)  # (U,) positions in chosen, object by object
    rows = max(1, _PAIRS_AT_ONCE // len(chosen))
    for points in order.split(rows):
        # those of the objects that these points are of
        ends = objects[chosen[candidates]], objects[points[[0, -1]]]
        first = int(torch.searchsorted(ends[0], ends[1][0]))
        last = int(torch.searchsorted(ends[0], ends[1][1], right=True))
        near = candidates[first:last]
        overlaps = box_iou(boxes[points], boxes[chosen[near]])  # (rows, at most U)
        overlaps.masked_fill_(objects[points][:, None] != objects[chosen[near]], -1.0)
        stand_in[points] = near[overlaps.argmax(dim=1)]
    stand_in[chosen] = torch.arange(len(chosen), device=boxes.device)
    return chosen, stand_in
