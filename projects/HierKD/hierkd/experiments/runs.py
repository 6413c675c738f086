"""Training runs as data: start ``train_net.py`` with a config and a seed, keep what came out.

A run that is complete has a ``run.json`` in its folder: what was trained, at which commit, and
every figure of its evaluation. Nothing else marks completion, so a run that was killed is taken up
from its last checkpoint.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hierkd.files import write_json_atomically
from hierkd.reports.metrics import read_run_metrics
from hierkd.reports.run_record import git_commit

__all__ = ["Run", "execute", "find_figure", "git_commit", "read_record"]

RECORD = "run.json"


@dataclass(frozen=True)
class Run:
    """One config with one seed in one folder."""

    name: str  # in messages
    config: str  # path of the YAML, relative to the project's root
    opts: tuple[str, ...]  # KEY VALUE ... on top of it
    seed: int
    folder: Path  # OUTPUT_DIR
    num_gpus: int = 0  # of this machine; 0: one process on whatever MODEL.DEVICE says

    def command(self) -> list[str]:
        """The command line that trains and evaluates it, or goes on with it."""
        resume = any(self.folder.glob("model_*.pth")) or (self.folder / "last_checkpoint").exists()
        return [
            *(sys.executable, "train_net.py", "--config-file", self.config),
            *(["--num-gpus", str(self.num_gpus)] if self.num_gpus else []),
            *(["--resume"] if resume else []),
            *("SEED", str(self.seed), "OUTPUT_DIR", str(self.folder), *self.opts),
        ]

    def identity(self) -> dict[str, Any]:
        """What must agree for a record to be this run's."""
        return {"config": self.config, "opts": list(self.opts), "seed": self.seed}


def read_record(run: Run) -> dict[str, Any] | None:
    """The record of a complete run; None if it is not complete.

    Raises:
        ValueError: the folder holds another run.
    """
    path = run.folder / RECORD
    if not path.is_file():
        return None
    record: dict[str, Any] = json.loads(path.read_text())
    found = {key: record.get(key) for key in run.identity()}
    if found != run.identity():
        raise ValueError(
            f"{path} is of another run: found {found}, expected {run.identity()}. Move it away or "
            "choose another folder."
        )
    return record


def find_figure(metrics: Mapping[str, float], part: str, metric: str) -> float | None:
    """One figure of an evaluation, in percent; None if the run was not evaluated so.

    Args:
        metrics: what detectron2 wrote: ``<dataset>/<task>/<metric>`` -> value.
        part: ``"base"``, ``"novel"`` or ``"all"``: the last part of the dataset's name.
        metric: such as ``"novel/AP50"``.
    """
    for key, value in metrics.items():
        dataset, *rest = key.split("/", 2)
        if dataset.endswith(f"_{part}") and rest[1:] == [metric]:
            return value
    return None


def execute(runs: Sequence[Run], root: Path, *, jobs: int, threads: int) -> None:
    """Do the runs that are not complete, ``jobs`` at a time, each with ``threads`` of the CPU.

    ``root`` is the project's, where ``train_net.py`` lies.

    Raises:
        RuntimeError: runs failed, after the others have ended; names their logs.
        ValueError: a folder holds another run; before anything starts.
    """
    missing = [run for run in runs if read_record(run) is None]
    with ThreadPoolExecutor(jobs) as pool:
        codes = pool.map(lambda run: _train(run, root, threads), missing)
        failed = [
            f"{run.name}, seed {run.seed} (see {run.folder / 'stdout.txt'})"
            for run, code in zip(missing, tqdm(codes, "runs", len(missing)), strict=True)
            if code != 0
        ]
    if failed:
        raise RuntimeError("failed: " + "; ".join(failed))


def _train(run: Run, root: Path, threads: int) -> int:
    """Run ``train_net.py`` to its end; returns its exit status."""
    run.folder.mkdir(parents=True, exist_ok=True)
    commit, started = git_commit(root), time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with (run.folder / "stdout.txt").open("a") as log:
        code = subprocess.run(
            run.command(), cwd=root, env=environment, stdout=log, stderr=subprocess.STDOUT,
            check=False,
        ).returncode  # fmt: skip
    if code == 0:
        evaluations = read_run_metrics(run.folder / "metrics.json").evaluations
        record = {
            **run.identity(),
            "name": run.name,
            "commit": commit,
            "torch": torch.__version__,
            "seconds_of_last_start": round(time.monotonic() - started, 1),
            "metrics": next(iter(evaluations.values()), {}),
        }
        write_json_atomically(run.folder / RECORD, record)
    return code
