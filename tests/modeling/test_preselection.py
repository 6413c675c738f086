"""Representatives of a vocabulary, and the best points of each level."""

import torch
from torch.nn.functional import normalize

from hierkd.modeling.preselection import preselect, vocabulary_representatives


def test_names_that_mean_the_same_are_represented_by_their_mean():
    generator = torch.Generator().manual_seed(0)
    topics = torch.linalg.qr(torch.randn(32, 32, generator=generator)).Q[:10]
    names = topics.repeat(20, 1) + 0.02 * torch.randn(200, 32, generator=generator)
    representatives = vocabulary_representatives(normalize(names, dim=1))
    assert representatives.shape == (25, 32)
    # each of the ten topics has a representative next to it, of nearly full length
    best = (topics @ representatives.T).max(dim=1).values
    assert best.min() > 0.5


def test_a_group_of_opposites_stands_for_nothing():
    (mean,) = vocabulary_representatives(
        torch.eye(2).repeat(2, 1) * torch.tensor([[1], [1], [-1], [-1]])
    )
    assert float(mean.norm()) < 0.8


def test_few_names_have_one_representative_and_many_at_most_512():
    generator = torch.Generator().manual_seed(0)
    assert len(vocabulary_representatives(torch.eye(5))) == 1
    names = normalize(torch.randn(5000, 8, generator=generator), dim=1)
    first, second = (vocabulary_representatives(names) for _ in range(2))
    assert len(first) == 512
    assert torch.equal(first, second)


def test_the_best_of_each_level_in_the_order_of_points():
    scores = torch.tensor([0.1, 0.5, 0.3, 0.9, 0.2, 0.8])
    kept, sizes = preselect(scores, [3, 2, 1], 2)
    assert kept.tolist() == [1, 2, 3, 4, 5]
    assert sizes == [2, 2, 1]
