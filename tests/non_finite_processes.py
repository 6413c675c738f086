"""What the processes of test_non_finite.py do. A module of its own: spawned processes import it."""

from pathlib import Path

import torch
import torch.distributed as dist
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hierkd.training.launch import leave_groups
from hierkd.training.non_finite import NonFiniteGuard

NUM_PROCESSES = 2


class ToyDetector(nn.Module):
    """Two losses of one weight; an image says what goes wrong with it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.norm = nn.BatchNorm1d(1)

    def forward(self, batch):
        x = torch.stack([sample["image"] for sample in batch])
        y = self.norm(self.layer(x))
        loss = y.square().mean()
        offset = sum(sample.get("offset", 0.0) for sample in batch)  # no gradient
        steep = (0.0 * self.layer.weight).sum().abs().sqrt()  # 0, and its derivative is NaN
        wrong = steep if any(sample.get("steep") for sample in batch) else 0.0 * steep.detach()
        return {"loss_a": loss, "loss_b": loss + offset + wrong}


def images(count=3, **wrong):
    """A batch; ``wrong`` goes to its last image."""
    generator = torch.Generator().manual_seed(0)
    batch = [
        {"image": torch.randn(1, generator=generator), "file_name": f"{i}.png"}
        for i in range(count)
    ]
    batch[-1] |= wrong
    return batch


def build_trainer(folder, batches, trainer_class=SimpleTrainer, model=None, **arguments):
    """A trainer of the toy with the guard, and with a large step, so that a step is seen."""
    torch.manual_seed(0)
    model = ToyDetector() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    trainer = trainer_class(model, batches, optimizer, **arguments)
    trainer.register_hooks([NonFiniteGuard(model, Path(folder), state=trainer.state_dict)])
    return trainer


def process(rank, folder, wrong):
    """Train; the second image batch of process 1 is wrong. Leaves ``<rank>.txt`` with the error."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=NUM_PROCESSES
    )
    comm.create_local_process_group(NUM_PROCESSES)
    torch.manual_seed(0)
    model = DistributedDataParallel(ToyDetector())
    bad = images(**wrong) if rank == 1 else images()
    trainer = build_trainer(folder, [images(), bad, images()], model=model)
    try:
        trainer.train(0, 3)
    except FloatingPointError as error:
        (Path(folder) / f"{rank}.txt").write_text(f"{type(error).__name__}: {error}")
    leave_groups()
