"""Runs that are killed, and those that are asked to stop: resuming gives what a whole run gives.

Every fault is real: a process of ``train_net.py`` gets SIGKILL or SIGINT.
"""

import io
import json
import math
import os
import random
import signal
import threading
import time
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

import pytest
import torch

import tiny_training
from forked_runs import Run
from hierkd.modeling.detector import HierKD
from tiny_training import command_line

MAX_ITER, PERIOD = 80, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with tiny_training.prepared(tmp_path_factory.mktemp("kill")) as root:
        yield root


# ----------------------------------------------------------- moments, arranged in the new process


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


class Fuse(io.RawIOBase):
    """A file that kills the process once it has written so many bytes, which are on the disk."""

    def __init__(self, file, num_bytes):
        self._file, self._left = file, num_bytes

    def writable(self):
        return True

    def write(self, data):
        view = memoryview(data).cast("B")
        self._file.write(view[: self._left])
        self._left -= len(view)
        if self._left <= 0:
            self._file.flush()
            kill()
        return len(view)


def in_write(name, num_bytes):
    """When so many bytes of a checkpoint of this name have been written."""
    save = torch.save

    def fused(content, file):
        path = Path(str(getattr(file, "name", file))).name
        save(content, Fuse(file, num_bytes) if fnmatch(path, f"*{name}*") else file)

    torch.save = fused


def at_rename(name, *, before):
    """Right before or after ``os.replace`` gives a file this name."""
    replace = os.replace

    def killing(source, target, **kwargs):
        hit = fnmatch(Path(target).name, name)
        if hit and before:
            kill()
        replace(source, target, **kwargs)
        if hit:
            kill()

    os.replace = killing


def in_call(number, then=kill, *, training=True):
    """In a call of the model, counted from 1."""
    forward, calls = HierKD.forward, []

    def counting(self, inputs):
        if self.training == training:
            calls.append(None)
            if len(calls) == number:
                then()
        return forward(self, inputs)

    HierKD.forward = counting


def after(seconds):
    """So many seconds after the first step began."""
    begin = threading.Thread(target=lambda: (time.sleep(seconds), kill()), daemon=True).start
    in_call(1, begin)


def hang():
    print("hanging", flush=True)
    time.sleep(60)


# ---------------------------------------------------------------------------------------- the runs


def arguments(folder, output, *extra, max_iter=MAX_ITER, period=PERIOD):
    flags = [each for each in extra if each.startswith("--")]
    pairs = [each for each in extra if not each.startswith("--")]
    length = ("SOLVER.MAX_ITER", str(max_iter), "SOLVER.CHECKPOINT_PERIOD", str(period))
    return command_line(output, folder / "clip.pt", *flags, *length, *pairs)


def start(folder, output, moment, *extra, **length):
    """Begin a run; what it says goes to a file beside its folder."""
    line = arguments(folder, output, *extra, **length)
    return Run(line, output.with_suffix(".txt"), arrange=moment)


def run(folder, output, moment, *extra, **length):
    """The exit status of a run."""
    return start(folder, output, moment, *extra, **length).status()


def never():
    """Nothing happens."""


def said(output):
    return output.with_suffix(".txt").read_text()


def same(a, b):
    """Whether two checkpoints hold the same, to the last bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def checkpoint(path):
    return torch.load(path, weights_only=True)


def figures(output):
    """AP and AR at the end of a run."""
    last = json.loads((output / "metrics.json").read_text().splitlines()[-1])
    found = {key: value for key, value in last.items() if "/" in key}
    assert len(found) > 10
    return {k: "nan" if math.isnan(v) else v for k, v in found.items()} | {"at": last["iteration"]}


def assert_same_end(output, expected):
    ours, theirs = (checkpoint(each / "model_final.pth") for each in (output, expected))
    assert set(theirs) == {"model", "trainer", "iteration", "teacher_trace"}
    assert theirs["trainer"]["_trainer"]["optimizer"]["state"]
    assert same(ours, theirs)
    assert figures(output) == figures(expected)
    assert (output / "last_checkpoint").read_text() == "model_final.pth"
    assert unfinished(output) == []


def unfinished(output):
    return [path.name for path in output.iterdir() if path.name.endswith(".tmp")]


def assert_nobody_stays(group, seconds=20):
    """No process of a run's group lives; loaders look for their main process every 5 seconds."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.2)
    pytest.fail("a process has stayed")


@pytest.fixture(scope="module")
def short(folder):
    """A run of 4 steps that nothing disturbed, in this process."""
    tiny_training.call_main(arguments(folder, folder / "short", max_iter=4, period=2))
    return folder / "short"


# -------------------------------------------------------------------------------------------- kill


def test_killed_in_a_checkpoint_and_resumed(folder, short):
    output = folder / "one"
    half = (short / "model_final.pth").stat().st_size // 2
    # the last file of all, so that no step is left that would write it again
    status = run(folder, output, partial(in_write, "model_final", half), max_iter=4, period=2)
    assert status == -signal.SIGKILL, said(output)
    assert not (output / "model_final.pth").exists()
    (left,) = unfinished(output)
    assert (output / left).stat().st_size == half
    assert (output / "last_checkpoint").read_text() == "model_0000003.pth"
    assert run(folder, output, never, "--resume", max_iter=4, period=2) == 0, said(output)
    assert_same_end(output, short)
    assert f"Removing {output / left}, which a killed run had begun to write" in said(output)


def moments(seed, size):
    """Ten moments in the order of a run, most of them drawn, half of them around a file."""
    draw = random.Random(seed)
    anywhere = [partial(after, draw.uniform(0.01, 0.25)) for _ in range(4)]
    anywhere.append(partial(in_call, draw.randrange(1, 8)))
    around_a_file = [
        partial(in_write, "model_0*", draw.randrange(1, size)),
        partial(in_write, "model_0*", draw.randrange(1, size)),
        partial(at_rename, "model_0*", before=True),
        partial(at_rename, "model_0*", before=False),
        partial(at_rename, "last_checkpoint", before=True),
    ]
    last = [
        partial(in_write, "model_final*", draw.randrange(1, size)),
        partial(in_call, draw.randrange(1, 3), training=False),
    ]
    both = anywhere + draw.sample(around_a_file, 3)
    draw.shuffle(both)
    return both + last


@pytest.fixture(scope="module")
def finished(folder):
    """A run of 80 steps that nothing disturbed."""
    assert run(folder, folder / "finished", never) == 0, said(folder / "finished")[-2000:]
    return folder / "finished"


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_at_ten_moments_and_resumed(folder, finished, workers, seed):
    output = folder / f"killed {workers} {seed}"
    loading = ("DATALOADER.NUM_WORKERS", str(workers))
    size = (finished / "model_final.pth").stat().st_size
    for number, moment in enumerate(moments(seed, size)):
        resume = ["--resume"] if number else []
        started = start(folder, output, moment, *resume, *loading)
        try:
            assert started.wait() == -signal.SIGKILL, f"{moment}: {said(output)[-2000:]}"
            assert_nobody_stays(started.process.pid)
        finally:
            started.__exit__()
        for path in output.glob("*.pth"):
            assert "model" in checkpoint(path), moment  # never half a file under a final name
    assert run(folder, output, never, "--resume", *loading) == 0, said(output)
    assert_same_end(output, finished)


# ----------------------------------------------------------------------------------------- signals


def test_ctrl_c_ends_a_run_cleanly(folder):
    # a terminal sends it to all processes of the run, and here to two loader processes
    output = folder / "stopped"
    loading = ("DATALOADER.NUM_WORKERS", "2")
    with start(folder, output, never, *loading, max_iter=100_000, period=100_000) as process:
        process.wait_for("Starting training")
        time.sleep(0.5)
        before = len(said(output))
        os.killpg(process.process.pid, signal.SIGINT)
        status = process.wait(60)
        text = said(output)[before:]
        assert status == 130, text
        assert_nobody_stays(process.process.pid, seconds=2)
    assert "Traceback" not in text
    assert "KeyboardInterrupt" not in text
    (saved,) = output.glob("model_*.pth")
    assert (output / "last_checkpoint").read_text() == saved.name
    done = checkpoint(saved)["iteration"] + 1
    assert saved.name == f"model_{done - 1:07d}.pth"
    assert f"SIGINT: stopped after iteration {done} of 100000" in text
    assert f"To go on from {saved}, give the same command with --resume" in text


def test_a_second_ctrl_c_does_not_wait_for_the_step(folder):
    output = folder / "stopped at once"
    with start(folder, output, partial(in_call, 2, hang), max_iter=4, period=1) as process:
        process.wait_for("hanging")
        started = time.monotonic()
        os.killpg(process.process.pid, signal.SIGINT)
        process.wait_for("SIGINT: finishing this step")
        time.sleep(1.2)
        assert process.process.exitcode is None
        os.killpg(process.process.pid, signal.SIGINT)
        assert process.wait(10) == 130
        assert time.monotonic() - started < 15  # not the minute of the step
    assert "Second Ctrl-C: stopping at once" in said(output)
    assert [path.name for path in output.glob("*.pth")] == ["model_0000000.pth"]
