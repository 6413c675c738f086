"""What a run's folder says about where its figures come from: starts and evaluations.

``environment.json`` is a list with an entry for every start of a training in the folder: when, by
which command, from which iteration, at which commit, with which versions, on what hardware.
``evaluations.json`` is a list with an entry for every ``--eval-only``, which leaves no other
figures as data: the same, the weights, and the figures. (A training's are in ``metrics.json``.)
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from hierkd.experiments.runs import git_commit
from hierkd.files import replacing
from hierkd.reports.hardware import processor_name

__all__ = [
    "ENVIRONMENT",
    "EVALUATIONS",
    "describe_environment",
    "read_entries",
    "record_evaluation",
    "record_start",
]

logger = logging.getLogger(__name__)

ENVIRONMENT = "environment.json"
EVALUATIONS = "evaluations.json"

# Importable names of what decides figures.
_LIBRARIES = ("hierkd", "torch", "torchvision", "detectron2", "numpy", "PIL", "cv2")


def describe_environment() -> dict[str, Any]:
    """Describe versions and hardware of this process.

    Returns:
        ``versions``: name to version, of what is installed; ``hardware``: ``processor``, ``cores``,
        ``memory_gib``, and ``gpus``, a list of names. Names of machines and users are left out: a
        report may be passed on.
    """
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = str(importlib.import_module(name).__version__)
        except (ImportError, AttributeError):  # not there, or of no version
            continue
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": versions,
        "hardware": {
            "system": f"{platform.system()} {platform.machine()}",
            "processor": processor_name(),
            "cores": len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count(),
            "memory_gib": _memory_gib(),
            "gpus": gpus,
        },
    }


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):  # not known there
        return None


def record_start(
    folder: str | os.PathLike[str],
    *,
    command: str,
    root: Path,
    iteration: int,
    num_processes: int,
) -> None:
    """Add an entry to ``environment.json``, which is written whole or not at all.

    A record that cannot be written costs a warning, not the training.

    Args:
        folder: Of the run.
        command: The command line.
        root: Folder of the code, for its commit.
        iteration: The first one to be done: 0, or where a run is resumed.
        num_processes: Of the training, on all machines.
    """
    _append(
        Path(folder) / ENVIRONMENT,
        {
            "date": _now(),
            "command": command,
            "iteration": iteration,
            "commit": git_commit(root),
            "num_processes": num_processes,
            **describe_environment(),
        },
    )


def record_evaluation(
    folder: str | os.PathLike[str],
    results: Mapping[str, Mapping[str, Mapping[str, float]]],
    *,
    command: str,
    root: Path,
    weights: str,
    num_processes: int,
) -> None:
    """Add an entry to ``evaluations.json``, likewise.

    Args:
        folder: Of the run.
        results: Dataset to task to figures, in percent; NaN, unknown to JSON, becomes null.
        command: The command line.
        root: Folder of the code, for its commit.
        weights: What was evaluated.
        num_processes: Of the evaluation.
    """
    figures = {
        f"{dataset}/{task}/{name}": float(value) if math.isfinite(value) else None
        for dataset, tasks in results.items()
        for task, of_task in tasks.items()
        for name, value in of_task.items()
    }
    _append(
        Path(folder) / EVALUATIONS,
        {
            "date": _now(),
            "command": command,
            "weights": weights,
            "commit": git_commit(root),
            "num_processes": num_processes,
            **describe_environment(),
            "figures": figures,
        },
    )


def read_entries(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read such a file; no entries if there is none.

    Raises:
        ValueError: It is not a list of JSON objects.
    """
    path = Path(path)
    if not path.is_file():
        return []
    try:
        entries = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(entries, list) or not all(isinstance(each, dict) for each in entries):
        raise ValueError(f"{path}: expected a list of objects, found something else")
    return entries


def _append(path: Path, entry: Mapping[str, Any]) -> None:
    try:
        entries: Sequence[Mapping[str, Any]] = read_entries(path)
    except ValueError as error:
        kept = path.with_suffix(".broken.json")
        logger.warning("%s; it is kept as %s, and a new one begun", error, kept)
        path.replace(kept)
        entries = []
    try:
        with replacing(path) as making:
            text = json.dumps([*entries, entry], indent=1, allow_nan=False) + "\n"
            making.write_text(text, encoding="utf-8")
    except OSError as error:
        logger.warning("%s: could not be written (%s)", path, error)


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
