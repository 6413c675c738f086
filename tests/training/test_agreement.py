"""What processes must agree on: two real ones with gloo, and one alone."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from detectron2.utils import comm
from torch import nn

from hierkd.training.agreement import (
    broadcast_buffers,
    check_same_weights,
    in_every_process,
)
from hierkd.training.launch import leave_groups


def failing(rank, who):
    """What a process is told about a block that fails in the processes ``who``."""
    try:
        with in_every_process("reading the map"):
            if rank in who:
                raise FileNotFoundError(f"no map for {rank}")
    except (RuntimeError, FileNotFoundError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def told(check, *values):
    try:
        check(*values)
    except ValueError as error:
        return str(error)
    return "nothing"


def process(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    comm.create_local_process_group(2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[1].running_mean.fill_(rank + 1.0)
    results = {
        "fails": {who: failing(rank, who) for who in ((), (0,), (1,), (0, 1))},
        "weights": told(check_same_weights, model),
    }
    broadcast_buffers(model)
    results["mean"] = model[1].running_mean.tolist()
    with torch.no_grad():
        model[0].bias[1] += 0.5 * rank
    results["other weights"] = told(check_same_weights, model)
    torch.save(results, f"{folder}/{rank}.pth")
    dist.barrier()
    leave_groups()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("agreement")
    torch.multiprocessing.start_processes(process, (folder,), 2, start_method="fork")
    return [torch.load(folder / f"{rank}.pth") for rank in range(2)]


def test_a_failure_of_one_ends_all(results):
    for rank, other in ((0, 1), (1, 0)):
        fails = results[rank]["fails"]
        assert fails[()] == "nothing"
        assert fails[(rank,)] == fails[(0, 1)] == f"FileNotFoundError: no map for {rank}"
        assert fails[(other,)].startswith(
            f"RuntimeError: reading the map failed in process {other}"
        )
        assert fails[(other,)].endswith(f"FileNotFoundError: no map for {other}")


def test_weights_must_be_the_same_and_buffers_become_so(results):
    for result in results:
        assert result["weights"] == "nothing"  # though the buffers differed
        assert "the sum of the weights must be the same" in result["other weights"]
        assert "process 0" in result["other weights"]
        assert "process 1" in result["other weights"]
        assert result["mean"] == [1.0, 1.0]


def test_one_process_needs_nobody():
    with pytest.raises(FileNotFoundError, match=r"^gone$"), in_every_process("anything"):
        raise FileNotFoundError("gone")
    model = nn.BatchNorm1d(2)
    check_same_weights(model)
    broadcast_buffers(model)
