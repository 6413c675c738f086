"""What a run's folder says of itself: where its figures come from, and what they are.

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
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import yaml

from hierkd.files import replacing
from hierkd.reports.metrics import RunMetrics, read_run_metrics

__all__ = [
    "Evaluation",
    "RunFolder",
    "git_commit",
    "processor_name",
    "read_entries",
    "read_run",
    "record_evaluation",
    "record_start",
]

logger = logging.getLogger(__name__)

ENVIRONMENT = "environment.json"
EVALUATIONS = "evaluations.json"

# Importable names of what decides figures.
_LIBRARIES = ("hierkd", "torch", "torchvision", "detectron2", "numpy", "PIL", "cv2")


# ----------------------------------------------------------------------------------------- writing


def git_commit(root: Path) -> str | None:
    """The commit that ``root`` is at, with "+changes" if files differ; None outside of git."""
    try:
        commands = (["rev-parse", "--short=9", "HEAD"], ["status", "--porcelain", "-uno"])
        head, changes = (
            subprocess.run(
                ["git", "-C", str(root), *command], capture_output=True, text=True, check=True
            ).stdout.strip()
            for command in commands
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}+changes" if changes else head


def processor_name() -> str:
    """The processor's name, as the system gives it; "" if it does not."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def record_start(
    folder: str | os.PathLike[str],
    *,
    command: str,
    root: Path,
    iteration: int,
    num_processes: int,
) -> None:
    """Add an entry to ``environment.json``; where it cannot be written, a warning says so.

    Args:
        folder: Of the run.
        command: The command line.
        root: Folder of the code, for its commit.
        iteration: The first one to be done: 0, or where a run is resumed.
        num_processes: Of the training, on all machines.
    """
    entry = _circumstances(command, root, num_processes)
    _append(Path(folder) / ENVIRONMENT, {"iteration": iteration, **entry})


def record_evaluation(
    folder: str | os.PathLike[str],
    results: Mapping[str, Mapping[str, Mapping[str, float]]],
    *,
    command: str,
    root: Path,
    weights: str,
    num_processes: int,
) -> None:
    """Add an entry to ``evaluations.json``, as :func:`record_start` does.

    ``results`` is dataset to task to figures, in percent; NaN, unknown to JSON, becomes null.
    """
    figures = {
        f"{dataset}/{task}/{name}": float(value) if math.isfinite(value) else None
        for dataset, tasks in results.items()
        for task, of_task in tasks.items()
        for name, value in of_task.items()
    }
    entry = _circumstances(command, root, num_processes)
    _append(Path(folder) / EVALUATIONS, {"weights": weights, **entry, "figures": figures})


def _circumstances(command: str, root: Path, num_processes: int) -> dict[str, Any]:
    """When, how and on what. Names of machines and users are left out: a report is passed on."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = str(importlib.import_module(name).__version__)
        except (ImportError, AttributeError):  # not there, or of no version
            continue
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    known = hasattr(os, "sched_getaffinity")
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": command,
        "commit": git_commit(root),
        "num_processes": num_processes,
        "versions": versions,
        "hardware": {
            "system": f"{platform.system()} {platform.machine()}",
            "processor": processor_name(),
            "cores": len(os.sched_getaffinity(0)) if known else os.cpu_count(),
            "memory_gib": _memory_gib(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
    }


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):  # not known there
        return None


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


# ----------------------------------------------------------------------------------------- reading


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


@dataclass(frozen=True)
class Evaluation:
    """What was evaluated and when; dataset to ``novel/AP50`` or ``AP50-cat`` to percent or NaN."""

    title: str
    figures: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class RunFolder:
    """What was found in a run's folder.

    Attributes:
        path: The folder.
        config: Of ``config.yaml``, plain values; {} if there is none.
        config_text: The file itself.
        metrics: Without curves if nothing was trained.
        starts: Entries of ``environment.json``, since the run was begun from iteration 0.
        evaluations: Last ones first; the first are the run's figures.
        notes: What is missing or broken.
    """

    path: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    config_text: str = ""
    metrics: RunMetrics = field(default_factory=lambda: RunMetrics({}))
    starts: Sequence[Mapping[str, Any]] = ()
    evaluations: Sequence[Evaluation] = ()
    notes: Sequence[str] = ()

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.resolve().name

    @property
    def figures(self) -> Mapping[str, Mapping[str, float]]:
        """Those of the first evaluation; {} if nothing was evaluated."""
        return self.evaluations[0].figures if self.evaluations else {}

    @property
    def num_iterations(self) -> int | None:
        """How many steps there are losses of; None without any."""
        iterations, _ = self.metrics.curves.get("total_loss", ([], []))
        return iterations[-1] + 1 if iterations else None


def read_run(path: str | os.PathLike[str]) -> RunFolder:
    """Read all that a run's folder says.

    What a folder lacks, because the run was killed, only evaluated, or made before something was
    recorded, is left out, with a note. Nothing in the folder is run: configs, metrics and results
    are read as plain values.

    Raises:
        FileNotFoundError: There is no such folder, or it is none of a run; says what is missing.
    """
    folder = Path(path)
    known = ("config.yaml", "metrics.json", EVALUATIONS)
    if not any((folder / name).is_file() for name in known):
        raise FileNotFoundError(
            f"no folder of a run: {str(folder)!r} (looked from {os.getcwd()!r}) has none of "
            f"{', '.join(known)}, which train_net.py writes into OUTPUT_DIR"
        )
    notes: list[str] = []
    text, config = _read_config(folder / "config.yaml", notes)
    metrics = _read_metrics(folder / "metrics.json", notes)
    starts = _read_noted(folder / ENVIRONMENT, notes)
    if not starts:
        notes.append(f"There is no {ENVIRONMENT}: when, where and at which commit is not recorded.")
    begun = max((i for i, each in enumerate(starts) if each.get("iteration") == 0), default=0)
    if begun > 0:
        notes.append(f"{begun} earlier starts in this folder are left out: it was begun anew.")
    trained = [
        Evaluation(f"in training, iteration {iteration}", _by_dataset(figures))
        for iteration, figures in metrics.evaluations.items()
    ]
    alone = [
        Evaluation(
            f"--eval-only of {entry.get('weights') or 'random weights'}, {entry.get('date')}",
            _by_dataset(entry.get("figures")),
        )
        for entry in reversed(_read_noted(folder / EVALUATIONS, notes))
    ]
    # the figures of a training are those of its own evaluations; others may be of other weights
    return RunFolder(folder, config, text, metrics, starts[begun:], [*trained, *alone], notes)


def _read_config(path: Path, notes: list[str]) -> tuple[str, Mapping[str, Any]]:
    if not path.is_file():
        notes.append("There is no config.yaml: the config is unknown, and pictures are left out.")
        return "", {}
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        config = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        config = error
    if not isinstance(config, dict):
        notes.append(f"config.yaml cannot be read: expected keys and values, got {config}")
        return text, {}
    return text, config


def _read_metrics(path: Path, notes: list[str]) -> RunMetrics:
    if not path.is_file():
        notes.append("There is no metrics.json: nothing was trained here.")
        return RunMetrics({})
    metrics = read_run_metrics(path)
    if metrics.num_broken:
        notes.append(f"{metrics.num_broken} broken lines of metrics.json were skipped.")
    if metrics.num_restarts:
        notes.append(
            f"The run went back to an earlier iteration {metrics.num_restarts} times; steps that "
            "were done again are shown once, as they were done last."
        )
    return metrics


def _read_noted(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    try:
        return read_entries(path)
    except ValueError as error:
        notes.append(str(error))
        return []


def _by_dataset(figures: Any) -> dict[str, dict[str, float]]:
    """Dataset to name to value, of ``<dataset>/<task>/<name>``; what is no number becomes NaN."""
    found: dict[str, dict[str, float]] = {}
    for key, value in figures.items() if isinstance(figures, Mapping) else ():
        if key.count("/") >= 2:
            dataset, _, name = key.split("/", 2)
            is_number = isinstance(value, int | float)
            found.setdefault(dataset, {})[name] = float(value) if is_number else math.nan
    return found
