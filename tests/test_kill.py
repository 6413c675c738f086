"""Runs that are killed, and those that are asked to stop: resuming gives what a whole run gives.

Every fault is real: a process of ``train_net.py`` gets SIGKILL, SIGINT or SIGTERM.
"""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import tiny_training
from tiny_training import command_line

ROOT = Path(__file__).resolve().parents[1]
MAX_ITER, PERIOD = 12, 2
LAST = f"model_{MAX_ITER - 1:07d}.pth"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("kill")
    tiny_training.write_world(root)
    tiny_training.write_clip(root / "clip.pt")
    return root


def environment(folder):
    paths = [str(ROOT / "projects" / "HierKD"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "DETECTRON2_DATASETS": str(folder),
        "HIERKD_CACHE": str(folder / "cache"),
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
    }


def arguments(folder, output, *extra, max_iter=MAX_ITER, period=PERIOD):
    flags = [each for each in extra if each.startswith("--")]
    pairs = [each for each in extra if not each.startswith("--")]
    length = ("SOLVER.MAX_ITER", str(max_iter), "SOLVER.CHECKPOINT_PERIOD", str(period))
    return command_line(output, folder / "clip.pt", *flags, *length, *pairs)


def start(folder, output, moment, *extra, **length):
    """Begin a run; what it says goes to a file beside its folder."""
    script = str(ROOT / "tests" / "killed_training.py")
    with output.with_suffix(".txt").open("a") as log:
        return subprocess.Popen(
            [sys.executable, script, moment, *arguments(folder, output, *extra, **length)],
            cwd=ROOT,
            env=environment(folder),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that a signal can go to all of its processes
        )


def run(folder, output, moment, *extra, **length):
    """The exit status of a run."""
    process = start(folder, output, moment, *extra, **length)
    try:
        return process.wait(timeout=300)
    finally:
        process.kill()


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
    assert set(theirs) == {"model", "trainer", "iteration"}
    assert theirs["trainer"]["_trainer"]["optimizer"]["state"]
    assert same(ours, theirs)
    assert figures(output) == figures(expected)
    assert (output / "last_checkpoint").read_text() == "model_final.pth"
    assert unfinished(output) == []


def unfinished(output):
    return [path.name for path in output.iterdir() if path.name.endswith(".tmp")]


def processes_of(output):
    """Ids of the living processes that were started for this folder, loader processes included."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(output) in path.read_text().split("\0"):
                found.append(int(path.parent.name))
        except OSError:  # it has ended
            continue
    return found


def assert_nobody_stays(output, seconds=20):
    """Loader processes look for their main process every five seconds."""
    until = time.monotonic() + seconds
    while processes_of(output) and time.monotonic() < until:
        time.sleep(0.2)
    assert processes_of(output) == []


@pytest.fixture(scope="module")
def finished(folder):
    """A run of 12 steps that nothing disturbed."""
    output = folder / "finished"
    assert run(folder, output, "never") == 0, said(output)
    return output


@pytest.fixture(scope="module")
def short(folder):
    """The same for 4 steps."""
    output = folder / "short"
    assert run(folder, output, "never", max_iter=4) == 0, said(output)
    return output


# -------------------------------------------------------------------------------------------- kill


def test_killed_in_a_checkpoint_and_resumed(folder, short):
    output = folder / "one"
    half = (short / "model_final.pth").stat().st_size // 2
    # the last file of all, so that no step is left that would write it again
    status = run(folder, output, f"write:model_final:{half}", max_iter=4)
    assert status == -signal.SIGKILL, said(output)
    assert not (output / "model_final.pth").exists()
    (left,) = unfinished(output)
    assert (output / left).stat().st_size == half
    assert (output / "last_checkpoint").read_text() == "model_0000003.pth"
    assert run(folder, output, "never", "--resume", max_iter=4) == 0, said(output)
    assert_same_end(output, short)
    assert f"Removed {output / left}, which a killed run had begun to write" in said(output)


def moments(seed, size):
    """Ten moments in the order of a run: five anywhere, five around a file's write and rename."""
    draw = random.Random(seed)
    in_the_files = [
        f"write:{name}:{draw.randrange(1, size)}"
        for name in ("model_0000001", "model_0000007", "model_final")
    ]
    seconds = [f"time:{draw.uniform(0.01, 0.6):.3f}" for _ in range(3)]
    return [
        seconds[0],
        in_the_files[0],
        "renamed:model_0000003.pth",
        seconds[1],
        f"step:{draw.randrange(1, 3)}",
        "rename:last_checkpoint",
        in_the_files[1],
        seconds[2],
        in_the_files[2],
        f"evaluation:{draw.randrange(1, 12)}",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_at_ten_moments_and_resumed(folder, finished, workers, seed):
    output = folder / f"killed {workers} {seed}"
    loading = ("DATALOADER.NUM_WORKERS", str(workers))
    size = (finished / "model_final.pth").stat().st_size
    for number, moment in enumerate(moments(seed, size)):
        resume = ["--resume"] if number else []
        assert run(folder, output, moment, *resume, *loading) == -signal.SIGKILL, said(output)
        assert_nobody_stays(output)
        for path in output.glob("*.pth"):
            assert "model" in checkpoint(path), moment  # never half a file under a final name
    assert run(folder, output, "never", "--resume", *loading) == 0, said(output)
    assert_same_end(output, finished)


# ----------------------------------------------------------------------------------------- signals


def wait_for(output, text, process, seconds=120):
    until = time.monotonic() + seconds
    while text not in said(output):
        assert process.poll() is None, said(output)
        assert time.monotonic() < until, said(output)
        time.sleep(0.02)


def stop(folder, output, number, *extra, max_iter, to_all=True):
    """Send a signal once the training has begun; the exit status and what the run said after it."""
    process = start(folder, output, "never", *extra, max_iter=max_iter, period=100_000)
    try:
        wait_for(output, "Starting training", process)
        time.sleep(0.5)
        before = len(said(output))
        (os.killpg if to_all else os.kill)(process.pid, number)
        status = process.wait(timeout=60)
    finally:
        process.kill()
    return status, said(output)[before:]


@pytest.mark.parametrize(
    ("number", "workers"), [(signal.SIGINT, "2"), (signal.SIGTERM, "0")], ids=["Ctrl-C", "SIGTERM"]
)
def test_a_signal_ends_a_run_cleanly(folder, number, workers):
    output = folder / f"stopped by {number.name}"
    loading = ("DATALOADER.NUM_WORKERS", workers)
    status, text = stop(folder, output, number, *loading, max_iter=100_000)
    assert status == 128 + number, text
    assert "Traceback" not in text
    (saved,) = output.glob("model_*.pth")
    assert (output / "last_checkpoint").read_text() == saved.name
    done = checkpoint(saved)["iteration"] + 1
    assert saved.name == f"model_{done - 1:07d}.pth"
    assert f"{number.name}: stopped after iteration {done} of 100000" in text
    assert str(saved) in text
    assert "--resume" in text
    assert_nobody_stays(output, seconds=1)
