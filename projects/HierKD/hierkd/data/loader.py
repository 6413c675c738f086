"""The training loader: an endless stream of batches that can start at any iteration.

detectron2's own loader restarts its stream when training resumes. Here the order of the images, the
grouping by aspect ratio and the augmentation of each sample are functions of the seed and of the
sample's position in the stream alone, so a resumed run sees exactly what an uninterrupted one would
have seen, with any number of worker processes.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetFromList
from detectron2.data.build import trivial_batch_collator
from detectron2.data.samplers import TrainingSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler

__all__ = ["TrainingBatchSampler", "await_main_process", "build_resumable_train_loader"]

_SampleKey = tuple[int, int]  # (position in the stream of all processes, index of the image)
_Mapper = Callable[[dict[str, Any]], dict[str, Any] | None]

# How many other images stand in for one that the mapper refuses before giving up. [ours]
_MAX_STAND_INS = 100

_LEAVING = (signal.ITIMER_REAL, 60.0)  # [ours] seconds; twice what SLURM and torchrun give


@contextmanager
def _seeded_rng(*seed: int) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's CPU generators inside the block; restore them after it."""
    words = np.random.SeedSequence(seed).generate_state(3)
    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.default_generator.manual_seed(int(words[2]))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.random.set_rng_state(states[2])


class TrainingBatchSampler(Sampler[list[_SampleKey]]):
    """Endless batches of one process, each of landscape or of portrait images only.

    ``start_iter`` batches are left out at the start of the stream; set it before the first batch
    is drawn. Leaving out costs no image. ``seed`` is the same on every process.
    """

    def __init__(self, is_landscape: Sequence[bool], batch_size: int, seed: int) -> None:
        self._is_landscape = is_landscape
        self._batch_size = batch_size
        self._indices = TrainingSampler(len(is_landscape), shuffle=True, seed=seed)
        self.start_iter = 0

    def __iter__(self) -> Iterator[list[_SampleKey]]:
        """Yield batches of (position, index), from ``start_iter`` on."""
        rank, world_size = comm.get_rank(), comm.get_world_size()
        pending: dict[bool, list[_SampleKey]] = {False: [], True: []}
        complete = 0
        for step, index in enumerate(self._indices):
            batch = pending[self._is_landscape[index]]
            batch.append((rank + step * world_size, index))
            if len(batch) == self._batch_size:
                pending[self._is_landscape[index]] = []
                complete += 1
                if complete > self.start_iter:
                    yield batch


class _SeededSamples(Dataset[dict[str, Any]]):
    """Maps each sample under a random state of its own.

    That state also draws the stand-in for an image that the mapper refuses; detectron2's MapDataset
    draws it from one that depends on what the same worker has read before.
    """

    def __init__(self, records: Sequence[dict[str, Any]], mapper: _Mapper, seed: int) -> None:
        self._records, self._mapper, self._seed = records, mapper, seed

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, key: _SampleKey) -> dict[str, Any]:
        position, index = key
        total = len(self._records)
        most = min(total, _MAX_STAND_INS)
        with _seeded_rng(self._seed, position):
            sample = self._mapper(self._records[index])
            if sample is not None:
                return sample
            for stand_in in random.sample(range(total), most):
                sample = self._mapper(self._records[stand_in])
                if sample is not None:
                    return sample
        raise ValueError(
            f"DATASETS.TRAIN: image {index} of {total} cannot be used, nor can {most} others drawn "
            "in its place"
        )


def await_main_process(worker_id: int) -> None:
    """Let a loader process outlive the signals that end a training; its main process ends it.

    The main process finishes its step and saves first, and may still need samples for that. A
    loader process that is not gone 60 seconds after a SIGTERM goes by itself; one whose main
    process was killed notices that within seconds (torch).
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.setitimer(*_LEAVING))


def build_resumable_train_loader(
    dataset_dicts: list[dict[str, Any]],
    mapper: _Mapper,
    *,
    total_batch_size: int,
    num_workers: int,
    seed: int,
) -> DataLoader[dict[str, Any]]:
    """Build the training loader.

    Args:
        dataset_dicts: detectron2 dataset dicts with ``width`` and ``height``.
        mapper: dict -> training sample; for None another image, of any aspect ratio, is taken.
        total_batch_size: images per step over all processes.
        num_workers: loader processes per training process.
        seed: of the stream; negative = drawn at random, then a resumed run differs.

    Returns:
        A loader of lists of samples; its ``batch_sampler`` is a :class:`TrainingBatchSampler`.

    Raises:
        ValueError: if there is no image, or the batch does not divide among the processes.
    """
    world_size = comm.get_world_size()
    if not dataset_dicts:
        raise ValueError("DATASETS.TRAIN holds no image with a usable annotation")
    if total_batch_size < world_size or total_batch_size % world_size:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH ({total_batch_size}) must be a positive multiple of the number "
            f"of processes ({world_size})"
        )
    if seed < 0:
        seed = comm.shared_random_seed()
    records = DatasetFromList(dataset_dicts, copy=False)  # serialised: workers share the memory
    sampler = TrainingBatchSampler(
        [d["width"] > d["height"] for d in dataset_dicts], total_batch_size // world_size, seed
    )
    return DataLoader(
        _SeededSamples(records, mapper, seed),
        batch_sampler=sampler,
        num_workers=num_workers,
        collate_fn=trivial_batch_collator,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
        worker_init_fn=await_main_process,
        # Else starting to iterate would draw from torch's global generator: a resumed run does that
        # in the middle of training, and its first step would see other random numbers.
        generator=torch.Generator().manual_seed(seed),
    )
