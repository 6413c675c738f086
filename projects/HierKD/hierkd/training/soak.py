"""Watching a process for hours: does it keep memory, files or processes, does it slow down?

A :class:`SoakRecorder` writes one line of a CSV every few seconds, at once, so that a kill loses
nothing; :func:`judge` reads the lines afterwards and :func:`draw` plots them. All of it comes from
``/proc``, so that nothing has to be installed; it therefore needs Linux.
"""

from __future__ import annotations

import csv
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType

import torch
from matplotlib.figure import Figure

from hierkd.files import replacing

__all__ = [
    "Finding",
    "Limits",
    "Sample",
    "SoakRecorder",
    "draw",
    "judge",
    "read_samples",
    "theil_sen_slope",
]

_MIB = 2**20
_NO_FIGURE = float("nan")


@dataclass(frozen=True)
class Sample:
    """One look at the process.

    Attributes:
        seconds: since the start.
        phase: what the process was doing.
        work: units (steps, pictures) of this phase since the sample before.
        wall_ms: wall time of a unit, mean; NaN without units.
        cpu_ms: processor time of this process in a unit, mean; NaN without units.
        rss_mib: resident memory, shared pages included.
        own_mib: resident memory that is no file: what it allocated. Of libraries it holds as much
            as the system likes, and shares it with other programs.
        children_mib: memory that the processes it started allocated, all of them together.
        peak_mib: highest resident memory so far.
        files: open file descriptors.
        threads: of this process.
        children: processes that it started and theirs, also ended ones that nobody waited for.
        tensors: torch tensors alive; -1 where they were not counted.
        objects: Python objects that the garbage collector tracks; -1 likewise.
        cuda_mib: memory of PyTorch's allocator on the GPU.
        load: processes that wanted to run on this machine, mean of a minute.
    """

    seconds: float
    phase: str
    work: int
    wall_ms: float
    cpu_ms: float
    rss_mib: float
    own_mib: float
    children_mib: float
    peak_mib: float
    files: int
    threads: int
    children: int
    tensors: int
    objects: int
    cuda_mib: float
    load: float

    @property
    def memory_mib(self) -> float:
        """What this process and its children allocated, none of it counted twice."""
        return self.own_mib + self.children_mib


@dataclass(frozen=True)
class Limits:
    """What a run may do at most; see :func:`judge` for what is compared.

    Attributes:
        slope: growth of memory, MiB per hour.
        slack: growth of memory that is noise however short the run, MiB.
        more_files: open files gained.
        more_threads: threads gained.
        more_children: processes gained.
        slower_cpu: processor time of a unit of work, later over earlier.
        slower_wall: its wall time, later over earlier; more, since other programs count here.
    """

    slope: float = 16.0
    slack: float = 16.0
    more_files: int = 0
    more_threads: int = 0
    more_children: int = 0
    slower_cpu: float = 1.2
    slower_wall: float = 1.5


@dataclass(frozen=True)
class Finding:
    """One promise, with what was found."""

    kept: bool
    text: str


# -------------------------------------------------------------------------------------- recording


class SoakRecorder:
    """Times units of work and writes a sample every few seconds.

    ::

        with SoakRecorder(path, interval=5) as recorder:
            with recorder.unit("training"):
                ...
    """

    def __init__(
        self,
        path: Path,
        *,
        interval: float = 5.0,
        count_objects_every: int = 12,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Begin a CSV.

        Args:
            path: of the CSV; what is there is replaced.
            interval: seconds between samples.
            count_objects_every: every how many samples tensors and objects are counted, which takes
                a tenth of a second; 0 = never.
            clock: seconds; for tests.

        Raises:
            OSError: this system has no ``/proc``.
        """
        _status("self")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", newline="", encoding="utf-8", buffering=1)
        self._writer = csv.DictWriter(self._file, [field.name for field in fields(Sample)])
        self._writer.writeheader()
        self._interval, self._count_every, self._clock = interval, count_objects_every, clock
        self._start = self._last = clock()
        self._number = 0
        self._phase = ""
        self._units: list[tuple[float, float]] = []

    def __enter__(self) -> SoakRecorder:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return self._clock() - self._start

    @contextmanager
    def unit(self, phase: str, *, sampled: bool = True) -> Iterator[None]:
        """Time one unit of work; writes a sample after it when it is time.

        Args:
            phase: what is done; a sample speaks of one phase, so the times of another are dropped.
            sampled: False leaves it to the caller to call :meth:`sample`, for units that differ and
                have to be averaged over all of their kinds.
        """
        if phase != self._phase:
            self._phase, self._units = phase, []
            self._last = self._clock()
        start, cpu = self._clock(), time.process_time()
        yield
        self._units.append((self._clock() - start, time.process_time() - cpu))
        if sampled and self._clock() - self._last >= self._interval:
            self.sample()

    def sample(self) -> Sample:
        """Write a sample now."""
        counted = self._count_every > 0 and self._number % self._count_every == 0
        tensors, objects = _count_objects() if counted else (-1, -1)
        own, offspring = _status("self"), _descendants(os.getpid())
        wall, cpu = (
            (1000 * statistics.fmean(times) for times in zip(*self._units, strict=True))
            if self._units
            else (_NO_FIGURE, _NO_FIGURE)
        )
        sample = Sample(
            seconds=round(self.seconds, 2),
            phase=self._phase,
            work=len(self._units),
            wall_ms=round(wall, 3),
            cpu_ms=round(cpu, 3),
            rss_mib=own["VmRSS"] / 1024,
            own_mib=(own["RssAnon"] + own["RssShmem"]) / 1024,
            children_mib=sum(_written_mib(child) for child in offspring),
            peak_mib=own["VmHWM"] / 1024,
            files=len(os.listdir("/proc/self/fd")) - 1,  # without the listing's own
            threads=own["Threads"],
            children=len(offspring),
            tensors=tensors,
            objects=objects,
            cuda_mib=_cuda_mib(),
            load=os.getloadavg()[0],
        )
        self._writer.writerow(asdict(sample))
        self._number += 1
        self._units = []
        self._last = self._clock()
        return sample


def _status(process: str) -> dict[str, int]:
    """The lines of ``/proc/<process>/status`` that are a number, sizes in KiB."""
    found = {}
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        key, _, value = line.partition(":")
        number = value.split()[0] if value.split() else ""
        if number.isdigit():
            found[key] = int(number)
    return found


def _written_mib(process: str) -> float:
    """Memory that a process wrote and shares with none, its parent included; 0 if it has ended."""
    with suppress(OSError):
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith("Private_Dirty:"):
                return int(line.split()[1]) / 1024
    return 0.0


def _descendants(process: int) -> list[str]:
    """Ids of all processes below one, zombies included."""
    parent_of = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with suppress(OSError):
                # "id (name) state parent ...", and a name may hold anything
                after_name = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2]
                parent_of[int(entry)] = int(after_name.split()[1])
    found: set[int] = set()
    latest = {process}
    while latest:
        latest = {child for child, parent in parent_of.items() if parent in latest} - found
        found |= latest
    return [str(child) for child in sorted(found)]


def _count_objects() -> tuple[int, int]:
    """Torch tensors, and all objects, that the garbage collector tracks after a collection."""
    gc.collect()
    everything = gc.get_objects()
    return sum(issubclass(type(each), torch.Tensor) for each in everything), len(everything)


def _cuda_mib() -> float:
    return torch.cuda.memory_allocated() / _MIB if torch.cuda.is_initialized() else 0.0


def read_samples(path: Path) -> list[Sample]:
    """Read a CSV; a last line that a kill cut off is left out."""
    samples = []
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            with suppress(TypeError, ValueError):
                samples.append(_parse(row))
    return samples


def _parse(row: dict[str, str]) -> Sample:
    kinds: dict[str, type] = {"int": int, "float": float, "str": str}
    return Sample(
        **{field.name: kinds[str(field.type)](row[field.name]) for field in fields(Sample)}
    )


# ---------------------------------------------------------------------------------------- judging


def theil_sen_slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Median of the slopes of all pairs of points, which a few outliers cannot bend; 0 for one."""
    slopes = [
        (y[j] - y[i]) / (x[j] - x[i])
        for i in range(len(x))
        for j in range(i + 1, len(x))
        if x[j] != x[i]
    ]
    return statistics.median(slopes) if slopes else 0.0


def judge(samples: Sequence[Sample], limits: Limits) -> list[Finding]:
    """Compare a run with the limits.

    Memory by its slope over the second half, of each phase by itself, since caches and allocators
    fill up in the first. Files, threads and processes by their medians, and the cost of a unit of
    work by its median, in the last quarter against the second one, phase by phase.

    Args:
        samples: of one run, in order.
        limits: what is allowed.

    Raises:
        ValueError: the run is too short: a phase has fewer than two samples in one of the quarters.
    """
    if not samples:
        raise ValueError("no samples: the run was shorter than the interval between them")
    end = samples[-1].seconds
    findings = []
    for phase in dict.fromkeys(sample.phase for sample in samples):
        of_phase = [sample for sample in samples if sample.phase == phase]
        second = [s for s in of_phase if end / 4 <= s.seconds < end / 2]
        last = [s for s in of_phase if s.seconds >= 3 * end / 4]
        if min(len(second), len(last)) < 2:
            raise ValueError(
                f"too short to judge: {len(second)} samples of {phase!r} in the second quarter and "
                f"{len(last)} in the last, of {end:.0f} s; each needs two"
            )
        later = [sample for sample in of_phase if sample.seconds >= end / 2]
        findings.append(_judge_memory(phase, later, limits))
        findings += _judge_counts(phase, second, last, limits)
        findings += _judge_speed(phase, second, last, limits)
    return findings


def _judge_memory(phase: str, later: Sequence[Sample], limits: Limits) -> Finding:
    hours = [sample.seconds / 3600 for sample in later]
    slope = theil_sen_slope(hours, [sample.memory_mib for sample in later])
    length = hours[-1] - hours[0]
    allowed = limits.slope * length + limits.slack
    return Finding(
        slope * length <= allowed,
        f"{phase}: memory grows by {slope:.1f} MiB per hour, {slope * length:.1f} MiB in the "
        f"{60 * length:.1f} minutes of the second half (allowed: {allowed:.1f}); it is "
        f"{later[-1].memory_mib:.0f} MiB, {later[-1].peak_mib:.0f} MiB resident at the peak",
    )


def _judge_counts(
    phase: str, second: Sequence[Sample], last: Sequence[Sample], limits: Limits
) -> Iterator[Finding]:
    for name, allowed in (
        ("files", limits.more_files),
        ("threads", limits.more_threads),
        ("children", limits.more_children),
    ):
        before, after = (
            statistics.median_high(getattr(sample, name) for sample in part)
            for part in (second, last)
        )
        what = {"files": "open files", "children": "child processes"}.get(name, name)
        yield Finding(
            after - before <= allowed,
            f"{phase}: {before} {what} in the second quarter, {after} in the last "
            f"(allowed: {allowed} more)",
        )


def _judge_speed(
    phase: str, second: Sequence[Sample], last: Sequence[Sample], limits: Limits
) -> Iterator[Finding]:
    for name, label, allowed in (
        ("cpu_ms", "processor time", limits.slower_cpu),
        ("wall_ms", "wall time", limits.slower_wall),
    ):
        before, after = (
            statistics.median(getattr(sample, name) for sample in part if sample.work)
            for part in (second, last)
        )
        loads = [statistics.fmean(sample.load for sample in part) for part in (second, last)]
        yield Finding(
            after <= allowed * before,
            f"{phase}: {label} of one unit {before:.1f} ms in the second quarter, {after:.1f} ms "
            f"in the last, {after / before:.2f} times (allowed: {allowed}); "
            f"load of the machine {loads[0]:.1f} and {loads[1]:.1f}",
        )


# --------------------------------------------------------------------------------------- plotting


def draw(samples: Sequence[Sample], path: Path, title: str) -> None:
    """Plot memory, files and processes, and the cost of a unit over time, as a PNG.

    Args:
        samples: of one run, in order.
        path: of the PNG.
        title: above the plots.
    """
    figure = Figure(figsize=(10, 9), layout="constrained")
    memory, counts, speed = figure.subplots(3, 1, sharex=True)
    minutes = [sample.seconds / 60 for sample in samples]
    memory.plot(minutes, [s.peak_mib for s in samples], label="highest resident", color="0.7")
    memory.plot(minutes, [s.rss_mib for s in samples], label="resident", lw=0.8)
    memory.plot(minutes, [s.own_mib for s in samples], label="allocated", lw=0.8)
    if any(s.children_mib for s in samples):
        memory.plot(
            minutes, [s.children_mib for s in samples], label="allocated by children", lw=0.8
        )
    if any(s.cuda_mib for s in samples):
        memory.plot(minutes, [s.cuda_mib for s in samples], label="on the GPU", lw=0.8)
    memory.set_ylabel("memory (MiB)")
    for name, label in (
        ("files", "open files"),
        ("threads", "threads"),
        ("children", "child processes"),
    ):
        counts.plot(minutes, [getattr(s, name) for s in samples], label=label, lw=0.9)
    counts.set_ylabel("number")
    for phase in dict.fromkeys(sample.phase for sample in samples):
        of_phase = [s for s in samples if s.phase == phase and s.work]
        (line,) = speed.plot(
            [s.seconds / 60 for s in of_phase],
            [s.wall_ms for s in of_phase],
            ".-",
            label=f"{phase}, wall",
            ms=3,
            lw=0.6,
        )
        speed.plot(
            [s.seconds / 60 for s in of_phase],
            [s.cpu_ms for s in of_phase],
            label=f"{phase}, processor",
            color=line.get_color(),
            ls=":",
            lw=1.2,
        )
    speed.set(ylabel="time of a step or picture (ms)", xlabel="time (minutes)", yscale="log")
    speed.yaxis.set_major_formatter("{x:g}")
    memory.set_ylim(bottom=0)
    counts.set_ylim(bottom=0)
    for axes in (memory, counts, speed):
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=5, fontsize=8, frameon=False)
    figure.suptitle(title)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
