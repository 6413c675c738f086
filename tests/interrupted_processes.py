"""Two processes of which one receives a signal; a module of its own, as spawned ones import it.

    python tests/interrupted_processes.py FOLDER

starts them as ``train_net.py --num-gpus 2`` does, for signals to the process that started them.
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from detectron2.engine import TrainerBase, launch
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from hierkd.checkpoint import HierKDCheckpointer
from hierkd.training.interruption import Interruption, passing_signals_on
from hierkd.training.launch import leave_groups

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
        if self.max_iter != MAX_ITER:
            time.sleep(0.02)
        elif rank == SIGNALLED and self.iter == STOPPING:
            os.kill(os.getpid(), signal.SIGTERM)


def train(folder: Path, max_iter: int) -> None:
    trainer = CountingTrainer(folder)
    interruption = Interruption(HierKDCheckpointer(trainer.model, str(folder)))
    trainer.register_hooks([interruption])
    with interruption.listening():
        trainer.train(0, max_iter)


def process(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=NUM_PROCESSES
    )
    comm.create_local_process_group(NUM_PROCESSES)
    try:
        train(folder, MAX_ITER)
    except SystemExit as error:
        (folder / f"status_{rank}").write_text(str(error.code))
    dist.barrier()
    leave_groups()


if __name__ == "__main__":
    setup_logger()
    setup_logger(name="hierkd")
    with passing_signals_on():
        launch(train, NUM_PROCESSES, dist_url="auto", args=(Path(sys.argv[1]), 100 * MAX_ITER))
