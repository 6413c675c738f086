"""Planted leaks are found, a steady process is not blamed, and a kill loses no sample."""

import functools
import itertools
import json
import math
import mmap
import os
import re
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import tiny_training
import train_net
from hierkd.training.soak import (
    Limits,
    Sample,
    SoakRecorder,
    draw,
    judge,
    read_samples,
    theil_sen_slope,
)
from tiny_training import command_line
from tools import soak as soak_tool

UNITS = 40
# Of a fraction of a second: an hour's allowance for noise would hide everything.
STRICT = Limits(slope=0.0, slack=4.0, slower_cpu=1e9, slower_wall=1e9)


def soak(path, work):
    # A clock that goes on with each look at it: counting the objects of a process that has run
    # other tests takes longer than all units, and would leave whole quarters without a sample.
    clock = functools.partial(next, itertools.count(0.0, 0.01))
    options = {"interval": 0.0, "count_objects_every": UNITS // 2, "clock": clock}
    with SoakRecorder(path, **options) as recorder:
        for number in range(UNITS):
            with recorder.unit("work"):
                work(number)
    return read_samples(path)


def broken(samples, limits=STRICT):
    return [finding.text for finding in judge(samples, limits) if not finding.kept]


# --------------------------------------------------------------------------------- planted in real
# Other tests of the same process may break limits of their own.


def test_a_steady_process_keeps_all_limits(tmp_path):
    samples = soak(tmp_path / "s.csv", lambda number: bytearray(2**20))
    assert len(samples) == UNITS
    assert broken(samples) == []
    assert all(sample.rss_mib >= sample.own_mib > 20 for sample in samples)
    assert samples[-1].peak_mib >= samples[-1].rss_mib


def memory(mebibytes):
    """Memory asked of the system itself: an allocation would first use what tests have freed."""
    size = mebibytes * 2**20
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block.write(b"x" * size)
    return block


def test_growing_memory_is_found(tmp_path):
    kept = []

    def keep(number):
        kept.append((memory(1), torch.ones(1)))

    samples = soak(tmp_path / "s.csv", keep)
    assert any("memory grows" in text for text in broken(samples))
    later = [sample.memory_mib for sample in samples[UNITS // 2 :]]
    assert later[-1] - later[0] == pytest.approx(len(later) - 1, rel=0.2)
    assert samples[UNITS // 2].tensors - samples[0].tensors == UNITS // 2


def test_files_left_open_are_found(tmp_path):
    kept = []
    samples = soak(tmp_path / "s.csv", lambda number: kept.append((tmp_path / "f").open("w")))
    for file in kept:
        file.close()
    assert any("open files" in text for text in broken(samples))
    assert samples[-1].files - samples[0].files == UNITS - 1


def test_threads_left_are_found(tmp_path):
    end = threading.Event()
    samples = soak(tmp_path / "s.csv", lambda _: threading.Thread(target=end.wait).start())
    end.set()
    assert any("threads" in text for text in broken(samples))


def children_of_the_tests():
    """Processes of other tests that are still there, such as multiprocessing's resource tracker."""
    own = Path("/proc/self/task")
    return sum(len((task / "children").read_text().split()) for task in own.iterdir())


def test_processes_left_are_found_also_dead_ones_and_their_memory_counts(tmp_path):
    others = children_of_the_tests()
    started = []

    def start(number):
        command = ["sleep", "60"] if number % 10 == 0 else ["true"]
        if number % 10 < 2:
            started.append(subprocess.Popen(command))

    samples = soak(tmp_path / "s.csv", start)
    for process in started:
        process.kill()
        process.wait()
    assert any("child processes" in text for text in broken(samples))
    assert samples[-1].children - others == len(started) == 8
    assert samples[-1].children_mib > samples[0].children_mib > 0


def test_work_that_takes_longer_and_longer_is_found(tmp_path):
    samples = soak(tmp_path / "s.csv", lambda number: sum(range(20_000 * number)))
    limits = replace(STRICT, slower_cpu=1.5)
    assert any("processor time" in text for text in broken(samples, limits))
    assert broken(soak(tmp_path / "s.csv", lambda number: sum(range(200_000))), limits) == []


# ------------------------------------------------------------------------------------- the verdict


def flat(**changes):
    """An hour of samples without any growth, with attributes replaced by functions of time."""
    plain = Sample(
        0.0, "work", 10, 50.0, 40.0, 300.0, 200.0, 50.0, 310.0, 20, 4, 2, -1, -1, 0.0, 1.0
    )
    return [
        replace(plain, seconds=float(s), **{name: of(s) for name, of in changes.items()})
        for s in range(0, 3601, 10)
    ]


def test_the_slope_is_that_of_the_second_half():
    warming_up = flat(own_mib=lambda s: 200 + 100 * min(s / 1700, 1))
    assert broken(warming_up, Limits()) == []
    for per_hour, is_broken in ((15.0, False), (60.0, True)):
        growing = flat(own_mib=lambda s, per_hour=per_hour: 200 + per_hour * s / 3600)
        found = judge(growing, Limits())[0]
        assert found.kept is not is_broken
        assert f"grows by {per_hour:.1f} MiB per hour" in found.text


def test_memory_moved_into_a_child_counts():
    assert "memory grows" in broken(flat(children_mib=lambda s: 50 + 60 * s / 3600), Limits())[0]


def test_one_outlier_bends_nothing():
    times = list(range(50))
    values = [3.0 * t for t in times]
    values[25] = 1e6
    assert theil_sen_slope(times, values) == pytest.approx(3.0)


def test_a_phase_is_judged_by_itself():
    two = [
        replace(s, phase="a" if i % 2 else "b", own_mib=200.0 + 300 * (i % 2))
        for i, s in enumerate(flat())
    ]
    assert broken(two, Limits()) == []
    assert len(judge(two, Limits())) == 12
    late = [replace(s, files=s.files + (s.phase == "a" and s.seconds > 2000)) for s in two]
    (text,) = broken(late, Limits())
    assert text.startswith("a: 20 open files in the second quarter, 21 in the last")


def test_too_short_a_run_is_said_to_be_so():
    with pytest.raises(ValueError, match="no samples"):
        judge([], Limits())
    with pytest.raises(ValueError, match="too short to judge: 1 samples of 'work' in the second"):
        judge(flat()[:5], Limits())


# ----------------------------------------------------------------------------------------- the file


def test_a_kill_loses_no_sample(tmp_path):
    code = (
        "import sys, os, signal; from pathlib import Path;"
        "from hierkd.training.soak import SoakRecorder\n"
        "recorder = SoakRecorder(Path(sys.argv[1]), interval=0.0)\n"
        "for _ in range(5):\n"
        "    with recorder.unit('work'): pass\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    path = tmp_path / "s.csv"
    ended = subprocess.run([sys.executable, "-c", code, path], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert len(read_samples(path)) == 5
    content = path.read_bytes()
    path.write_bytes(content[: content.rstrip().rindex(b",") - 3])
    assert len(read_samples(path)) == 4


def test_a_sample_speaks_of_one_phase(tmp_path):
    now = iter(range(1000))
    with SoakRecorder(tmp_path / "s.csv", interval=8.0, clock=lambda: next(now)) as recorder:
        for phase in ("a", "a", "b", "b", "b", "b"):
            with recorder.unit(phase):
                pass
        with recorder.unit("b", sampled=False):
            pass
        assert len(read_samples(tmp_path / "s.csv")) == 1
        recorder.sample()
    first, second = read_samples(tmp_path / "s.csv")
    assert (first.phase, first.work, first.wall_ms) == ("b", 3, 1000.0)
    assert (second.phase, second.work) == ("b", 2)


def test_a_sample_without_work_has_no_time(tmp_path):
    with SoakRecorder(tmp_path / "s.csv") as recorder:
        recorder.sample()
    (sample,) = read_samples(tmp_path / "s.csv")
    assert sample.work == 0
    assert math.isnan(sample.wall_ms)
    assert sample.children == children_of_the_tests()
    assert sample.threads >= 1


def test_the_plot_is_a_picture(tmp_path):
    draw(flat(), tmp_path / "s.png", "an hour")
    with Image.open(tmp_path / "s.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 500
    assert os.listdir(tmp_path) == ["s.png"]


# ----------------------------------------------------------------------------------- the whole tool


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with tiny_training.prepared(tmp_path_factory.mktemp("soak")) as root:
        yield root


def run_tool(root, output):
    arguments = command_line(output, root / "clip.pt")
    pairs = dict(zip(arguments[2::2], arguments[3::2], strict=True))
    for key in ("SOLVER.MAX_ITER", "SOLVER.CHECKPOINT_PERIOD", "OUTPUT_DIR"):
        del pairs[key]  # the tool's own
    options = {"minutes": 0.2, "output": output, "interval": 0.3, "training-seconds": 0.5}
    options |= {"workers": 0, "checkpoint-period": 7, "eval-period": 30, "largest": 10}
    options |= {"slack": 60, "slower-cpu": 20, "slower-wall": 50, "more-files": 1}
    flags = [str(each) for name, value in options.items() for each in (f"--{name}", value)]
    ticks = itertools.count()  # time passes with the work, on a busy machine as on another
    timed = functools.partial(SoakRecorder, clock=lambda: 0.02 * next(ticks))
    with tiny_training.own_log_handlers(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(soak_tool, "SoakRecorder", timed)
        return soak_tool.main([*flags, *(str(each) for pair in pairs.items() for each in pair)])


def test_the_tool_trains_detects_and_judges(world, tmp_path, capsys):
    assert run_tool(world, tmp_path) == 0
    assert "BROKEN" not in capsys.readouterr().out
    verdict = json.loads((tmp_path / "verdict.json").read_text())
    assert verdict["kept"] is True
    assert min(verdict["work"]["training"], verdict["work"]["inference"]) > 10
    assert {path.name for path in tmp_path.iterdir()} >= {"samples.csv", "soak.png"}
    assert list((tmp_path / "training").glob("inference/*/*"))  # it evaluated
    assert 1 <= len(list((tmp_path / "training").glob("model_*.pth"))) <= 2  # old ones go


def test_the_tool_finds_a_leak_in_the_training(world, tmp_path, capsys, monkeypatch):
    kept, run_step = [], train_net.Trainer.run_step

    def leaking(self):
        run_step(self)
        kept.append((memory(4), (tmp_path / "left_open").open("w")))

    monkeypatch.setattr(train_net.Trainer, "run_step", leaking)
    assert run_tool(world, tmp_path) == 1
    for _, file in kept:
        file.close()
    out = capsys.readouterr().out
    assert "BROKEN training: memory grows" in out
    assert re.search(r"BROKEN training: \d+ open files", out)
    assert json.loads((tmp_path / "verdict.json").read_text())["kept"] is False


def test_the_tool_says_when_a_run_was_too_short(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        soak_tool, "soak", lambda args, cfg: SoakRecorder(args.output / "samples.csv")
    )
    assert run_tool(world, tmp_path) == 2
    assert "no samples" in capsys.readouterr().err
