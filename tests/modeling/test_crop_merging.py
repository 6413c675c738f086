import pytest
import torch
from torchvision.ops import box_iou

from hierkd.modeling import crop_merging
from hierkd.modeling.crop_merging import merge_boxes, number_objects


def jittered_boxes(generator, objects, points, spread, offset=0.0):
    """`points` boxes about each of `objects` places, in random order, with random scores."""
    corner = torch.rand(objects, 2, generator=generator) * 1000 + offset
    gt = torch.cat([corner, corner + 20 + 80 * torch.rand(objects, 2, generator=generator)], dim=1)
    numbers = torch.arange(objects).repeat(points)[
        torch.randperm(objects * points, generator=generator)
    ]
    noise = spread * torch.randn(len(numbers), 4, generator=generator)
    return gt[numbers] + noise, torch.rand(len(numbers), generator=generator), numbers


def merge_by_a_loop(boxes, scores, objects, iou_thresh):
    chosen = []
    for index in scores.argsort(descending=True).tolist():
        alike = [
            other
            for other in chosen
            if objects[other] == objects[index]
            and box_iou(boxes[index : index + 1], boxes[other : other + 1]) > iou_thresh
        ]
        if not alike:
            chosen.append(index)
    return sorted(chosen)


@pytest.mark.parametrize("iou_thresh", [0.5, 0.8, 0.95])
def test_equals_a_loop(iou_thresh):
    generator = torch.Generator().manual_seed(0)
    boxes, scores, objects = jittered_boxes(generator, 7, 9, 3.0)
    chosen, stand_in = merge_boxes(boxes, scores, objects, iou_thresh)
    assert chosen.tolist() == merge_by_a_loop(boxes, scores, objects, iou_thresh)
    assert 7 <= len(chosen) < len(boxes)
    for index, position in enumerate(stand_in.tolist()):
        representative = chosen[position]
        assert objects[representative] == objects[index]
        others = chosen[objects[chosen] == objects[index]]
        ious = box_iou(boxes[index : index + 1], boxes[others])[0]
        mine = box_iou(boxes[index : index + 1], boxes[representative][None]).item()
        assert mine == ious.max()
        assert mine > iou_thresh
    assert torch.equal(chosen[stand_in[chosen]], chosen)


def test_the_best_box_stands_for_its_neighbours():
    boxes = torch.tensor([[0.0, 0, 100, 100], [0, 0, 100, 98], [0, 0, 100, 96], [0, 0, 50, 50]])
    scores = torch.tensor([0.7, 0.9, 0.8, 0.6])
    chosen, stand_in = merge_boxes(boxes, scores, torch.zeros(4, dtype=torch.int64), 0.9)
    assert chosen.tolist() == [1, 3]
    assert stand_in.tolist() == [0, 0, 0, 1]


def test_equal_boxes_of_different_objects_stay_apart():
    boxes = torch.tensor([[5.0, 5, 60, 60]]).repeat(4, 1)
    chosen, stand_in = merge_boxes(boxes, torch.ones(4), torch.tensor([0, 1, 0, 1]), 0.5)
    assert chosen.tolist() == [0, 1]
    assert stand_in.tolist() == [0, 1, 0, 1]


def test_thresholds_of_one_and_identical_boxes():
    boxes = torch.tensor([[3.3, 4.4, 70.7, 80.8]]).repeat(5, 1)
    zeros = torch.zeros(5, dtype=torch.int64)
    assert len(merge_boxes(boxes, torch.rand(5), zeros, 0.999)[0]) == 1
    assert merge_boxes(boxes, torch.rand(5), zeros, 1.0)[1].tolist() == [0, 1, 2, 3, 4]


def test_many_objects_do_not_blur_the_boxes():
    # With thousands of objects moved apart, float32 would be too coarse for boxes of a few pixels.
    generator = torch.Generator().manual_seed(1)
    boxes, scores, _ = jittered_boxes(generator, 1, 6, 1.0, offset=1300.0)
    few = torch.zeros(6, dtype=torch.int64)
    for iou_thresh in (0.9, 0.95, 0.97):
        expected = merge_boxes(boxes, scores, few, iou_thresh)
        found = merge_boxes(boxes, scores, few + 100_000, iou_thresh)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_no_boxes_and_boxes_without_area():
    nothing = torch.zeros(0, dtype=torch.int64)
    chosen, stand_in = merge_boxes(torch.zeros(0, 4), torch.zeros(0), nothing, 0.9)
    assert chosen.shape == stand_in.shape == (0,)
    empty = torch.tensor([[7.0, 7, 7, 7]]).repeat(2, 1)
    zeros = torch.zeros(2, dtype=torch.int64)
    assert merge_boxes(empty, torch.ones(2), zeros, 0.9)[1].tolist() == [0, 1]


def test_objects_are_numbered_by_image_and_box():
    a, b = [1.0, 2, 3, 4], [1.0, 2, 3, 5]
    numbers = number_objects(torch.tensor([0, 0, 1, 0, 1]), torch.tensor([a, b, a, a, a]))
    assert numbers[0] == numbers[3]
    assert numbers[2] == numbers[4]
    assert len({int(number) for number in numbers[:3]}) == 3
    assert number_objects(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4)).shape == (0,)


@pytest.mark.parametrize("pairs", [1, 100, 1000])
def test_boxes_in_parts_give_what_all_at_once_do(monkeypatch, pairs):
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        boxes, scores, numbers = jittered_boxes(generator, objects=9, points=8, spread=6)
        whole = merge_boxes(boxes, scores, numbers, 0.6)
        with monkeypatch.context() as patch:
            patch.setattr(crop_merging, "_PAIRS_AT_ONCE", pairs)
            parts = merge_boxes(boxes, scores, numbers, 0.6)
        assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
