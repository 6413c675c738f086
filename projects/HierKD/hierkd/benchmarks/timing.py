"""Times of alternatives, taken in turns in one process, the report that states them, and detectors
with random weights, whose times are those of trained ones.

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
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from tabulate import tabulate  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from hierkd.files import replacing
from hierkd.load_config import load_config
from hierkd.modeling import detector
from hierkd.reports.run_record import processor_name

__all__ = [
    "RandomTeacher",
    "Report",
    "measure",
    "median",
    "peak_memory",
    "random_hierkd",
    "ratio",
    "synchronized",
    "tame",
]

Seconds = tuple[float, ...]
"""What one alternative took in each round."""

_PACKAGES = ("torch", "torchvision", "detectron2", "sal-detectron2", "numpy")
_SAMPLING_INTERVAL = 0.002  # seconds between two looks at the resident memory of the process
_MIB = 2**20

median = statistics.median


def measure(
    candidates: Mapping[str, Callable[[], object]],
    *,
    device: torch.device,
    rounds: int,
    warmup: int = 1,
) -> dict[str, Seconds]:
    """Time alternatives in turns.

    Args:
        candidates: name to what is timed; each is called ``warmup + rounds`` times.
        device: waited for inside the timed region.
        rounds: how many times each is timed.
        warmup: how many rounds go before, untimed.

    Returns:
        Name to its times; round i of every candidate was taken next to round i of the others.
    """
    names = list(candidates)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in tqdm(range(warmup + rounds), desc="rounds", unit="round", leave=False):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            started = synchronized(device)
            candidates[name]()
            if number >= warmup:
                seconds[name].append(synchronized(device) - started)
    return {name: tuple(taken) for name, taken in seconds.items()}


def synchronized(device: torch.device) -> float:
    """The time in seconds, once a device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def ratio(seconds: Seconds, reference: Seconds) -> float:
    """Median over the rounds of the time of one alternative over that of another."""
    return median(mine / theirs for mine, theirs in zip(seconds, reference, strict=True))


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
    sizes, done = [_resident_bytes()], threading.Event()

    def watch() -> None:
        while not done.wait(_SAMPLING_INTERVAL):
            sizes.append(_resident_bytes())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        call()
    finally:
        done.set()
        thread.join()
    return (max(*sizes, _resident_bytes()) - sizes[0]) / _MIB


def _resident_bytes() -> int:
    """Resident memory; 0 where the system does not say."""
    with suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


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

    def machine(self) -> dict[str, str]:
        """Hardware, threads and versions that the figures belong to."""
        machine = {
            "processor": f"{processor_name()}, {os.cpu_count()} CPUs",
            "threads": str(torch.get_num_threads()),
            "system": platform.platform(),
            "python": platform.python_version(),
        }
        if self.device.type == "cuda":
            properties = torch.cuda.get_device_properties(self.device)
            machine["gpu"] = f"{properties.name}, {properties.total_memory / _MIB:.0f} MiB"
        for package in _PACKAGES:
            with suppress(metadata.PackageNotFoundError):
                machine[package] = metadata.version(package)
        return machine

    def markdown(self) -> str:
        """The report as Markdown."""
        facts = {**self.machine(), **self.settings}
        columns = list(self.rows[0])
        cells = [[_cell(row.get(column)) for column in columns] for row in self.rows]
        parts = (
            f"# {self.title}",
            f"`{_command_line()}`",
            "\n".join(f"- {key}: {value}" for key, value in facts.items()),
            tabulate(cells, columns, tablefmt="github", disable_numparse=True),
            *self.notes,
        )
        return "\n\n".join(parts) + "\n"

    def write(self, folder: Path, name: str) -> tuple[Path, Path]:
        """Write ``<name>.md`` and ``<name>.json``; returns their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        content: dict[str, Any] = {
            "title": self.title,
            "command": _command_line(),
            "machine": self.machine(),
        }
        content |= {"settings": self.settings, "rows": self.rows, "notes": self.notes}
        markdown, data = folder / f"{name}.md", folder / f"{name}.json"
        for path, text in (markdown, self.markdown()), (data, json.dumps(content, indent=1) + "\n"):
            with replacing(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
        return markdown, data


def _command_line() -> str:
    return " ".join(["python", *sys.argv])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)


class RandomTeacher:
    """A ``Teacher`` that looks random embeddings up instead of asking CLIP.

    Args:
        embed_dim: D.
        device: of the embeddings.
    """

    logit_scale = 100.0

    def __init__(self, embed_dim: int, device: str) -> None:
        self.embed_dim = embed_dim
        self._rows = torch.zeros(0, embed_dim, device=device)

    def encode_regions(
        self, images: Sequence[Tensor], boxes: Sequence[Tensor], crop_scale: float
    ) -> Tensor:
        """(P, D), L2-normalised, one for each of the P boxes of all images."""
        return self._first(sum(map(len, boxes)))

    def encode_captions(self, captions: Sequence[str]) -> Tensor:
        """(C, D), L2-normalised."""
        return self._first(len(captions))

    def encode_classes(self, names: Sequence[str]) -> Tensor:
        """(K, D), L2-normalised."""
        return self._first(len(names))

    def _first(self, count: int) -> Tensor:
        if len(self._rows) < count:
            generator = torch.Generator().manual_seed(0)
            rows = torch.randn(count, self.embed_dim, generator=generator)
            self._rows = F.normalize(rows, dim=1).to(self._rows)
        return self._rows[:count]


def random_hierkd(
    config_file: str, num_classes: int, device: torch.device, opts: Sequence[str] = ()
) -> detector.HierKD:
    """Build HierKD with random weights and a vocabulary of random embeddings, without CLIP.

    Args:
        config_file: path of a YAML.
        num_classes: size of the vocabulary.
        device: where it runs.
        opts: KEY VALUE ... on top of the config.

    Returns:
        The detector in training mode.
    """
    own = ("MODEL.DEVICE", str(device), "MODEL.WEIGHTS", "", "DATASETS.TRAIN", "()")
    cfg = load_config(config_file, [*opts, *own])
    teacher = RandomTeacher(cfg.MODEL.TEXT_CLASSIFIER.EMBED_DIM, cfg.MODEL.DEVICE)
    torch.manual_seed(0)
    with mock.patch.object(detector, "build_teacher", return_value=teacher):
        model: detector.HierKD = build_model(cfg)
    tame(model)
    model.set_vocabulary([f"class {number}" for number in range(num_classes)])
    return model


def tame(model: nn.Module) -> None:
    """Keep the activations of a random ResNet in range.

    A frozen normalisation with its initial statistics passes values on as they are, and they grow
    from block to block until they overflow; halved in each, they do not.
    """
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.weight.fill_(0.5)
