"""A training of some hundred steps keeps no memory, files, threads or processes. Needs Linux."""

import os
import threading
from pathlib import Path

import pytest

import tiny_training
from hierkd.training.trainer import Trainer
from tiny_training import call_main, command_line

STEPS, PERIOD = 300, 50
SETTLED = 100  # steps after which everything has been allocated once
ALLOWED_MIB = 12.0  # of growth in the 200 steps that follow: metrics, and an allocator's noise


def measured():
    """Resident MiB, open files, and threads of this process."""
    resident = int(Path("/proc/self/statm").read_text().split()[1])
    mebibytes = resident * os.sysconf("SC_PAGE_SIZE") / 2**20
    return mebibytes, len(os.listdir("/proc/self/fd")), threading.active_count()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with tiny_training.prepared(tmp_path_factory.mktemp("soak")) as root:
        yield root


def soak(folder, name, monkeypatch, in_step=lambda: None):
    """What was measured at step SETTLED and at the end, of a run that evaluates and saves."""
    found, run_step = {}, Trainer.run_step

    def measuring(self):
        run_step(self)
        in_step()
        if self.iter in (SETTLED, STEPS - 1):
            found[self.iter] = measured()

    monkeypatch.setattr(Trainer, "run_step", measuring)
    length = ("SOLVER.MAX_ITER", str(STEPS), "SOLVER.CHECKPOINT_PERIOD", str(PERIOD))
    call_main(command_line(folder / name, folder / "clip.pt", *length, "TEST.EVAL_PERIOD", "50"))
    return found[SETTLED], found[STEPS - 1]


@pytest.mark.slow
def test_a_training_keeps_nothing(folder, monkeypatch):
    (mib, files, threads), (mib_after, files_after, threads_after) = soak(
        folder, "steady", monkeypatch
    )
    assert mib_after - mib < ALLOWED_MIB
    assert files_after <= files
    assert threads_after <= threads


@pytest.mark.slow
def test_planted_leaks_are_seen(folder, monkeypatch, tmp_path):
    kept = []
    leak = lambda: kept.append((bytearray(os.urandom(2**19)), (tmp_path / "f").open("w")))  # noqa: E731
    (mib, files, _), (mib_after, files_after, _) = soak(folder, "leaking", monkeypatch, leak)
    for _, file in kept:
        file.close()
    assert mib_after - mib > ALLOWED_MIB  # 100 MiB in 200 steps, less what was free before
    assert files_after > files + 100
