"""Rows of every process in every process, with gradients: for a contrast over all processes."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.utils import comm
from torch import Tensor

__all__ = ["gather_rows"]


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
