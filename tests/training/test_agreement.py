"""What processes must agree on: two real ones with gloo, and one alone."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from detectron2.utils import comm
from torch import nn

from hierkd.training.agreement import broadcast_buffers, in_every_process
from hierkd.training.hooks import FiniteGuard, NonFiniteError
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


class Loss(nn.Module):
    """The loss is what the image says."""

    def forward(self, batch):
        return {"loss_a": batch[0]["image"]}


def guarded(rank):
    """What a process is told about a loss that is infinite in process 1 alone."""
    model = Loss()
    guard = FiniteGuard(model)
    guard.trainer = SimpleNamespace(iter=7)
    model([{"image": torch.tensor(rank * torch.inf if rank else 1.0), "file_name": f"{rank}.png"}])
    try:
        guard.after_backward()
    except NonFiniteError as error:
        return str(error)
    return "nothing"


def process(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    comm.create_local_process_group(2)
    model = nn.BatchNorm1d(2)
    model.running_mean.fill_(rank + 1.0)
    broadcast_buffers(model)
    results = {
        "fails": {who: failing(rank, who) for who in ((), (0,), (1,), (0, 1))},
        "guard": guarded(rank),
        "mean": model.running_mean.tolist(),
    }
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


def test_buffers_become_those_of_the_first_process(results):
    assert [result["mean"] for result in results] == [[1.0, 1.0]] * 2


def test_a_number_that_is_not_finite_ends_all_and_names_whose_images(results):
    told = "iteration 7: in process 1, loss_a is inf; its images are 1.png."
    assert all(result["guard"].startswith(told) for result in results)


def test_one_process_needs_nobody():
    with pytest.raises(FileNotFoundError, match=r"^gone$"), in_every_process("anything"):
        raise FileNotFoundError("gone")
    model = nn.BatchNorm1d(2)
    broadcast_buffers(model)
