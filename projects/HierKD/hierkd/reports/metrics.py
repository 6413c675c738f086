"""detectron2's ``metrics.json``, also of runs that were killed while they wrote it."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Curve", "RunMetrics", "mend_metrics", "read_run_metrics"]

logger = logging.getLogger(__name__)

Curve = tuple[list[int], list[float]]  # iterations, increasing, and the values there


@dataclass(frozen=True)
class RunMetrics:
    """The curve of each scalar that a run has written; NaN is kept."""

    curves: Mapping[str, Curve]

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
    """Read the scalars of a run that may have been killed and resumed.

    Where a run went back to an earlier iteration, what it had written from there on is of steps
    that were done again, and is left out, even if they have not all been done again yet. The lines
    of one writing are in no order; ``total_loss`` tells that a run went back.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line other than the last is not JSON.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no metrics of a training run")
    *lines, _ = Path(path).read_bytes().split(b"\n")  # the last one may still be written
    found: dict[str, dict[int, float]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            iteration = entry.pop("iteration")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}: expected an object with an iteration, got {line[:60]!r}"
            ) from error
        back = "total_loss" in entry and iteration <= next(
            reversed(found.get("total_loss", {})), -1
        )
        for name in found if back else entry:
            points = found.get(name, {})
            while points and next(reversed(points)) >= iteration:
                points.popitem()
        for name, value in entry.items():
            found.setdefault(name, {})[iteration] = float(value)
    return RunMetrics({k: (list(v), list(v.values())) for k, v in sorted(found.items()) if v})


def mend_metrics(path: str | os.PathLike[str]) -> None:
    """Cut off a last line that was not written to its end, before more lines are appended."""
    if not Path(path).is_file():
        return
    content = Path(path).read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
        logger.warning("%s: cut off the last line, which was not written to its end", path)
