"""Two processes of which one receives a signal; a module of its own, as spawned ones import it."""

import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist
from detectron2.engine import TrainerBase
from detectron2.utils import comm

from hierkd.engine.checkpoint import HierKDCheckpointer
from hierkd.engine.interruption import Interruption

NUM_PROCESSES, MAX_ITER = 2, 1000
STOPPING, SIGNALLED = 3, 1  # the step, and the process, that the signal arrives in


class CountingTrainer(TrainerBase):
    """Does nothing in a step but note it; its processes do not wait for one another in it."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.model = torch.nn.Linear(1, 1)

    def run_step(self) -> None:
        rank = comm.get_rank()
        (self.folder / f"steps_{rank}").write_text(str(self.iter))
        if rank == SIGNALLED and self.iter == STOPPING:
            os.kill(os.getpid(), signal.SIGTERM)


def process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=NUM_PROCESSES
    )
    comm.create_local_process_group(NUM_PROCESSES)
    trainer = CountingTrainer(folder)
    interruption = Interruption(HierKDCheckpointer(trainer.model, str(folder)))
    trainer.register_hooks([interruption])
    try:
        with interruption.listening():
            trainer.train(0, MAX_ITER)
    except SystemExit as error:
        (folder / f"status_{rank}").write_text(str(error.code))
    dist.barrier()
    dist.destroy_process_group()
