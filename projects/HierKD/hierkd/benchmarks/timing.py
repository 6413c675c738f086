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
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
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
    "cell",
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
_MIB = 2**20

median = statistics.median


def measure(
    candidates: Mapping[str, Callable[[], object]], device: torch.device, rounds: int
) -> dict[str, Seconds]:
    """Time alternatives in turns, after a round that is not timed.

    Args:
        candidates: name to what is timed.
        device: waited for inside the timed region.
        rounds: how many times each is timed.

    Returns:
        Name to its times; round i of every candidate was taken next to round i of the others.
    """
    names = list(candidates)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in tqdm(range(1 + rounds), desc="rounds", unit="round", leave=False):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            started = synchronized(device)
            candidates[name]()
            if number > 0:
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

    On a GPU what PyTorch's allocator hands out; on a CPU the resident memory of the process, which
    Linux alone tells: NaN elsewhere.
    """
    gc.collect()
    if device.type == "cuda":
        synchronized(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        synchronized(device)
        return (torch.cuda.max_memory_allocated(device) - before) / _MIB
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # memory kept for reuse would hide what is needed
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what there is
    except OSError:
        return math.nan
    before = _peak_kib()
    call()
    return (_peak_kib() - before) / 1024


def _peak_kib() -> int:
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


@dataclass
class Report:
    """A table of figures with everything that is needed to repeat it."""

    title: str
    device: torch.device
    settings: dict[str, Any]  # of the run: sizes, rounds, configs, commit
    rows: list[dict[str, Any]]  # the keys of the first are the columns
    notes: list[str]  # what a reader has to know, a sentence each

    def content(self) -> dict[str, Any]:
        """The report as data, with the hardware, threads and versions that it belongs to."""
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
        return {
            "title": self.title,
            "command": " ".join(["python", *sys.argv]),
            "machine": machine,
            "settings": self.settings,
            "rows": self.rows,
            "notes": self.notes,
        }

    def markdown(self) -> str:
        """The report as Markdown."""
        content = self.content()
        facts = {**content["machine"], **self.settings}
        columns = list(self.rows[0])
        cells = [[cell(row[column]) for column in columns] for row in self.rows]
        parts = (
            f"# {self.title}",
            f"`{content['command']}`",
            "\n".join(f"- {key}: {value}" for key, value in facts.items()),
            tabulate(cells, columns, tablefmt="github", disable_numparse=True),
            *self.notes,
        )
        return "\n\n".join(parts) + "\n"

    def write(self, folder: Path, name: str) -> tuple[Path, Path]:
        """Write ``<name>.md`` and ``<name>.json``; returns their paths."""
        markdown, data = folder / f"{name}.md", folder / f"{name}.json"
        text = json.dumps(self.content(), indent=1) + "\n"
        for path, written in ((markdown, self.markdown()), (data, text)):
            with replacing(path) as temporary:
                temporary.write_text(written, encoding="utf-8")
        return markdown, data


def cell(value: Any) -> str:
    """A value of a row as it stands in a table."""
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)


class RandomTeacher:
    """A ``Teacher`` that looks random embeddings up instead of asking CLIP: unit rows of D."""

    logit_scale = 100.0

    def __init__(self, embed_dim: int, device: str) -> None:
        self.embed_dim = embed_dim
        self._rows = torch.zeros(0, embed_dim, device=device)

    def encode_regions(
        self, images: Sequence[Tensor], boxes: Sequence[Tensor], crop_scale: float
    ) -> Tensor:
        """(P, D), one for each of the P boxes of all images."""
        return self._first(sum(map(len, boxes)))

    def encode_classes(self, names: Sequence[str]) -> Tensor:
        """(K, D); of captions likewise."""
        return self._first(len(names))

    encode_captions = encode_classes

    def _first(self, count: int) -> Tensor:
        if len(self._rows) < count:
            rows = torch.randn(count, self.embed_dim, generator=torch.Generator().manual_seed(0))
            self._rows = F.normalize(rows, dim=1).to(self._rows)
        return self._rows[:count]


def random_hierkd(
    config_file: str, num_classes: int, device: torch.device, opts: Sequence[str] = ()
) -> detector.HierKD:
    """Build HierKD with random weights and a vocabulary of random embeddings, without CLIP.

    ``opts`` are KEY VALUE ... on top of the config. The detector is in training mode.
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
