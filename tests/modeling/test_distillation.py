"""Proposals: which boxes are distilled beside the labelled ones, and what they are paired with."""

import pytest
import torch
from detectron2.structures import Boxes, Instances
from torchvision.ops import box_iou

from hierkd.modeling.detector_settings import IKD
from hierkd.modeling.distillation import (
    PositivePoints,
    Proposals,
    choose_proposals,
    encode_crops,
)

SIZE = 100


def random_boxes(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = 70 * torch.rand(count, 2, generator=generator)
    sides = 6 + 40 * torch.rand(count, 2, generator=generator)
    return torch.cat([corner, (corner + sides).clamp(max=SIZE)], dim=1)


def labelled(boxes: torch.Tensor) -> Instances:
    return Instances((SIZE, SIZE), gt_boxes=Boxes(boxes.reshape(-1, 4)))


def slowly_chosen(candidates, scores, instances, per_image):
    """The definition: best first, of those that overlap neither a label nor a better one."""
    chosen = []
    for image, gt in enumerate(instances):
        kept: list[int] = []
        rows = (candidates.image_idxs == image).nonzero().flatten().tolist()
        for row in sorted(rows, key=lambda row: -float(scores[row])):
            box = candidates.boxes[row][None]
            large = (box[0, 2:] - box[0, :2]).min() >= 12
            new = all(box_iou(box, candidates.boxes[k][None]) <= 0.5 for k in kept)
            if large and new and not (box_iou(box, gt.gt_boxes.tensor) >= 0.3).any():
                kept.append(row)
        chosen += kept[:per_image]
    return chosen


@pytest.mark.parametrize("per_image", [1, 2, 5, 1000])
def test_proposals_are_those_of_the_definition(per_image):
    images, each = 4, 60
    candidates = Proposals(
        torch.arange(images).repeat_interleave(each),
        torch.arange(images * each),
        random_boxes(images * each, seed=0),
    )
    scores = torch.rand(images * each, generator=torch.Generator().manual_seed(1))
    instances = [labelled(random_boxes(count, seed=9 + count)) for count in (3, 0, 1, 2)]
    expected = slowly_chosen(candidates, scores, instances, per_image)
    found = choose_proposals(candidates, scores, instances, per_image)
    assert found.point_idxs.tolist() == expected
    assert torch.equal(found.boxes, candidates.boxes[expected])
    assert found.image_idxs.tolist() == candidates.image_idxs[expected].tolist()
    assert len(expected) == images * per_image or per_image == 1000


@pytest.mark.parametrize(
    ("boxes", "labels"),
    [
        ([], [[0, 0, 50, 50]]),  # no candidate at all
        ([[0, 0, 50, 50], [2, 2, 50, 48]], [[0, 0, 50, 50]]),  # all overlap a label
        ([[0, 0, 11, 60], [5, 5, 90, 16.5]], []),  # all are thin
    ],
)
def test_an_image_may_have_no_proposal(boxes, labels):
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    zeros = torch.zeros(len(boxes), dtype=torch.int64)
    candidates = Proposals(zeros, zeros, boxes)
    instances = [labelled(torch.tensor(labels, dtype=torch.float32))]
    assert len(choose_proposals(candidates, torch.ones(len(boxes)), instances, 3).boxes) == 0


class BoxTeacher:
    """Says of a region where it lies."""

    def __init__(self):
        self.calls = 0

    def encode_regions(self, images, boxes, crop_scale):
        self.calls += 1
        owners = torch.arange(len(boxes)).repeat_interleave(torch.tensor([*map(len, boxes)]))
        return torch.cat([torch.cat(list(boxes)), owners[:, None]], dim=1)


@pytest.mark.parametrize("kind", ["predicted", "gt"])
def test_one_call_of_the_teacher_says_of_each_region_what_it_shows(kind):
    pred, gt, more = (random_boxes(count, seed) for seed, count in enumerate((5, 5, 3)))
    gt[1] = gt[0]  # two points of an object
    images = torch.tensor([0, 0, 1, 1, 3])
    points = PositivePoints(
        images, torch.arange(5), pred, gt, torch.tensor([0, 0, 0, 1, 0]), torch.ones(5)
    )
    proposals = Proposals(torch.tensor([0, 2, 3]), torch.arange(3), more)
    teacher = BoxTeacher()
    rows = encode_crops(teacher, IKD(boxes=kind), [torch.zeros(3, 9, 9)] * 4, points, proposals)
    boxes = torch.cat([pred if kind == "predicted" else gt, more])
    owners = torch.cat([images, proposals.image_idxs])
    assert teacher.calls == 1
    assert torch.equal(rows, torch.cat([boxes, owners[:, None]], dim=1))
