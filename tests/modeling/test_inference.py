"""Blocks of class probabilities: the numbers of the whole array, whatever the size of a block."""

import pytest
import torch
from detectron2.layers import batched_nms

from hierkd.modeling.inference import ClassProbabilities, best_pairs, nms_of_classes

POINTS, CLASSES = 50, 40


@pytest.fixture
def probs() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (3 * torch.randn(POINTS, CLASSES, generator=generator)).softmax(dim=1)


def qualities() -> torch.Tensor:
    return torch.rand(POINTS, generator=torch.Generator().manual_seed(1))


def in_blocks(probs: torch.Tensor, rows: int) -> tuple[ClassProbabilities, list[int]]:
    """Probabilities in blocks of so many rows, and how many rows each call computed."""
    asked: list[int] = []

    def classify(idxs: torch.Tensor) -> torch.Tensor:
        asked.append(len(idxs))
        return probs[idxs[:, 0]]

    points = torch.arange(len(probs))[:, None]
    return ClassProbabilities(classify, points, CLASSES, block_rows=rows), asked


@pytest.mark.parametrize("rows", [1, 7, 49, 50, 1000])
def test_blocks_add_up_to_the_whole(probs, rows):
    blocks, asked = in_blocks(probs, rows)
    assert torch.equal(blocks.best, probs.max(dim=1).values)
    assert torch.equal(blocks.whole, probs)
    assert max(asked) <= rows
    chosen = torch.tensor([30, 2, 2, 49])
    assert torch.equal(blocks.select(chosen).whole, probs[chosen])
    assert torch.equal(blocks.select(chosen).best, probs[chosen].amax(dim=1))


def test_a_small_array_is_computed_once(probs):
    blocks, asked = in_blocks(probs, POINTS)
    _ = blocks.best, blocks.whole, blocks.select(torch.tensor([1, 2])).whole
    assert asked == [POINTS]


@pytest.mark.parametrize("rows", [1, 7, 50])
@pytest.mark.parametrize("limit", [1, 20, 45, 60, 0])
@pytest.mark.parametrize("thresh", [0.0, 0.1, 0.6])
def test_best_pairs_are_those_of_a_sorted_list(probs, rows, limit, thresh):
    blocks, _ = in_blocks(probs, rows)
    factors = qualities()
    everything = sorted(
        (
            (float(probs[i, k] * factors[i]), i, k)
            for i in range(POINTS)
            for k in range(CLASSES)
            if probs[i, k] > thresh
        ),
        reverse=True,
    )
    expected = everything[:limit] if limit else everything
    found = best_pairs(blocks, factors, limit=limit, score_thresh=thresh)
    assert [each.tolist() for each in found] == [list(each) for each in zip(*expected, strict=True)]


def test_points_that_cannot_make_a_pair_are_not_classified_again(probs):
    peaked = probs.clone()
    peaked[:10] = 0.001
    peaked[:10, 0] = 0.9  # ten points with one sure class each; the rest is far below
    peaked[10:] *= 0.01
    blocks, asked = in_blocks(peaked, 5)
    _ = blocks.best
    asked.clear()
    scores, rows, _ = best_pairs(blocks, torch.ones(POINTS), limit=10)
    assert scores.tolist() == pytest.approx([0.9] * 10)
    assert sorted(rows.tolist()) == list(range(10))
    assert sum(asked) <= 15


def test_nothing_over_the_threshold_gives_no_pairs(probs):
    for rows in (7, 50):
        blocks, _ = in_blocks(probs, rows)
        assert [len(x) for x in best_pairs(blocks, qualities(), score_thresh=1.0)] == [0, 0, 0]


def test_few_classes_with_large_numbers_are_told_apart_exactly():
    generator = torch.Generator().manual_seed(0)
    corners = 1300 * torch.rand(900, 2, generator=generator)
    boxes = torch.cat([corners, corners + 5 + 60 * torch.rand(900, 2, generator=generator)], 1)
    boxes = boxes[torch.randint(0, 300, (900,), generator=generator)]
    boxes[:, 2:] += torch.rand(900, 2, generator=generator)  # all over the range of IoUs
    scores = torch.rand(900, generator=generator)
    classes = torch.randint(0, 40, (900,), generator=generator)
    assert torch.equal(
        nms_of_classes(boxes, scores, classes, 0.6),
        nms_of_classes(boxes, scores, classes * 100_000 + 7, 0.6),
    )


@pytest.mark.parametrize("first", [0, 19_000])
def test_nms_of_many_classes_is_that_of_each_class(first):
    generator = torch.Generator().manual_seed(0)
    corners = 1200 * torch.rand(900, 2, generator=generator)
    boxes = torch.cat([corners, corners + 20 + 300 * torch.rand(900, 2, generator=generator)], 1)
    boxes = boxes[torch.randint(0, 300, (900,), generator=generator)]  # many coincide
    scores = torch.rand(900, generator=generator)
    classes = first + torch.randint(0, 300, (900,), generator=generator)
    expected = [
        (classes == k).nonzero().squeeze(1)[batched_nms(boxes[m], scores[m], classes[m], 0.4)]
        for k in classes.unique()
        for m in [classes == k]
    ]
    kept = nms_of_classes(boxes, scores, classes, 0.4)
    assert len(kept) < 900
    assert set(kept.tolist()) == set(torch.cat(expected).tolist())
    assert (scores[kept].diff() <= 0).all()
