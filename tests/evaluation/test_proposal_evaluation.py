"""ProposalEvaluator against hand-made boxes."""

import math

import pytest

from evaluated_datasets import evaluate, proposals, register
from hierkd.evaluation.proposal_evaluation import ProposalEvaluator

METRICS = [f"AR{iou}@{limit}" for iou in (50, 75) for limit in (100, 300, 1000)]


def figures(name, found):
    """``found``: per image a list of (XYXY box, logit), in any order."""
    evaluator = ProposalEvaluator(name, distributed=False)
    return evaluate(evaluator, [proposals(each) for each in found])


def far_away(number):
    """Proposals that match nothing, all with logits above zero."""
    return [((200, 200, 201 + i % 50, 202 + i % 50), 1.0 + i) for i in range(number)]


WOLF, CAT, DOG = (0, 0, 40, 40), (60, 60, 100, 100), (110, 10, 150, 90)
TWINS = [("cat", (0, 0, 100, 100)), ("cat", (0, 0, 100, 98))]
CROWD = [("cat", CAT), ("cat", (0, 0, 50, 200), "crowd")]
NAN = math.nan
CASES = {
    # Three wolves of which two are found, one dog that is: 3 of 4, not (2/3 + 1) / 2.
    "pools boxes": (
        [[("wolf", WOLF), ("wolf", CAT), ("wolf", (0, 100, 50, 150)), ("dog", DOG)]],
        [[(WOLF, 3), (CAT, 2), (DOG, 1)]],
        {"base/AR50@100": 75, "all/AR50@100": 75, "novel/AR50@100": NAN},
    ),
    "base is not novel": (
        [[("wolf", WOLF), ("cat", CAT)]],
        [[(WOLF, 1)]],
        {"base/AR50@100": 100, "novel/AR50@100": 0, "all/AR50@100": 50},
    ),
    "a box of IoU 0.6": (
        [[("cat", (0, 0, 100, 100))]],
        [[((0, 0, 100, 60), 0)]],
        {"novel/AR50@1000": 100, "novel/AR75@1000": 0},
    ),
    # Found by the 100th, by the 101st and by the 301st proposal of its image.
    "the best alone count": (
        [[("cat", CAT)]] * 3,
        [[(CAT, 0.5), *far_away(n)] for n in (99, 100, 300)],
        {"novel/AR50@100": 100 / 3, "novel/AR50@300": 200 / 3, "novel/AR50@1000": 100},
    ),
    "not beyond the largest limit": (
        [[("cat", CAT)]], [[(CAT, 0.5), *far_away(1000)]], {"novel/AR50@1000": 0}
    ),
    "one proposal covers one box": ([TWINS], [[((0, 0, 100, 99), 0)]], {"novel/AR50@100": 50}),
    "two cover two": ([TWINS], [[((0, 0, 100, 99), 0)] * 2], {"novel/AR50@100": 100}),
    "a crowd region is no box": ([CROWD], [[(CAT, 0)]], {"novel/AR50@100": 100}),
    "nor an excuse": ([CROWD], [[((0, 0, 50, 200), 0)]], {"novel/AR50@100": 0}),
    "a crowd alone": ([[("cat", CAT, "crowd")]], [[(CAT, 0)]], {"novel/AR50@100": NAN}),
    "no proposals": ([[("cat", CAT)]] * 2, [[], []], {"novel/AR50@100": 0}),
    "one of two images": ([[("cat", CAT)]] * 2, [[(CAT, 0)]], {"novel/AR50@100": 50}),
    "an image without boxes": ([[("cat", CAT)], []], [[(CAT, 0)], far_away(50)],
        {"novel/AR50@100": 100}),
}  # fmt: skip


@pytest.mark.parametrize(("images", "found", "expected"), CASES.values(), ids=CASES)
def test_figures_by_hand(tmp_path, images, found, expected):
    results = figures(register(tmp_path, images), found)
    assert {key: results[key] for key in expected} == pytest.approx(expected, nan_ok=True)
    assert set(results) == {f"{g}/{m}" for g in ("base", "novel", "all") for m in METRICS}
