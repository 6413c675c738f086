"""What the processes of a run must agree on, and errors of one that must end all."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from detectron2.utils import comm
from torch import nn

__all__ = ["broadcast_buffers", "in_every_process"]


@contextmanager
def in_every_process(what: str) -> Iterator[None]:
    """Run a block in every process; where it fails in one, it fails in all of them at once.

    Otherwise the others would wait for the failed one until the timeout. The block must not itself
    exchange anything between the processes. With one process it is just run.

    Args:
        what: names the block in the error.

    Raises:
        Exception: in a process whose block failed, what failed there.
        RuntimeError: in the others; it names the first process that failed, its machine, and why.
    """
    if comm.get_world_size() == 1:
        yield
        return
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    told = "" if own is None else f"{type(own).__name__}: {own}"
    found = comm.all_gather((platform.node(), told))
    if own is not None:
        raise own
    for rank, (host, problem) in enumerate(found):
        if problem:
            raise RuntimeError(f"{what} failed in process {rank} (on {host}): {problem}")


def broadcast_buffers(model: nn.Module) -> None:
    """Give every process the buffers of the first, which are those that a checkpoint holds.

    The running statistics of an unsynchronised batch norm are each process's own while it trains.
    """
    if comm.get_world_size() > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, src=0)
