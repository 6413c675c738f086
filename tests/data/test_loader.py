"""The training stream: resumable, the same with any number of workers, grouped, and shared out."""

import random
from itertools import islice

import numpy as np
import pytest
import torch
from detectron2.utils import comm
from hypothesis import given, settings
from hypothesis import strategies as st

from hierkd.data.loader import TrainingBatchSampler, build_resumable_train_loader


def dataset(n=23):
    """Every third image is a portrait, every fifth a square."""
    sizes = [(30, 40) if i % 3 == 0 else (35, 35) if i % 5 == 0 else (40, 30) for i in range(n)]
    return [{"image_id": i, "width": w, "height": h} for i, (w, h) in enumerate(sizes)]


def draw(record):
    """A mapper that augments with all three generators, as detectron2's and ours do."""
    numbers = (random.random(), float(np.random.rand()), torch.rand(()).item())
    return record | {"drawn": numbers}


def draw_or_refuse(record):
    """Every fourth image is broken."""
    return None if record["image_id"] % 4 == 0 else draw(record)


def loader(n=23, *, mapper=draw, batch=4, num_workers=0, seed=7, start_iter=0):
    built = build_resumable_train_loader(
        dataset(n), mapper, total_batch_size=batch, num_workers=num_workers, seed=seed
    )
    built.batch_sampler.start_iter = start_iter
    return built


def take(count, **kwargs):
    return list(islice(loader(**kwargs), count))


@pytest.fixture
def as_process(monkeypatch):
    """Pretend to be one of several processes."""

    def become(rank, world_size):
        monkeypatch.setattr(comm, "get_rank", lambda: rank)
        monkeypatch.setattr(comm, "get_world_size", lambda: world_size)

    return become


def test_every_image_appears_once_per_epoch():
    # a batch of one holds nothing back, so the order of the batches is the stream
    ids = [batch[0]["image_id"] for batch in take(4 * 23, batch=1)]
    epochs = [ids[i : i + 23] for i in range(0, len(ids), 23)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4  # shuffled anew
    assert epochs[0] != list(range(23))


@pytest.mark.parametrize("mapper", [draw, draw_or_refuse])
def test_a_resumed_stream_is_the_uninterrupted_one(mapper):
    whole = take(16, mapper=mapper)
    for k in (0, 1, 5, 15):
        assert take(16 - k, mapper=mapper, start_iter=k) == whole[k:]


@pytest.mark.parametrize("mapper", [draw, draw_or_refuse])
def test_workers_change_nothing(mapper):
    whole = take(13, mapper=mapper)
    assert take(4, mapper=mapper, num_workers=2, start_iter=9) == whole[9:]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_seed_decides_and_the_global_state_is_neither_read_nor_changed(num_workers):
    """From the very start of a stream: a resumed run starts one in the middle of training."""
    first = take(6, num_workers=num_workers)
    random.seed(1)
    torch.manual_seed(1)
    before = random.getstate(), torch.random.get_rng_state()
    assert take(6, num_workers=num_workers) == first
    assert random.getstate() == before[0]
    assert torch.equal(torch.random.get_rng_state(), before[1])
    assert take(6, seed=8) != first


def test_every_sample_is_drawn_anew():
    numbers = [r["drawn"] for batch in take(30) for r in batch]
    assert len(set(numbers)) == len(numbers)  # drawn anew for every sample


def test_another_image_stands_in_for_a_broken_one():
    batches = take(40, mapper=draw_or_refuse)
    assert all(len(batch) == 4 for batch in batches)
    ids = [r["image_id"] for batch in batches for r in batch]
    assert set(ids) == {i for i in range(23) if i % 4}


@settings(max_examples=30, deadline=None)
@given(
    is_landscape=st.lists(st.booleans(), min_size=1, max_size=30),
    batch_size=st.integers(1, 6),
    seed=st.integers(0, 2**31),
    start_iter=st.integers(0, 12),
)
def test_sampler_properties(is_landscape, batch_size, seed, start_iter):
    sampler = TrainingBatchSampler(is_landscape, batch_size, seed)
    batches = list(islice(sampler, 20))
    positions = [position for batch in batches for position, _ in batch]
    assert len(set(positions)) == len(positions)  # no sample twice, none with another's state
    for batch in batches:
        assert len(batch) == batch_size
        assert len({is_landscape[index] for _, index in batch}) == 1
        assert [p for p, _ in batch] == sorted(p for p, _ in batch)
    # within an aspect the stream keeps its order: whatever is held back comes next
    for aspect in (True, False):
        of_aspect = [p for batch in batches for p, i in batch if is_landscape[i] == aspect]
        assert of_aspect == sorted(of_aspect)
    sampler.start_iter = start_iter
    assert list(islice(sampler, 20 - start_iter)) == batches[start_iter:]


def test_two_processes_share_the_stream_out(as_process):
    alone = [batch[0] for batch in take(4 * 23, batch=1)]
    halves = []
    for rank in range(2):
        as_process(rank, 2)
        halves.append([batch[0] for batch in take(2 * 23, batch=2)])
    # images in turn, and each with the augmentation it would have had in one process
    assert [record for pair in zip(*halves, strict=True) for record in pair] == alone


@pytest.mark.parametrize("batch", [3, 1, 0])
def test_a_batch_that_cannot_be_shared_out(as_process, batch):
    as_process(0, 2)
    with pytest.raises(ValueError, match=rf"IMS_PER_BATCH \({batch}\).*processes \(2\)"):
        loader(batch=batch)


def test_only_broken_images():
    with pytest.raises(ValueError, match=r"DATASETS\.TRAIN: image \d+ of 23 cannot.*nor can 23"):
        take(1, mapper=lambda record: None)
