"""What a run's folder says of itself: where its figures come from, and what they are.

``environment.json`` is a list with an entry for every start of a training in the folder: when, by
which command, from which iteration, at which commit, with which versions, on what hardware.
``evaluations.json`` is a list with an entry for every ``--eval-only``, which leaves no other
figures as data: the same, the weights, and the figures. (A training's are in ``metrics.json``.)
"""

from __future__ import annotations

import importlib
import json
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
    "circumstances",
    "git_commit",
    "processor_name",
    "read_entries",
    "read_run",
    "record_evaluation",
    "record_start",
]

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
    """The processor's name, as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")  # of Linux
    text = cpuinfo.read_text(errors="replace") if cpuinfo.is_file() else ""
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
    """Add an entry to ``environment.json``.

    Args:
        folder: Of the run.
        command: The command line.
        root: Folder of the code, for its commit.
        iteration: The first one to be done: 0, or where a run is resumed.
        num_processes: Of the training, on all machines.
    """
    entry = circumstances(command, root, num_processes)
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
    entry = circumstances(command, root, num_processes)
    _append(Path(folder) / EVALUATIONS, {"weights": weights, **entry, "figures": figures})


def circumstances(command: str, root: Path, num_processes: int) -> dict[str, Any]:
    """When, how and on what a command runs; arguments as of :func:`record_start`.

    Names of machines and users are left out: a report is passed on.
    """
    libraries = {name: importlib.import_module(name).__version__ for name in _LIBRARIES}
    cuda = {"cuda": torch.version.cuda} if torch.version.cuda else {}
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": command,
        "commit": git_commit(root),
        "num_processes": num_processes,
        "versions": {"python": platform.python_version(), **libraries, **cuda},
        "hardware": {
            "system": f"{platform.system()} {platform.machine()}",
            "processor": processor_name(),
            "cores": os.cpu_count(),
            "memory_gib": round(memory, 1),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
    }


def _append(path: Path, entry: Mapping[str, Any]) -> None:
    text = json.dumps([*read_entries(path), entry], indent=1, allow_nan=False) + "\n"
    with replacing(path) as making:
        making.write_text(text, encoding="utf-8")


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
    except ValueError as error:
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
        notes: What is missing.
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

    What a folder lacks, because the run was killed or only evaluated, is left out, with a note.

    Raises:
        FileNotFoundError: There is no such folder, or it is none of a run; says what is missing.
        ValueError: A file of it is broken.
    """
    folder = Path(path)
    known = ("config.yaml", "metrics.json", EVALUATIONS)
    if not any((folder / name).is_file() for name in known):
        raise FileNotFoundError(
            f"no folder of a run: {str(folder)!r} (looked from {os.getcwd()!r}) has none of "
            f"{', '.join(known)}, which train_net.py writes into OUTPUT_DIR"
        )
    losses = {
        "config.yaml": "the config is unknown, and pictures are left out",
        "metrics.json": "nothing was trained here",
        ENVIRONMENT: "when, where and at which commit is not recorded",
    }
    missing = {name: loss for name, loss in losses.items() if not (folder / name).is_file()}
    notes = [f"There is no {name}: {loss}." for name, loss in missing.items()]
    text = "" if "config.yaml" in missing else (folder / "config.yaml").read_text(encoding="utf-8")
    metrics = RunMetrics({})
    if "metrics.json" not in missing:
        metrics = read_run_metrics(folder / "metrics.json")
    starts = read_entries(folder / ENVIRONMENT)
    begun = max((i for i, each in enumerate(starts) if each["iteration"] == 0), default=0)
    if begun > 0:
        notes.append(f"{begun} earlier starts in this folder are left out: it was begun anew.")
    trained = [
        Evaluation(f"in training, iteration {iteration}", _by_dataset(figures))
        for iteration, figures in metrics.evaluations.items()
    ]
    alone = [
        Evaluation(
            f"--eval-only of {entry['weights'] or 'random weights'}, {entry['date']}",
            _by_dataset(entry["figures"]),
        )
        for entry in reversed(read_entries(folder / EVALUATIONS))
    ]
    # the figures of a training are those of its own evaluations; others may be of other weights
    evaluations = [*trained, *alone]
    config = _read_config(folder / "config.yaml", text)
    return RunFolder(folder, config, text, metrics, starts[begun:], evaluations, notes)


def _read_config(path: Path, text: str) -> Mapping[str, Any]:
    """Plain values; nothing in the file is run."""
    try:
        config = yaml.safe_load(text or "{}")
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected keys and values, got {config!r}")
    return config


def _by_dataset(figures: Mapping[str, float | None]) -> dict[str, dict[str, float]]:
    """Dataset to name to value, of ``<dataset>/<task>/<name>``; null becomes NaN."""
    found: dict[str, dict[str, float]] = {}
    for key, value in figures.items():
        dataset, _, name = key.split("/", 2)
        found.setdefault(dataset, {})[name] = math.nan if value is None else value
    return found
