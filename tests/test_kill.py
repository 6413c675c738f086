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
MAX_ITER, PERIOD = 80, 3


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
    assert set(theirs) == {"model", "trainer", "iteration", "teacher_trace"}
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
    """A run of 80 steps that nothing disturbed."""
    output = folder / "finished"
    assert run(folder, output, "never") == 0, said(output)[-2000:]
    return output


@pytest.fixture(scope="module")
def short(folder):
    """A run of 4 steps that nothing disturbed."""
    train_here(folder, folder / "short")
    return folder / "short"


def train_here(folder, output, *extra):
    """Train for 4 steps in this process."""
    with pytest.MonkeyPatch.context() as patch, tiny_training.miniature_at(folder):
        patch.setenv("HIERKD_CACHE", str(folder / "cache"))
        patch.setenv("PYTHONHASHSEED", "0")  # detectron2 sets it; undone with the rest
        tiny_training.call_main(arguments(folder, output, *extra, max_iter=4, period=2))


# -------------------------------------------------------------------------------------------- kill


def test_killed_in_a_checkpoint_and_resumed(folder, short):
    output = folder / "one"
    half = (short / "model_final.pth").stat().st_size // 2
    # the last file of all, so that no step is left that would write it again
    status = run(folder, output, f"write:model_final:{half}", max_iter=4, period=2)
    assert status == -signal.SIGKILL, said(output)
    assert not (output / "model_final.pth").exists()
    (left,) = unfinished(output)
    assert (output / left).stat().st_size == half
    assert (output / "last_checkpoint").read_text() == "model_0000003.pth"
    assert run(folder, output, "never", "--resume", max_iter=4, period=2) == 0, said(output)
    assert_same_end(output, short)
    assert f"Removed {output / left}, which a killed run had begun to write" in said(output)


def moments(seed, size):
    """Ten moments in the order of a run, most of them drawn, half of them around a file."""
    draw = random.Random(seed)
    anywhere = [f"time:{draw.uniform(0.01, 0.25):.3f}" for _ in range(4)]
    anywhere.append(f"step:{draw.randrange(1, 8)}")
    around_a_file = [
        f"write:model_0*:{draw.randrange(1, size)}",
        f"write:model_0*:{draw.randrange(1, size)}",
        "rename:model_0*",
        "renamed:model_0*",
        "rename:last_checkpoint",
    ]
    last = [
        f"write:model_final*:{draw.randrange(1, size)}",
        f"evaluation:{draw.randrange(1, 3)}",
    ]
    both = anywhere + draw.sample(around_a_file, 3)
    draw.shuffle(both)
    return both + last


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_at_ten_moments_and_resumed(folder, finished, workers, seed):
    output = folder / f"killed {workers} {seed}"
    loading = ("DATALOADER.NUM_WORKERS", str(workers))
    size = (finished / "model_final.pth").stat().st_size
    for number, moment in enumerate(moments(seed, size)):
        resume = ["--resume"] if number else []
        status = run(folder, output, moment, *resume, *loading)
        assert status == -signal.SIGKILL, f"{moment}: {said(output)[-2000:]}"
        assert_nobody_stays(output)
        for path in output.glob("*.pth"):
            assert "model" in checkpoint(path), moment  # never half a file under a final name
    assert run(folder, output, "never", "--resume", *loading) == 0, said(output)
    assert_same_end(output, finished)


# --------------------------------------------------------------------------------------- full disk


def test_a_disk_that_fills_up_in_a_training(folder, short, tmp_path):
    """The second of three checkpoints does not fit; with room again the run ends as if it had."""
    output = tmp_path / "disk"
    output.mkdir()
    kilobytes = 2 * (short / "model_final.pth").stat().st_size // 1024
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(output)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        with pytest.raises(OSError, match="No space left on device") as error:
            train_here(folder, output)
        for part in (str(output / "model_0000003.pth"), " MB free", "--resume"):
            assert part in str(error.value)
        assert f"{str(output / 'model_0000001.pth')!r}, is intact" in str(error.value)
        assert [path.name for path in output.glob("*.pth")] == ["model_0000001.pth"]
        assert (output / "last_checkpoint").read_text() == "model_0000001.pth"
        assert unfinished(output) == []
        assert "this run writes 3 checkpoints" in (output / "log.txt").read_text()
        subprocess.run(["mount", "-o", "remount,size=100m", str(output)], check=True)
        train_here(folder, output, "--resume")
        assert_same_end(output, short)
    finally:
        subprocess.run(["umount", "-l", str(output)], check=True)


# ----------------------------------------------------------------------------------------- signals


def wait_for(output, text, process, seconds=120):
    until = time.monotonic() + seconds
    while text not in said(output):
        assert process.poll() is None, said(output)
        assert time.monotonic() < until, said(output)
        time.sleep(0.02)


def test_ctrl_c_ends_a_run_cleanly(folder):
    # a terminal sends it to all processes of the run, and here to two loader processes
    output = folder / "stopped"
    loading = ("DATALOADER.NUM_WORKERS", "2")
    process = start(folder, output, "never", *loading, max_iter=100_000, period=100_000)
    try:
        wait_for(output, "Starting training", process)
        time.sleep(0.5)
        before = len(said(output))
        os.killpg(process.pid, signal.SIGINT)
        status = process.wait(timeout=60)
    finally:
        process.kill()
    text = said(output)[before:]
    assert status == 130, text
    assert "Traceback" not in text
    assert "KeyboardInterrupt" not in text
    (saved,) = output.glob("model_*.pth")
    assert (output / "last_checkpoint").read_text() == saved.name
    done = checkpoint(saved)["iteration"] + 1
    assert saved.name == f"model_{done - 1:07d}.pth"
    assert f"SIGINT: stopped after iteration {done} of 100000" in text
    assert f"To go on from {saved}, give the same command with --resume" in text
    assert_nobody_stays(output, seconds=2)


def test_a_second_ctrl_c_does_not_wait_for_the_step(folder):
    output = folder / "stopped at once"
    process = start(folder, output, "hang:2", max_iter=4, period=1)
    try:
        wait_for(output, "hanging", process)
        started = time.monotonic()
        os.killpg(process.pid, signal.SIGINT)
        wait_for(output, "SIGINT: finishing this step", process)
        time.sleep(1.2)
        assert process.poll() is None
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=10) == 130
        assert time.monotonic() - started < 15  # not the minute of the step
    finally:
        process.kill()
    assert "Second Ctrl-C: stopping at once" in said(output)
    assert [path.name for path in output.glob("*.pth")] == ["model_0000000.pth"]
