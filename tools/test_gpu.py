#!/usr/bin/env python
"""All that a GPU has to show, in one call of at most eight minutes: what ``make test-gpu`` runs.

    python tools/test_gpu.py --output output/test_gpu

The tests marked ``gpu``, the benchmarks of a training step, of inference and of vocabularies with
full-size random weights, and 300 steps of the miniature with an evaluation on the GPU and on the
CPU. Each part is a process with a limit of its own: what fails leaves the others' figures. Writes
``test_gpu.json`` and ``test_gpu.html``. Without a GPU all sizes are small, and the figures mean
nothing. Trailing KEY VALUE pairs override the config of the training.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hierkd.command import run_command

ROOT = Path(__file__).resolve().parent.parent
# Of tools/benchmark.py: the subcommand, its options on a GPU, and on a CPU.
BENCHMARKS = {
    "step": ("step", "--rounds 8", "--rounds 1 --miniature --images 2 --size 64 96 --boxes 2"),
    "infer": (
        "infer",
        "--rounds 10 --batch 8 --no-compile",
        "--rounds 1 --batch 2 --size 64 96 --no-compile",
    ),
    "vocabulary": ("vocabulary", "--rounds 10", "--rounds 1 --size 64 96 --names 17 300"),
    "compiled": ("infer", "--rounds 5 --batch 8", ""),
}
# Seconds, at most, of each part, in its order: 480 together.
LIMITS = {
    **{"tests": 80, "step": 80, "infer": 45, "vocabulary": 35},
    **{"prepare": 80, "train": 50, "evaluate": 25, "compiled": 85},
}
MOST_DIFFERENT = 0.1  # AP50, percent
TAIL = 4000  # characters of what a part has said


def plan(output: Path, gpu: bool, opts: Sequence[str]) -> dict[str, list[str]]:
    """The command of each part."""
    from hierkd.miniature.world import miniature_root

    python, world = [sys.executable, "-W", "ignore"], miniature_root().resolve()
    tests = [path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text()]
    parts = {"tests": [*python, "-m", "pytest", "-m", "gpu", "-rA", *map(str, sorted(tests))]}
    for name, (subcommand, *options) in BENCHMARKS.items():
        if words := options[0 if gpu else 1].split():
            folder = ["--output", str(output / name)]
            parts[name] = [*python, "tools/benchmark.py", subcommand, *folder, *words]
    if not (world / "teacher.pt").is_file():
        parts["prepare"] = [*python, "tools/prepare_miniature.py"]
    train = [*python, "train_net.py", "--config-file", "configs/miniature/hierkd.yaml"]
    keys = {
        "MODEL.WEIGHTS": world / "backbone.pth",
        "MODEL.TEACHER.WEIGHTS": world / "teacher.pt",
        "DATASETS.TEST": "('miniature_ovd_test_all',)",
        "SOLVER.MAX_ITER": 300 if gpu else 4,
        "SOLVER.WARMUP_ITERS": 20 if gpu else 1,
        "SOLVER.AMP.ENABLED": gpu,
        "VIS_PERIOD": 0,
    }
    common = [*(str(word) for pair in keys.items() for word in pair), *opts]
    device, trained = "cuda" if gpu else "cpu", output / "train"
    parts["train"] = [*train, *common, "MODEL.DEVICE", device, "OUTPUT_DIR", str(trained)]
    again = ["MODEL.WEIGHTS", str(trained / "model_final.pth"), "OUTPUT_DIR"]
    parts["evaluate"] = [*train, "--eval-only", *common, *again, str(output / "evaluate")]
    return {name: parts[name] for name in LIMITS if name in parts}


def run_part(command: Sequence[str], limit: float) -> dict[str, Any]:
    """Run one part; how it ended, and the last that it said."""
    started = time.monotonic()
    with tempfile.TemporaryFile() as log:
        options: Any = {"stdout": log, "stderr": subprocess.STDOUT, "start_new_session": True}
        process = subprocess.Popen(command, cwd=ROOT, **options)
        try:
            status = process.wait(limit)
            ended = "done" if status == 0 else f"failed with status {status}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {limit:.0f} s"
        finally:
            with suppress(ProcessLookupError):  # with all that it has started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.seek(0)
        text = log.read().decode(errors="replace").replace(str(ROOT), ".")
    text = re.sub(r"[^\n]*\r", "", text)  # progress bars
    seconds = round(time.monotonic() - started, 1)
    return {"ended": ended, "seconds": seconds, "said": text[-TAIL:]}


def compare(output: Path) -> dict[str, Any]:
    """AP50 of the trained detector on its device and on the CPU, in percent; speed of a step."""
    from hierkd.reports.run_record import read_run

    trained, evaluated = (read_run(output / part) for part in ("train", "evaluate"))
    here, there = (
        {
            name: value
            for of_dataset in run.figures.values()
            for name, value in of_dataset.items()
            if name.endswith("/AP50")
        }
        for run in (trained, evaluated)
    )
    most = max(abs(here[name] - there[name]) for name in here)
    return {
        "AP50": {name: (here[name], there[name]) for name in here},
        "largest difference": most,
        "seconds a step": trained.metrics.curves["time"][1][-1],
        "ended": "done" if most <= MOST_DIFFERENT else f"AP50 differs by {most:.2f}",
    }


def write(output: Path, record: dict[str, Any]) -> None:
    """Write the record as JSON, and as a page."""
    from hierkd.benchmarks.timing import cell
    from hierkd.files import write_json_atomically
    from hierkd.reports.page import Page, Section, Table, write_page

    write_json_atomically(output / "test_gpu.json", record)
    machine, parts, miniature = record["machine"], record["parts"], record["miniature"]
    facts = {key: machine[key] for key in ("date", "commit")}
    facts |= machine["hardware"] | {"gpus": ", ".join(machine["hardware"]["gpus"]) or "none"}
    ends = [(name, part["ended"], f"{part['seconds']:.0f} s") for name, part in parts.items()]
    compared = [(name, *both) for name, both in miniature.get("AP50", {}).items()]
    reports = [report for part in parts.values() for report in part.get("reports", ())]
    sections = [
        Section(facts=facts | machine["versions"]),
        Section("Parts", table=Table(("part", "ended", "took"), ends, num_texts=3)),
        Section(
            "The miniature",
            text=f"{miniature['ended']}; {miniature.get('seconds a step', 0):.3f} s a step",
            table=Table(("AP50", "where it was trained", "on the CPU"), compared, num_texts=1),
        ),
    ]
    for report in reports:
        rows = [[cell(value) for value in row.values()] for row in report["rows"]]
        table = Table(list(report["rows"][0]), rows, num_texts=1)
        settings = {"command": report["command"], **report["settings"]}
        sections.append(
            Section(report["title"], facts=settings, notes=report["notes"], table=table)
        )
    said = [Section(name, code=part["said"]) for name, part in parts.items()]
    sections.append(Section("What the parts said last", folded=said))
    lead = "" if record["gpu"] else "There was no GPU: sizes are small, and no figure counts."
    write_page(output / "test_gpu.html", Page("What a GPU has to show", sections, lead))


def get_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "test_gpu")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE config overrides")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run all parts; the status is 1 if one of them has failed."""
    args = get_parser().parse_args(argv)
    import torch

    from hierkd.reports.run_record import circumstances

    gpu, output = torch.cuda.is_available(), args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    for name in LIMITS:  # of an earlier call
        shutil.rmtree(output / name, ignore_errors=True)
    record: dict[str, Any] = {
        "gpu": gpu,
        "machine": circumstances(" ".join(sys.argv), ROOT, 1),
        "parts": {},
        "miniature": {"ended": "not compared"},
    }
    for name, command in plan(output, gpu, args.opts).items():
        limit = LIMITS[name] * (1 if gpu else 5)  # a CPU may be shared
        part = record["parts"][name] = run_part(command, limit)
        print(f"{name}: {part['ended']}, {part['seconds']:.0f} s", flush=True)
        if name in BENCHMARKS:
            reports = (output / name).glob("*.json")
            part["reports"] = [json.loads(path.read_text()) for path in reports]
        write(output, record)
    ends = {part["ended"] for part in record["parts"].values()}
    if all(record["parts"][name]["ended"] == "done" for name in ("train", "evaluate")):
        record["miniature"] = compare(output)
        ends.add(record["miniature"]["ended"])
    write(output, record)
    print(f"miniature: {record['miniature']['ended']}\n{output / 'test_gpu.html'}")
    return int(ends != {"done"})


if __name__ == "__main__":
    run_command(main)
