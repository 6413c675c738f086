"""Times of alternatives, taken in turns in one process, and the report that states them.

A time by itself says as much about the machine and its other users as about the code. The
alternatives therefore take turns: every round runs each once, in rotating order, and what counts is
the median over the rounds of the *ratio within a round*, which a machine that slows down for a
while leaves alone.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hierkd.files import replacing
from hierkd.reports.run_record import processor_name

__all__ = ["Measurement", "Report", "describe_machine", "measure", "peak_memory", "ratio"]

_PACKAGES = (
    "torch",
    "torchvision",
    "detectron2",
    "sal-detectron2",
    "onnxruntime",
    "numpy",
    "pycocotools",
    "faster-coco-eval",
)
# Seconds between two looks at the resident memory of the process.
_SAMPLING_INTERVAL = 0.002
_MIB = 2**20


@dataclass(frozen=True)
class Measurement:
    """What one alternative took.

    Attributes:
        name: of the alternative.
        seconds: of each round, in the order of the rounds.
    """

    name: str
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median over the rounds, in seconds."""
        return statistics.median(self.seconds)


def measure(
    candidates: Mapping[str, Callable[[], object]],
    *,
    device: torch.device,
    rounds: int,
    warmup: int = 1,
    progress: str = "rounds",
) -> dict[str, Measurement]:
    """Time alternatives in turns.

    Args:
        candidates: name to what is timed; each is called ``warmup + rounds`` times.
        device: waited for inside the timed region.
        rounds: how many times each is timed.
        warmup: how many rounds go before, untimed.
        progress: name on the progress bar.

    Returns:
        Name to its times; round i of every candidate was taken next to round i of the others.
    """
    if rounds < 1:
        raise ValueError(f"at least one round is needed, got {rounds}")
    names = list(candidates)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in tqdm(range(warmup + rounds), desc=progress, unit="round", leave=False):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            taken = _time(candidates[name], device)
            if number >= warmup:
                seconds[name].append(taken)
    return {name: Measurement(name, tuple(taken)) for name, taken in seconds.items()}


def ratio(measurement: Measurement, reference: Measurement) -> float:
    """Median over the rounds of the time of one alternative over that of another."""
    pairs = zip(measurement.seconds, reference.seconds, strict=True)
    return statistics.median(mine / theirs for mine, theirs in pairs)


def peak_memory(call: Callable[[], object], device: torch.device) -> float:
    """Memory that a call needs on top of what is there before it, at its peak, in MiB.

    On a GPU what PyTorch's allocator hands out; on a CPU the resident memory of the process, looked
    at every two milliseconds, so that what lives for less may be missed.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / _MIB
    with suppress(OSError, AttributeError):  # memory kept for reuse would hide what is needed
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    with _ResidentMemory() as memory:
        call()
    return memory.peak_over_start / _MIB


def describe_machine(device: torch.device) -> dict[str, str]:
    """Hardware, threads and versions that a figure belongs to."""
    machine = {
        "processor": f"{processor_name()}, {os.cpu_count()} CPUs",
        "threads": str(torch.get_num_threads()),
        "system": platform.platform(),
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine["gpu"] = f"{properties.name}, {properties.total_memory / _MIB:.0f} MiB"
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            machine[package] = metadata.version(package)
    return machine


@dataclass
class Report:
    """A table of figures with everything that is needed to repeat it.

    Attributes:
        title: what was measured.
        device: where.
        settings: of the run: sizes, rounds, configs, commit.
        rows: the table; the keys of the first are its columns.
        notes: what a reader has to know, a sentence each.
    """

    title: str
    device: torch.device
    settings: dict[str, Any]
    rows: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """The report as Markdown."""
        machine = describe_machine(self.device)
        columns = list(self.rows[0]) if self.rows else []
        lines = [
            f"# {self.title}",
            "",
            f"`{command_line()}`",
            "",
            *(f"- {key}: {value}" for key, value in {**machine, **self.settings}.items()),
            "",
            "| " + " | ".join(columns) + " |",
            "|" + "---|" * len(columns),
            *(
                "| " + " | ".join(_cell(row.get(column)) for column in columns) + " |"
                for row in self.rows
            ),
            "",
            *(f"{note}" for note in self.notes),
        ]
        return "\n".join(lines).rstrip() + "\n"

    def write(self, folder: Path, name: str) -> tuple[Path, Path]:
        """Write ``<name>.md`` and ``<name>.json``.

        Returns:
            The two paths.
        """
        folder.mkdir(parents=True, exist_ok=True)
        content = {
            "title": self.title,
            "command": command_line(),
            "machine": describe_machine(self.device),
            "settings": self.settings,
            "rows": self.rows,
            "notes": self.notes,
        }
        texts = {".md": self.markdown(), ".json": json.dumps(content, indent=1) + "\n"}
        paths = []
        for suffix, text in texts.items():
            path = folder / f"{name}{suffix}"
            with replacing(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
            paths.append(path)
        return paths[0], paths[1]


def command_line() -> str:
    """The command of this process as one would type it."""
    return " ".join(["python", *sys.argv])


class _ResidentMemory:
    """Watches the resident memory of this process from a thread."""

    def __enter__(self) -> _ResidentMemory:
        self._start = self._peak = _resident_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._peak = max(self._peak, _resident_bytes())

    @property
    def peak_over_start(self) -> int:
        return self._peak - self._start

    def _watch(self) -> None:
        while not self._done.wait(_SAMPLING_INTERVAL):
            self._peak = max(self._peak, _resident_bytes())


def _resident_bytes() -> int:
    """Resident memory; 0 where the system does not say."""
    with suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _time(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)
