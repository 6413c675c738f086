"""Which negatives are kept: counts, fairness, and what must not change."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hierkd.modeling.sampling import subsample_negatives

BACKGROUND = 3


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def labels_of(negatives, positives, ignored):
    """A shuffled label vector with these counts."""
    labels = torch.tensor(
        [BACKGROUND] * negatives + [i % BACKGROUND for i in range(positives)] + [-1] * ignored,
        dtype=torch.int64,
    )
    return labels[torch.randperm(len(labels), generator=seeded())]


def count(labels):
    return int((labels == BACKGROUND).sum())


@settings(max_examples=150, deadline=None)
@given(
    negatives=st.integers(0, 60),
    positives=st.integers(0, 20),
    ignored=st.integers(0, 10),
    mode=st.sampled_from(["fraction", "per_positive"]),
    amount=st.sampled_from([0.001, 0.1, 0.25, 0.5, 0.99, 1.0]),
    seed=st.integers(0, 10),
)
def test_counts_and_what_must_not_change(negatives, positives, ignored, mode, amount, seed):
    labels = labels_of(negatives, positives, ignored)
    before = labels.clone()
    kept = subsample_negatives(labels, BACKGROUND, mode=mode, amount=amount, generator=seeded(seed))
    if mode == "fraction":
        expected = math.floor(amount * negatives)
    else:
        expected = min(negatives, max(1, math.floor(amount * positives)))
    assert count(kept) == expected
    assert torch.equal(labels, before)
    assert kept.dtype == labels.dtype
    changed = kept != labels
    assert (labels[changed] == BACKGROUND).all()
    assert (kept[changed] == -1).all()


def test_the_batch_is_one_pool():
    # image 0 has all the negatives: 10 % of the pool, not of each image; and the shape stays
    labels = torch.full((2, 3, 50), 1)
    labels[0] = BACKGROUND
    kept = subsample_negatives(labels, BACKGROUND, amount=0.1, generator=seeded())
    assert kept.shape == (2, 3, 50)
    assert count(kept[0]) == 15
    assert torch.equal(kept[1], labels[1])


def test_every_negative_has_the_same_chance():
    labels, draws = torch.full((40,), BACKGROUND), 2000
    generator = seeded()
    times = sum(
        (
            subsample_negatives(labels, BACKGROUND, amount=0.25, generator=generator) == BACKGROUND
        ).int()
        for _ in range(draws)
    )
    # binomial of 2000 draws at 1/4: mean 500, standard deviation 19.4; 5 of them
    assert times.sum() == 10 * draws
    assert (times - 500).abs().max() < 97


@pytest.mark.parametrize("mode", ["fraction", "per_positive"])
def test_edges(mode):
    empty = torch.zeros(0, 5, dtype=torch.int64)
    assert subsample_negatives(empty, BACKGROUND, mode=mode).shape == (0, 5)
    only_positives = torch.tensor([0, 1, 2])
    assert torch.equal(subsample_negatives(only_positives, BACKGROUND, mode=mode), only_positives)
    everything = torch.tensor([0, 3, 3, -1])
    amount = 1.0 if mode == "fraction" else 2.0
    kept = subsample_negatives(everything, BACKGROUND, mode=mode, amount=amount)
    assert torch.equal(kept, everything)


def test_without_positives_one_negative_stays():
    labels = torch.full((30,), BACKGROUND)
    assert count(subsample_negatives(labels, BACKGROUND, mode="per_positive", amount=1.0)) == 1


@pytest.mark.parametrize("mode", ["fraction", "per_positive"])
def test_a_pool_without_positives_can_be_left_out(mode):
    none = labels_of(negatives=40, positives=0, ignored=3)
    some = labels_of(negatives=40, positives=4, ignored=3)
    settings = {"mode": mode, "amount": 0.5}
    kept = subsample_negatives(none, BACKGROUND, **settings, only_with_positives=True)
    assert count(kept) == 0
    assert int((kept == -1).sum()) == 43
    same = [
        subsample_negatives(
            some, BACKGROUND, **settings, only_with_positives=only, generator=seeded()
        )
        for only in (False, True)
    ]
    assert torch.equal(*same)


def test_errors_name_both_sides():
    labels = torch.tensor([BACKGROUND])
    with pytest.raises(ValueError, match=r"'fraction', 'per_positive'.*got 'all'"):
        subsample_negatives(labels, BACKGROUND, mode="all")
    for mode, amount in (("fraction", 0.0), ("fraction", 1.5), ("per_positive", -1.0)):
        with pytest.raises(ValueError, match=f"> 0.*got {amount}"):
            subsample_negatives(labels, BACKGROUND, mode=mode, amount=amount)
