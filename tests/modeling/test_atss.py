"""The ATSS assignment by hand and at edges; tests/reference has its algorithm."""

import math

import pytest
import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.structures import Boxes

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
