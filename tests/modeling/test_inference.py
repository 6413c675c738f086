"""Inference on tensors: by sorted lists and loops, whatever the size of a block."""

import pytest
import torch
from detectron2.layers import batched_nms
from detectron2.modeling.box_regression import Box2BoxTransform

from hierkd.modeling import inference
from hierkd.modeling.inference import (
    ClassProbabilities,
    DensePredictions,
    best_pairs,
    class_probabilities,
    nms_of_classes,
    rank_points,
)

POINTS, CLASSES = 50, 40


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def probs() -> torch.Tensor:
    return (3 * torch.randn(POINTS, CLASSES, generator=seeded(0))).softmax(dim=1)


@pytest.fixture
def in_blocks(monkeypatch):
    """Probabilities in blocks of so many rows, and how many rows each call computed."""

    def wrap(probs: torch.Tensor, rows: int) -> tuple[ClassProbabilities, list[int]]:
        monkeypatch.setattr(inference, "_BLOCK_ELEMENTS", 1)
        monkeypatch.setattr(inference, "_MIN_BLOCK_ROWS", rows)
        asked: list[int] = []

        def classify(idxs: torch.Tensor) -> torch.Tensor:
            asked.append(len(idxs))
            return probs[idxs[:, 0]]

        points = torch.arange(len(probs))[:, None]
        return ClassProbabilities.of_embeddings(classify, points, CLASSES), asked

    return wrap


QUALITIES = torch.rand(POINTS, generator=seeded(1))


@pytest.mark.parametrize("rows", [1, 7, 50])
def test_blocks_add_up_to_the_whole(probs, in_blocks, rows):
    blocks, asked = in_blocks(probs, rows)
    assert torch.equal(blocks.best, probs.max(dim=1).values)
    assert max(asked) == rows
    assert sum(asked) == POINTS
    assert torch.equal(blocks.whole, probs)
    assert (sum(asked) > POINTS) == (rows < POINTS)  # a small array is computed once
    chosen = torch.tensor([30, 2, 2, 49])
    assert torch.equal(blocks.select(chosen).whole, probs[chosen])
    assert torch.equal(blocks.select(chosen).best, probs[chosen].amax(dim=1))


@pytest.mark.parametrize("rows", [1, 7, 50])
@pytest.mark.parametrize(("limit", "thresh"), [(1, 0.0), (45, 0.0), (0, 0.1), (60, 0.1), (0, 1.0)])
def test_best_pairs_are_those_of_a_sorted_list(probs, in_blocks, rows, limit, thresh):
    everything = sorted(
        (
            (float(probs[i, k] * QUALITIES[i]), i, k)
            for i in range(POINTS)
            for k in range(CLASSES)
            if probs[i, k] > thresh
        ),
        reverse=True,
    )
    expected = everything[: limit or None]
    found = best_pairs(in_blocks(probs, rows)[0], QUALITIES, limit=limit, score_thresh=thresh)
    assert list(zip(*(each.tolist() for each in found), strict=True)) == expected


def test_points_that_cannot_make_a_pair_are_not_classified_again(probs, in_blocks):
    peaked = 0.01 * probs
    peaked[:10] = 0.001
    peaked[:10, 0] = 0.9  # ten points with one sure class each; the rest is far below
    blocks, asked = in_blocks(peaked, 5)
    asked.clear()
    scores, rows, _ = best_pairs(blocks, torch.ones(POINTS), limit=10)
    assert scores.tolist() == pytest.approx([0.9] * 10)
    assert sorted(rows.tolist()) == list(range(10))
    assert sum(asked) == 10


def test_points_are_ranked_level_by_level_and_decoded_by_hand():
    # two levels of three and two points; best classes .5 .9 .2 | .8 .7, qualities 1/2 but one
    classes = ClassProbabilities.of(
        torch.tensor([[0.5, 0.1], [0.9, 0], [0.2, 0.1], [0.1, 0.8], [0.3, 0.7]])
    )
    deltas = torch.zeros(5, 4)
    deltas[1] = torch.tensor([0.5, 0, 0, 0])  # moved by half its width
    qualities = torch.zeros(5)
    qualities[3] = -9.0
    anchors = [
        torch.tensor([[0.0, 0, 10, 10], [10, 0, 20, 10], [20, 0, 30, 10]]),
        torch.tensor([[-5.0, 0, 15, 20], [15, 0, 35, 20]]),
    ]
    transform = Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0))

    def rank(topk, qualities):
        predictions = DensePredictions(torch.zeros(5, 1), deltas, qualities)
        return rank_points(predictions, classes, anchors, transform, (12, 27), topk)

    one = rank(1, qualities)
    assert one.boxes.tolist() == [[15, 0, 25, 10], [15, 0, 27, 12]]
    torch.testing.assert_close(one.scores, torch.tensor([0.45, 0.35]))
    torch.testing.assert_close(one.probs, torch.tensor([[0.9, 0], [0.3, 0.7]]))
    many = rank(9, None)  # more than a level has; no quality branch
    torch.testing.assert_close(many.scores, torch.tensor([0.9, 0.5, 0.2, 0.8, 0.7]))
    assert many.best(2).boxes.tolist() == [[15, 0, 25, 10], [0, 0, 15, 12]]
    assert many.best(5) is many


def test_a_shift_multiplies_the_odds_and_leaves_the_chance_of_an_object():
    logits = torch.randn(7, 5, dtype=torch.float64, generator=seeded(2))
    plain = class_probabilities(logits, None)
    torch.testing.assert_close(plain, logits.softmax(dim=1)[:, :4])
    shifted = class_probabilities(logits, torch.tensor([0.0, 1.5, 0.0, 1.5]))
    odds = (shifted[:, :, None] / shifted[:, None]) / (plain[:, :, None] / plain[:, None])
    e = float(torch.tensor(1.5).exp())
    expected = torch.tensor([[1, 1 / e, 1, 1 / e], [e, 1, e, 1]] * 2, dtype=torch.float64)
    torch.testing.assert_close(odds, expected.expand(7, 4, 4))
    torch.testing.assert_close(shifted.sum(dim=1), plain.sum(dim=1))


def many_boxes(side: float) -> tuple[torch.Tensor, torch.Tensor]:
    corners = 1300 * torch.rand(900, 2, generator=seeded(0))
    boxes = torch.cat([corners, corners + 5 + side * torch.rand(900, 2, generator=seeded(1))], 1)
    boxes = boxes[torch.randint(0, 300, (900,), generator=seeded(2))]  # many coincide
    boxes[:, 2:] += torch.rand(900, 2, generator=seeded(3))  # all over the range of IoUs
    return boxes, torch.rand(900, generator=seeded(4))


def test_few_classes_with_large_numbers_are_told_apart_exactly():
    boxes, scores = many_boxes(60)
    classes = torch.randint(0, 40, (900,), generator=seeded(5))
    kept = nms_of_classes(boxes, scores, classes, 0.6, 900)
    assert torch.equal(kept, nms_of_classes(boxes, scores, classes * 100_000 + 7, 0.6, 900))
    assert torch.equal(kept[:17], nms_of_classes(boxes, scores, classes, 0.6, 17))


@pytest.mark.parametrize("first", [0, 19_000])
def test_nms_of_many_classes_is_that_of_each_class(first):
    boxes, scores = many_boxes(300)
    classes = first + torch.randint(0, 300, (900,), generator=seeded(5))
    expected = [
        (classes == k).nonzero().squeeze(1)[batched_nms(boxes[m], scores[m], classes[m], 0.4)]
        for k in classes.unique()
        for m in [classes == k]
    ]
    kept = nms_of_classes(boxes, scores, classes, 0.4, 900)
    assert len(kept) < 900
    assert set(kept.tolist()) == set(torch.cat(expected).tolist())
    assert (scores[kept].diff() <= 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("names", [40, 300])
def test_nms_on_a_gpu_equals_that_on_the_cpu(names):
    boxes, scores = many_boxes(300)
    given = boxes, scores, torch.randint(0, names, (900,), generator=seeded(5))
    kept = nms_of_classes(*(each.cuda() for each in given), 0.4, 900)
    assert torch.equal(kept.cpu(), nms_of_classes(*given, 0.4, 900))
