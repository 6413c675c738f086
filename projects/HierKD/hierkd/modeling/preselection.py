"""Which points of a picture are worth comparing with every name of a very large vocabulary.

Letters: R points of an image · D embedding size · K classes · G groups of classes.

Comparing the 22,000 points of a picture of 1333 x 800 pixels with 20,000 names takes as many
operations as backbone, FPN and head together, and nearly all of it is spent on background. Above
``MODEL.ATSS.PRESELECT_ABOVE`` names, points are therefore ranked by some hundred representatives of
the vocabulary first, and only the best of each level meet all names; those are scored exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["preselect", "vocabulary_representatives"]

# Groups, and steps of k-means on the sphere: half a second for 20,000 names of 512 numbers. [ours]
_MAX_GROUPS = 512
_NAMES_PER_GROUP = 8
_STEPS = 8


@torch.no_grad()
def vocabulary_representatives(text_embeddings: Tensor) -> Tensor:
    """Means of the groups that a vocabulary falls into.

    A mean is not normalised: its cosine with an embedding is the mean over its group, so a group of
    names that have nothing in common, whose mean is short, stands for little.

    Args:
        text_embeddings: (K, D), L2-normalised.

    Returns:
        (G, D) with G = K / 8, at least 1 and at most 512. The same for the same vocabulary.
    """
    num_groups = max(1, min(_MAX_GROUPS, len(text_embeddings) // _NAMES_PER_GROUP))
    generator = torch.Generator().manual_seed(0)
    first = torch.randperm(len(text_embeddings), generator=generator)[:num_groups]
    means = centers = text_embeddings[first.to(text_embeddings.device)]
    for _ in range(_STEPS):
        groups = (text_embeddings @ centers.T).argmax(dim=1)
        sizes = groups.bincount(minlength=num_groups).clamp(min=1)
        sums = torch.zeros_like(centers).index_add_(0, groups, text_embeddings)
        means = sums / sizes[:, None]
        centers = F.normalize(means, dim=1)
    return means


def preselect(scores: Tensor, level_sizes: list[int], number: int) -> tuple[Tensor, list[int]]:
    """The best points of each level.

    Args:
        scores: (R,) whatever ranks the points.
        level_sizes: points of each level, R in all.
        number: to keep of each level; levels that have no more are kept whole.

    Returns:
        Indices in [0, R), ascending, and how many of them are of each level.
    """
    kept, start = [], 0
    for of_level in scores.split(level_sizes):
        top = of_level.topk(min(number, len(of_level))).indices
        kept.append(top.sort().values + start)
        start += len(of_level)
    return torch.cat(kept), [len(each) for each in kept]
