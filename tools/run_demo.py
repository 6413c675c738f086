#!/usr/bin/env python
"""The miniature from nothing to a report: what ``make demo`` runs.

    python tools/run_demo.py --output output/demo

Renders the world, trains the tiny CLIP and the warm start, trains HierKD with ``train_net.py``,
evaluates it on the test split, measures CLIP's upper bound and writes ``results.json`` and
``report.html``. Trailing KEY VALUE pairs override the config of the training. Run it in the
repository's folder, where the paths in the configs start.
"""

from __future__ import annotations

import argparse
import logging
import runpy
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from subprocess import Popen
from typing import Any

from hierkd.command import run_command

ROOT = Path(__file__).resolve().parent.parent
DATASETS = {"zsd": "miniature_ovd_test_novel", "gzsd": "miniature_ovd_test_all"}
STAGES = ("prepare", "train", "evaluate", "upper bound", "report")
LINES_OF_A_FAILURE = 25
# Work in steps of `seconds_of_a_step`, measured in docs/lab/performance.md.
STEPS = {"prepare": 875, "iteration": 1.6, "rest": 130}
# AP50 of other recipes, means over five and two seeds: ZSD's novel classes; GZSD's novel, base and
# all classes. Of docs/lab/miniature.md.
STORED = {
    "HierKD as the paper has it": (62.4, 63.4, 94.2, 86.5),
    "without distillation": (16.7, 34.5, 97.3, 81.6),
}


@contextmanager
def stage(seconds: dict[str, float], name: str, announcement: str) -> Iterator[None]:
    """Announce a stage and keep its wall time; its place in STAGES is its number."""
    print(f"\n[{STAGES.index(name) + 1}/{len(STAGES)}] {announcement}", flush=True)
    started = time.monotonic()
    yield
    seconds[name] = round(time.monotonic() - started, 1)
    print(f"      done in {seconds[name]:.0f} s", flush=True)


def seconds_of_a_step(count: int = 4) -> float:
    """Time steps of the tiny CLIP's image encoder, which is work of the demo's kind and size."""
    import torch

    from hierkd.miniature.clip import TinyCLIPSpec, build_tiny_clip

    spec = TinyCLIPSpec()
    encoder = build_tiny_clip(spec).visual.to(memory_format=torch.channels_last)
    crops = torch.rand(spec.batch_size, 3, spec.resolution, spec.resolution)
    for number in range(1 + count):
        if number == 1:  # the first is slower
            started = time.monotonic()
        encoder(crops.contiguous(memory_format=torch.channels_last)).sum().backward()
    return (time.monotonic() - started) / count


def start_training(config_file: str, folder: Path, overrides: Sequence[str]) -> Popen[bytes]:
    """Start ``train_net.py``, which also evaluates; what it says goes to ``stdout.txt``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").unlink(missing_ok=True)  # the writer would append to an earlier run's
    script = str(ROOT / "train_net.py")
    command = [sys.executable, script, "--config-file", config_file, *overrides]
    with (folder / "stdout.txt").open("w") as output:
        return Popen(command, stdout=output, stderr=subprocess.STDOUT)


def follow_training(process: Popen[bytes], folder: Path, max_iter: int) -> None:
    """Show a progress bar until the last iteration is logged or the process ends."""
    from tqdm import tqdm

    from hierkd.reports.metrics import read_run_metrics

    path = folder / "metrics.json"
    with tqdm(total=max_iter, unit="it", smoothing=0.1) as bar:
        while process.poll() is None and bar.n < max_iter:
            time.sleep(0.5)
            curves = read_run_metrics(path).curves if path.is_file() else {}
            if "total_loss" in curves:
                iterations, losses = curves["total_loss"]
                bar.set_postfix(loss=f"{losses[-1]:.2f}", refresh=False)
                bar.update(min(iterations[-1] + 1, max_iter) - bar.n)


def read_evaluation(process: Popen[bytes], folder: Path) -> Mapping[str, Mapping[str, float]]:
    """Wait for the evaluation at the end of the training.

    Returns:
        SplitCOCOEvaluator's figures per dataset.

    Raises:
        SystemExit: The process failed; its last lines have been printed.
    """
    from hierkd.reports.run_record import read_run

    if process.wait() != 0:
        log = folder / "stdout.txt"
        print("\n".join(log.read_text(errors="replace").splitlines()[-LINES_OF_A_FAILURE:]))
        raise SystemExit(f"The training failed with status {process.returncode}: see {log}")
    return read_run(folder).figures


def get_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", default="configs/miniature/hierkd_proposals.yaml")
    parser.add_argument("--output", type=Path, default=Path("output/demo"))
    parser.add_argument("--seed", type=int, default=0, help="of the training")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE config overrides")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run all stages."""
    args = get_parser().parse_args(argv)
    from detectron2.utils.logger import setup_logger
    from tabulate import tabulate

    from hierkd.evaluation.upper_bound import clip_upper_bound
    from hierkd.experiments.results import collect_results, summary_rows, write_results
    from hierkd.inference.predictor import OpenVocabularyPredictor
    from hierkd.load_config import load_config
    from hierkd.miniature.world import MiniatureSpec, miniature_root
    from hierkd.reports.report import write_demo_report
    from hierkd.reports.run_record import git_commit

    setup_logger(name="hierkd", abbrev_name="hierkd").setLevel(logging.WARNING)
    folder, world = args.output / "hierkd", miniature_root().resolve()
    overrides = [
        *("SEED", str(args.seed), "OUTPUT_DIR", str(folder.resolve())),
        # The config's own paths are those of the default $DETECTRON2_DATASETS.
        *("MODEL.WEIGHTS", str(world / "backbone.pth")),
        *("MODEL.TEACHER.WEIGHTS", str(world / "teacher.pt")),
        *("DATASETS.TEST", str(tuple(DATASETS.values()))),
        *args.opts,
    ]
    cfg = load_config(args.config_file, overrides)
    seconds: dict[str, float] = {}
    stages, started = partial(stage, seconds), time.monotonic()

    work = STEPS["rest"] + STEPS["iteration"] * cfg.SOLVER.MAX_ITER
    if not (world / "backbone.json").is_file():  # the last that the preparation writes
        work += STEPS["prepare"]
    minutes = max(1, round(work * seconds_of_a_step() / 60))
    print(f"About {minutes} min on this machine, if it stays as busy as it is.", flush=True)
    with stages("prepare", "The miniature world, its tiny CLIP and the detector's warm start"):
        script = runpy.run_path(str(ROOT / "tools" / "prepare_miniature.py"))
        script["prepare"](MiniatureSpec(), args.config_file)
    process = start_training(args.config_file, folder, overrides)
    try:
        with stages("train", f"Training HierKD with proposals, {cfg.SOLVER.MAX_ITER} iterations"):
            follow_training(process, folder, cfg.SOLVER.MAX_ITER)
        about = "Evaluating on the test split: novel classes alone, and all classes"
        with stages("evaluate", about):
            found = read_evaluation(process, folder)
            figures = {protocol: found[name] for protocol, name in DATASETS.items()}
    finally:
        process.terminate()  # of a demo that Ctrl-C has stopped; one that has ended stays so
        process.wait()
    with stages("upper bound", "CLIP on the ground-truth boxes"):
        trained = ["MODEL.WEIGHTS", str(folder / "model_final.pth")]
        predictor = OpenVocabularyPredictor(load_config(args.config_file, [*overrides, *trained]))
        teacher, scale = predictor.model.teacher, cfg.MODEL.IKD.CROP_SCALE
        bounds = {
            protocol: clip_upper_bound(teacher, name, scale, image_format=cfg.INPUT.FORMAT)
            for protocol, name in DATASETS.items()
        }
    with stages("report", "Writing the report"):
        provenance: dict[str, Any] = {
            "config": args.config_file,
            "seed": args.seed,
            "commit": git_commit(ROOT) or "unknown",
            "seconds": {**seconds, "total": round(time.monotonic() - started, 1)},
        }
        results = collect_results(figures, bounds, **provenance)
        write_results(args.output / "results.json", results)
        rows, report = summary_rows(results), args.output / "report.html"
        shown = {"run_dir": folder, "predictor": predictor, "dataset_name": DATASETS["gzsd"]}
        write_demo_report(report, rows, provenance, stored=STORED, **shown)

    headers = ("test", "classes", "AP50", "AR50", "AP50 upper bound")
    print("\n" + tabulate(rows, headers=headers, floatfmt=".1f"))
    total = time.monotonic() - started
    print(f"\n{total:.0f} s in all. See {report} and {args.output / 'results.json'}")


if __name__ == "__main__":
    run_command(main)
