"""The ATSS assignment against Algorithm 1 of its paper, written as loops over numbers."""

import math
import statistics

import numpy as np
import pytest
import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.structures import Boxes
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hierkd.modeling.atss import ATSSMatcher

STRIDES = (8, 16, 32)


def make_anchors(height, width, *, offset=0.0, scale=8, strides=STRIDES):
    """One square anchor of ``scale`` strides per point, as detectron2 lays them out."""
    generator = DefaultAnchorGenerator(
        sizes=[[scale * s] for s in strides],
        aspect_ratios=[[1.0]],
        strides=list(strides),
        offset=offset,
    )
    return generator(
        [torch.zeros(1, 1, math.ceil(height / s), math.ceil(width / s)) for s in strides]
    )


def boxes_of(rows):
    return Boxes(torch.tensor(rows, dtype=torch.float32).reshape(-1, 4))


def random_boxes(rng, m, height, width):
    left, top = rng.uniform(-10, width * 0.8, m), rng.uniform(-10, height * 0.8, m)
    w, h = rng.uniform(2, width, m), rng.uniform(2, height, m)
    return boxes_of(np.stack([left, top, left + w, top + h], axis=1))


class TooCloseError(Exception):
    """Two numbers the algorithm compares differ by less than float32 can tell."""


def tell_apart(a, b, tolerance):
    if abs(a - b) < tolerance:
        raise TooCloseError


def reference(gt_boxes, anchors, topk):
    """Algorithm 1 of Zhang et al., in Python floats; refuses cases that hang on rounding."""

    def iou(a, b):
        w = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
        h = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
        both = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
        return w * h / (both - w * h)

    def center(b):
        return (b[0] + b[2]) / 2, (b[1] + b[3]) / 2

    levels = [level.tensor.double().tolist() for level in anchors]
    owner = {}  # anchor -> (IoU, box)
    for g, gt in enumerate(gt_boxes.tensor.double().tolist()):
        candidates, start = [], 0  # C_g
        for level in levels:
            order = sorted(range(len(level)), key=lambda i: math.dist(center(level[i]), center(gt)))
            if len(order) > topk:
                last, first_out = order[topk - 1], order[topk]
                tell_apart(
                    math.dist(center(level[last]), center(gt)),
                    math.dist(center(level[first_out]), center(gt)),
                    1e-3,
                )
            candidates += [(start + i, level[i]) for i in order[:topk]]
            start += len(level)
        overlaps = [iou(anchor, gt) for _, anchor in candidates]  # D_g
        threshold = statistics.mean(overlaps) + statistics.stdev(overlaps)  # m_g + v_g
        for (index, anchor), overlap in zip(candidates, overlaps, strict=True):
            x, y = center(anchor)
            depth = min(x - gt[0], y - gt[1], gt[2] - x, gt[3] - y)
            tell_apart(depth, 0.01, 1e-3)
            tell_apart(overlap, threshold, 1e-5)
            if overlap >= threshold and depth > 0.01:
                if index in owner:
                    tell_apart(overlap, owner[index][0], 1e-5)
                owner[index] = max(owner.get(index, (-1.0, -1)), (overlap, g))
    total = sum(len(level) for level in levels)
    matches = torch.tensor([owner.get(i, (0, 0))[1] for i in range(total)])
    return matches, torch.tensor([int(i in owner) for i in range(total)], dtype=torch.int8)


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    m=st.integers(1, 6),
    topk=st.sampled_from([2, 4, 9, 40]),
    size=st.sampled_from([(96, 128), (64, 64), (130, 40)]),
    offset=st.sampled_from([0.0, 0.5]),
    scale=st.sampled_from([2, 5, 8]),
)
def test_equals_the_algorithm(seed, m, topk, size, offset, scale):
    gt_boxes = random_boxes(np.random.default_rng(seed), m, *size)
    anchors = make_anchors(*size, offset=offset, scale=scale)
    try:
        expected = reference(gt_boxes, anchors, topk)
    except TooCloseError:
        assume(False)
    matches, labels = ATSSMatcher(topk)(gt_boxes, anchors)
    assert torch.equal(labels, expected[1])
    assert torch.equal(matches, expected[0])


def test_the_random_cases_hold_positives_and_conflicts():
    # or the property above would compare zeros
    positives = conflicts = 0
    for seed in range(30):
        gt_boxes = random_boxes(np.random.default_rng(seed), 5, 96, 128)
        anchors = make_anchors(96, 128)
        positives += int(ATSSMatcher()(gt_boxes, anchors)[1].sum())
        alone = sum(int(ATSSMatcher()(gt_boxes[i], anchors)[1].sum()) for i in range(5))
        conflicts += alone - int(ATSSMatcher()(gt_boxes, anchors)[1].sum())
    assert positives > 300
    assert conflicts > 30


ROW = boxes_of([[0, 0, 10, 10], [10, 0, 20, 10], [20, 0, 30, 10]])  # centres x = 5, 15, 25


def test_by_hand_one_box():
    # IoUs .625, .3, 0: mean .308, sample deviation .313, threshold .621
    matches, labels = ATSSMatcher(3)(boxes_of([[0, 0, 16, 10]]), [ROW])
    assert labels.tolist() == [1, 0, 0]
    assert matches.tolist() == [0, 0, 0]


def test_by_hand_equal_candidates_are_all_positive():
    # the two nearest have IoU 1/2 each: threshold 1/2, reached by both; the third is no candidate
    assert ATSSMatcher(2)(boxes_of([[0, 0, 20, 10]]), [ROW])[1].tolist() == [1, 1, 0]
    # with the third (IoU 0) the threshold is 1/3 + .289 = .622: nobody reaches it
    assert ATSSMatcher(3)(boxes_of([[0, 0, 20, 10]]), [ROW])[1].tolist() == [0, 0, 0]


def test_by_hand_the_deviation_is_the_sample_one():
    # IoUs 1 and 0: threshold 1/2 + sqrt(1/2) > 1; the population's would be 1/2 + 1/2
    assert ATSSMatcher(2)(boxes_of([[0, 0, 10, 10]]), [ROW])[1].tolist() == [0, 0, 0]


def test_by_hand_the_centre_must_lie_inside():
    # candidate 0 has IoU .4 > mean .2 and is alone above it, but its centre x = 5 is outside
    anchors = boxes_of([[0, 0, 10, 10], [60, 0, 70, 10], [80, 0, 90, 10], [100, 0, 110, 10]])
    inside = ATSSMatcher(4)(boxes_of([[4.9, 0, 10, 10]]), [anchors])[1]
    assert inside.tolist() == [1, 0, 0, 0]
    on_the_border = ATSSMatcher(4)(boxes_of([[5.0, 0, 10, 10]]), [anchors])[1]
    assert on_the_border.tolist() == [0, 0, 0, 0]


def test_by_hand_every_level_gives_candidates():
    fine, coarse = ROW, boxes_of([[0, 0, 20, 20], [20, 0, 40, 20]])
    # one candidate per level. IoU with the fine anchor 1: with the coarse one 1/4;
    # threshold .625 + .530 = 1.155
    assert ATSSMatcher(1)(boxes_of([[0, 0, 10, 10]]), [fine, coarse])[1].sum() == 0
    # one level, one candidate: its own IoU is the threshold
    assert ATSSMatcher(1)(boxes_of([[0, 0, 10, 10]]), [fine])[1].tolist() == [1, 0, 0]
    # the same IoU 1/2 on both levels: a deviation of zero
    fine, coarse = boxes_of([[0, 0, 20, 10]]), boxes_of([[-10, 0, 30, 20]])
    assert ATSSMatcher(1)(boxes_of([[0, 0, 20, 20]]), [fine, coarse])[1].tolist() == [1, 1]


def test_by_hand_a_contested_anchor_goes_to_the_higher_iou():
    anchor = [boxes_of([[0, 0, 10, 10]])]
    loose, tight = [0, 0, 20, 10], [0, 0, 11, 10]
    matches, labels = ATSSMatcher(1)(boxes_of([loose, tight]), anchor)
    assert (matches.item(), labels.item()) == (1, 1)
    matches, labels = ATSSMatcher(1)(boxes_of([tight, loose]), anchor)
    assert (matches.item(), labels.item()) == (0, 1)


def test_no_boxes_is_all_background():
    anchors = make_anchors(64, 64)
    matches, labels = ATSSMatcher()(boxes_of([]), anchors)
    total = sum(len(level) for level in anchors)
    assert matches.shape == labels.shape == (total,)
    assert matches.sum() == labels.sum() == 0
    assert (matches.dtype, labels.dtype) == (torch.int64, torch.int8)


@pytest.mark.parametrize("box", [[30, 30, 30, 30], [30, 10, 30, 50], [500, 500, 560, 560]])
def test_zero_area_and_far_away_boxes_match_nothing(box):
    assert ATSSMatcher()(boxes_of([box]), make_anchors(64, 64))[1].sum() == 0
    good = [8.5, 9.5, 55, 52]  # and do not disturb their neighbours
    anchors = make_anchors(64, 64)
    matches, labels = ATSSMatcher()(boxes_of([box, good]), anchors)
    alone = ATSSMatcher()(boxes_of([good]), anchors)[1]
    assert torch.equal(labels, alone)
    assert labels.sum() > 0
    assert (matches[labels == 1] == 1).all()
