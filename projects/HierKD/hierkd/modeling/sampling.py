"""Which negatives take part in the classification loss (§3.4, Table 5).

An unlabelled novel object is a negative to the classifier. Looking at few negatives per step keeps
the detector from learning that novel objects are background.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["NEGATIVE_SAMPLING_MODES", "subsample_negatives"]

NEGATIVE_SAMPLING_MODES = ("fraction", "per_positive")


@torch.no_grad()
def subsample_negatives(
    gt_labels: Tensor,
    background: int,
    *,
    mode: str = "fraction",
    amount: float = 0.1,
    only_with_positives: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Keep a random part of the negatives and mark the others as ignored.

    Args:
        gt_labels: labels of any shape: class in [0, background), ``background``, or -1 = ignored.
        background: the label of a negative (K).
        mode: ``"fraction"`` keeps ``floor(amount * negatives)``; ``"per_positive"`` keeps
            ``floor(amount * positives)``, at least one, at most all.
        amount: 0.1 with ``"fraction"`` is the paper's 10 %, 1.0 keeps all; 1.0 with
            ``"per_positive"`` is Table 5's 1:1.
        only_with_positives: keep no negative at all if there is no positive, as the release does
            level by level.
        generator: random state, for deterministic tests.

    Returns:
        A new label tensor of the same shape in which the negatives not drawn are -1.

    Raises:
        ValueError: for an unknown mode or an amount out of range.
    """
    if mode not in NEGATIVE_SAMPLING_MODES:
        raise ValueError(f"negative sampling is one of {NEGATIVE_SAMPLING_MODES}, got {mode!r}")
    if amount <= 0 or (mode == "fraction" and amount > 1):
        raise ValueError(
            f"the amount of negatives must be > 0 (and <= 1 as a fraction), got {amount}"
        )
    labels = gt_labels.flatten().clone()
    negatives = (labels == background).nonzero().squeeze(1)
    keep = int(amount * len(negatives))
    if only_with_positives or mode == "per_positive":  # counting them waits for a GPU
        positives = int(((labels >= 0) & (labels != background)).sum())
        if only_with_positives and positives == 0:
            keep = 0
        elif mode == "per_positive":
            keep = min(len(negatives), max(1, int(amount * positives)))
    if keep < len(negatives):
        order = torch.randperm(len(negatives), device=labels.device, generator=generator)
        labels[negatives[order[keep:]]] = -1
    return labels.view_as(gt_labels)
