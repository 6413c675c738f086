"""Histories are short, and what the writers read from them is what it was."""

import tracemalloc

from detectron2.engine import TrainerBase
from detectron2.utils.events import EventStorage, get_event_storage

from hierkd.training.histories import BoundHistories

ITERATIONS = 4000


class Recording(TrainerBase):
    """Records two metrics per step and does nothing else."""

    def run_step(self):
        storage = get_event_storage()
        storage.put_scalars(time=float(self.iter % 7), loss=1.5 * self.iter)


def trained(*hooks):
    trainer = Recording()
    trainer.register_hooks(list(hooks))
    tracemalloc.start()
    trainer.train(0, ITERATIONS)
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return trainer.storage, grown


def test_memory_is_bounded_and_the_figures_stay():
    long, grown_long = trained()
    short, grown_short = trained(BoundHistories())
    assert len(long.history("loss").values()) == ITERATIONS  # else detectron2 bounds it by itself
    assert len(short.history("loss").values()) == 1000
    assert grown_short < 0.5 * grown_long
    for name in ("time", "loss"):
        one, other = long.history(name), short.history(name)
        assert one.latest() == other.latest()
        assert one.global_avg() == other.global_avg()
        assert one.median(1000) == other.median(1000)
        assert one.median(20) == other.median(20)
    assert long.latest_with_smoothing_hint(20) == short.latest_with_smoothing_hint(20)


def test_other_storages_are_left_alone():
    trained(BoundHistories())
    with EventStorage() as storage:
        for _ in range(1100):
            storage.put_scalar("loss", 1.0)
    assert len(storage.history("loss").values()) == 1100
