"""Multi-layer cross attention (MLCA, §3.3): how well an image matches a caption.

Letters: N images · L levels · G grid size · Q = L*G*G patches · D embedding size · C captions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.utils import comm
from torch import Tensor, nn

from hierkd.modeling.text_classifier import LOGIT_SCALE_RANGE

__all__ = ["MLCA", "POOLING_MODES", "gather_rows"]

POOLING_MODES = ("max", "avg")


class MLCA(nn.Module):
    """Score every image of the batch against every caption of the batch (Eq. 3, Eq. 4).

    Each level's embedding map is pooled to a G x G grid; all levels' patches together are the keys
    and values, each caption is one query::

        e_ij = <T_C, P_ij>                    response of patch (i, j)                 (Eq. 3)
        P_C  = sum_ij softmax_ij(e_ij) P_ij   the image as this caption looks at it
        <I, C> = cos(P_C, T_C)                times tau_m                              (Eq. 4)

    Patches are L2-normalised before they are used as keys and values, as in the released code: the
    classifier looks at directions only, so a patch's length carries no meaning.

    Attributes:
        logit_scale: tau_m, a learned scalar that multiplies the cosines; absent (None) when the
            scores are to stay plain cosines.
    """

    def __init__(
        self,
        *,
        grid_size: int = 3,
        pooling: str = "max",
        logit_scale: float | None = 10.0,
    ) -> None:
        super().__init__()
        if grid_size < 1:
            raise ValueError(f"the patch grid needs at least one cell, got grid_size={grid_size}")
        if pooling not in POOLING_MODES:
            raise ValueError(f"pooling is one of {POOLING_MODES}, got {pooling!r}")
        self.grid_size = grid_size
        self.pooling = pooling
        self.logit_scale = (
            None if logit_scale is None else nn.Parameter(torch.tensor(float(logit_scale)))
        )

    @torch.no_grad()
    def limit_logit_scale(self) -> None:
        """Bring tau_m, if there is one, back into its range; inside of it nothing changes."""
        if self.logit_scale is not None:
            self.logit_scale.clamp_(*LOGIT_SCALE_RANGE)

    def pool_patches(self, embedding_maps: Sequence[Tensor]) -> Tensor:
        """Pool every level to G x G patches.

        Args:
            embedding_maps: L maps (N, D, H_l, W_l).

        Returns:
            (N, Q, D) patches, L2-normalised, level by level, row by row.
        """
        pool = F.adaptive_max_pool2d if self.pooling == "max" else F.adaptive_avg_pool2d
        patches = [pool(x, self.grid_size).flatten(2) for x in embedding_maps]
        return F.normalize(torch.cat(patches, dim=2).transpose(1, 2), dim=2)

    def forward(self, embedding_maps: Sequence[Tensor], caption_embeddings: Tensor) -> Tensor:
        """Match scores of all pairs.

        Args:
            embedding_maps: L maps (N, D, H_l, W_l): the student's ``pred_embeddings``.
            caption_embeddings: (C, D), L2-normalised, from the teacher.

        Returns:
            (N, C) scores: cosines times tau_m (plain cosines without a ``logit_scale``).
        """
        patches = self.pool_patches(embedding_maps)
        responses = torch.einsum("nqd,cd->ncq", patches, caption_embeddings)  # e_ij of Eq. 3
        aggregated = responses.softmax(dim=2) @ patches  # (N, C, D): P_I^C of Eq. 3
        cosines = (F.normalize(aggregated, dim=2) * caption_embeddings).sum(dim=2)  # Eq. 4
        return cosines if self.logit_scale is None else self.logit_scale * cosines


def gather_rows(rows: Tensor) -> Tensor:
    """Join the rows of all processes, in the order of the processes.

    Gradients reach the rows of this process, multiplied by the number of processes W. Two reasons,
    one factor: every process computes the same function of the joined rows, so the gradient of
    their sum is W times that of one, known without sending anything back; and data-parallel
    training *averages* what the W processes found, whereas the gradients by way of the rows of
    different processes are parts of one sum.

    Args:
        rows: (n, ...); n may differ among the processes, all else must be the same.

    Returns:
        (sum of all n, ...); with one process ``rows`` itself.

    Raises:
        ValueError: if the rows of the processes differ in more than n; each process raises it.
    """
    if comm.get_world_size() == 1:
        return rows
    # Their forms first: tensors of unequal sizes cannot be exchanged as they are.
    forms = comm.all_gather((len(rows), tuple(rows.shape[1:]), str(rows.dtype)))
    if len({form[1:] for form in forms}) > 1:
        raise ValueError(
            "rows of different processes must agree in all but their number, found "
            f"(number, shape of a row, type) = {forms}"
        )
    joined: Tensor = _GatherRows.apply(rows, [form[0] for form in forms])
    return joined


class _GatherRows(torch.autograd.Function):
    """Exchange rows, padded to the longest share; see :func:`gather_rows` for the gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, numbers: list[int]) -> Tensor:
        rank = comm.get_rank()
        ctx.own = slice(sum(numbers[:rank]), sum(numbers[: rank + 1]))
        padded = rows.new_zeros(max(numbers), *rows.shape[1:])
        padded[: len(rows)] = rows
        shares = [torch.empty_like(padded) for _ in numbers]
        torch.distributed.all_gather(shares, padded)
        return torch.cat([share[:number] for share, number in zip(shares, numbers, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[ctx.own] * comm.get_world_size(), None
