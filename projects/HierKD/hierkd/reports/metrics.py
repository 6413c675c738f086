"""detectron2's ``metrics.json``, also of runs that were killed while they wrote it."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Curve", "RunMetrics", "mend_metrics", "read_run_metrics"]

logger = logging.getLogger(__name__)

Curve = tuple[list[int], list[float]]  # iterations, increasing, and the values there


@dataclass(frozen=True)
class RunMetrics:
    """All that a run has written, each thing done twice taken once.

    Attributes:
        curves: name of a scalar to its curve; NaN is kept.
        num_broken: lines that are no JSON object with an iteration, and were skipped.
        num_restarts: how often the run went back to an earlier iteration.
    """

    curves: Mapping[str, Curve]
    num_broken: int = 0
    num_restarts: int = 0

    @property
    def evaluations(self) -> dict[int, dict[str, float]]:
        """Iteration, last first, to the figures (``<dataset>/<task>/<name>``) evaluated there."""
        found: dict[int, dict[str, float]] = {}
        for name, (iterations, values) in self.curves.items():
            if name.count("/") >= 2:
                for iteration, value in zip(iterations, values, strict=True):
                    found.setdefault(iteration, {})[name] = value
        return dict(sorted(found.items(), reverse=True))


def read_run_metrics(path: str | os.PathLike[str]) -> RunMetrics:
    """Read the scalars of a run that may have been killed, resumed and damaged.

    Where a run went back to an earlier iteration, what it had written from there on is of steps
    that were done again, and is left out, even if they have not all been done again yet.

    Args:
        path: of ``metrics.json``.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no metrics of a training run")
    *lines, unfinished = Path(path).read_bytes().split(b"\n")
    parsed = [_parse(line) for line in lines if line.strip()]
    entries = [entry for entry in parsed if entry is not None]
    values, num_restarts = _merge(entries)
    curves = {
        name: (list(points), list(points.values()))
        for name, points in sorted(values.items())
        if points
    }
    num_broken = len(parsed) - len(entries) + bool(unfinished.strip())
    return RunMetrics(curves, num_broken, num_restarts)


def _parse(line: bytes) -> dict[str, Any] | None:
    """One line of the file; None if it is no object with an iteration."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or not isinstance(entry.get("iteration"), int):
        return None
    return entry


def _merge(entries: Iterable[Mapping[str, Any]]) -> tuple[dict[str, dict[int, float]], int]:
    """Name to iteration (increasing) to value, and how often the iterations went back.

    The lines that one writing leaves, the losses and an evaluation's figures, are in no order, so
    that only a scalar's own iterations tell; of ``total_loss``, that all others went back, too.
    """
    values: dict[str, dict[int, float]] = {}
    num_restarts = 0
    for entry in entries:
        iteration = entry["iteration"]
        if "total_loss" in entry and iteration <= next(reversed(values.get("total_loss", {})), -1):
            num_restarts += 1
            for points in values.values():
                _forget(points, iteration)
        for name, value in entry.items():
            if name == "iteration" or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            points = values.setdefault(name, {})
            _forget(points, iteration)
            points[iteration] = float(value)
    return values, num_restarts


def _forget(points: dict[int, float], start: int) -> None:
    """Drop the last points, those from an iteration on."""
    while points and next(reversed(points)) >= start:
        points.popitem()


def mend_metrics(path: str | os.PathLike[str]) -> None:
    """Cut off a last line that was not written to its end, before more lines are appended.

    Args:
        path: of ``metrics.json``; need not exist.
    """
    if not Path(path).is_file():
        return
    content = Path(path).read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
        logger.warning("%s: cut off the last line, which was not written to its end", path)
