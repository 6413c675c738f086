"""ProposalEvaluator against hand-made boxes and against a slow count from the definition."""

import itertools
import math

import numpy as np
import pytest

from evaluated_datasets import BASE, IDS, NOVEL, evaluate, proposals, register
from hierkd.evaluation.proposal_evaluation import ProposalEvaluator

METRICS = [f"AR{iou}@{limit}" for iou in (50, 75) for limit in (100, 300, 1000)]


def figures(name, found, limits=ProposalEvaluator.limits):
    """``found``: per image a list of (XYXY box, logit), in any order."""
    evaluator = ProposalEvaluator(name, distributed=False)
    evaluator.limits = limits
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


# ---------------------------------------------------------------------- by reference


def overlap(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    inter = max(width, 0) * max(height, 0)
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)


def slow_recall(images, proposals, wanted, threshold, limit):
    """The best proposal first, each takes the free box that it overlaps most."""
    hits = total = 0
    for objects, found in zip(images, proposals, strict=True):
        free = [box for name, box in objects if name in wanted]
        total += len(free)
        for box, _ in sorted(found, key=lambda pair: -pair[1])[:limit]:
            best = max(free, key=lambda other: overlap(box, other), default=None)
            if best is not None and overlap(box, best) >= threshold:
                free.remove(best)
                hits += 1
    return 100 * hits / total


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_agrees_with_a_slow_count(tmp_path, seed):
    rng = np.random.default_rng(seed)
    images, guesses = [], []
    for _ in range(8):
        objects, found = [], []
        for _ in range(rng.integers(1, 7)):
            x0, y0 = rng.integers(0, 130, size=2)
            width, height = rng.integers(15, 120, size=2)
            box = (int(x0), int(y0), int(x0 + width), int(y0 + height))
            objects.append((str(rng.choice(list(IDS))), box))
            for _ in range(rng.integers(0, 4)):
                noise = rng.normal(scale=0.08, size=4) * [width, height, width, height]
                found.append((tuple((np.array(box) + noise).tolist()), float(rng.normal())))
        images.append(objects)
        guesses.append(found)
    limits = (1, 3, 10)
    results = figures(register(tmp_path, images), guesses, limits=limits)
    for group, wanted in {"base": BASE, "novel": NOVEL, "all": BASE + NOVEL}.items():
        for threshold, limit in itertools.product((0.5, 0.75), limits):
            expected = slow_recall(images, guesses, wanted, threshold, limit)
            assert results[f"{group}/AR{100 * threshold:.0f}@{limit}"] == pytest.approx(expected)
    assert 0 < results["all/AR75@3"] < results["all/AR50@10"] < 100  # the scene says something
