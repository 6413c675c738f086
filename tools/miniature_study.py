#!/usr/bin/env python
"""Train configs of the miniature over several seeds and report mean and spread.

    python tools/miniature_study.py --configs atss hierkd --seeds 0 1 2
    python tools/miniature_study.py --configs hierkd --seeds 0 1 --split val \\
        --output output/study/gkd_0.3 --opts MODEL.GKD.LOSS_WEIGHT 0.3

Tune on ``--split val``; report on ``--split test``, which nothing else looks at. Every run is a
``train_net.py`` of its own, of one thread, with ``--jobs`` at a time; a run that is complete is not
run again. The seeds are the detector's: world, teacher and warm start are shared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

from hierkd.data.coco_json import write_json_atomically

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = {
    "ZSD novel AP50": ("{split}_novel", "novel/AP50"),
    "ZSD novel AR50": ("{split}_novel", "novel/AR50"),
    "base AP50": ("{split}_base", "base/AP50"),
    "GZSD novel AP50": ("{split}_all", "novel/AP50"),
    "GZSD base AP50": ("{split}_all", "base/AP50"),
    "GZSD all AP50": ("{split}_all", "all/AP50"),
}


def run(config: str, seed: int, folder: Path, split: str, opts: list[str], threads: int) -> None:
    """Train and evaluate one config with one seed; ``figures.json`` marks it as complete.

    Raises:
        RuntimeError: if the run failed; names its log.
        ValueError: if the folder holds a complete run of another split or of other options.
    """
    done = folder / "figures.json"
    wanted = {"config": config, "seed": seed, "split": split, "opts": opts}
    if done.is_file():
        record = json.loads(done.read_text())
        found = {key: record[key] for key in wanted}
        if found != wanted:
            raise ValueError(f"{done} holds {found}, not {wanted}: give another --output")
        return
    folder.mkdir(parents=True, exist_ok=True)
    names = tuple(f"miniature_ovd_{split}_{part}" for part in ("novel", "base", "all"))
    command = [
        *(sys.executable, "train_net.py", "--config-file", f"configs/miniature/{config}.yaml"),
        *("SEED", str(seed), "OUTPUT_DIR", str(folder), "DATASETS.TEST", str(names), *opts),
    ]
    started = time.time()
    with (folder / "stdout.txt").open("w") as log:
        code = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode
    if code != 0:
        raise RuntimeError(f"{config}, seed {seed}, failed: see {folder / 'stdout.txt'}")
    last = json.loads((folder / "metrics.json").read_text().splitlines()[-1])
    figures = {
        column: last[f"miniature_ovd_{dataset.format(split=split)}/bbox/{metric}"]
        for column, (dataset, metric) in COLUMNS.items()
    }
    record = {**wanted, "figures": figures, "seconds": round(time.time() - started, 1)}
    write_json_atomically(done, record)  # half a file would count as complete


def table(configs: list[str], seeds: list[int], output: Path) -> str:
    """Markdown of mean and range over the seeds that are complete."""
    rows = [
        "| config | seeds | " + " | ".join(COLUMNS) + " |",
        "|---|---|" + "---|" * len(COLUMNS),
    ]
    for config in configs:
        files = [output / f"{config}_seed{seed}" / "figures.json" for seed in seeds]
        runs = [json.loads(file.read_text())["figures"] for file in files if file.is_file()]
        cells = []
        for column in COLUMNS:
            values = [figures[column] for figures in runs]
            cells.append(
                f"{statistics.mean(values):.1f} ({min(values):.1f}-{max(values):.1f})"
                if values
                else "not run"
            )
        rows.append(f"| {config} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--configs", nargs="+", default=["atss", "hierkd"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--split", choices=("val", "test"), default="test")
    parser.add_argument("--output", type=Path, default=Path("output/miniature_study"))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads per run")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE ...")
    args = parser.parse_args()
    output = args.output.resolve()
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = [
            pool.submit(
                run,
                config,
                seed,
                output / f"{config}_seed{seed}",
                args.split,
                args.opts,
                args.threads,
            )
            for seed in args.seeds
            for config in args.configs
        ]
        for future in tqdm(as_completed(futures), total=len(futures), desc="runs"):
            future.result()
    text = table(args.configs, args.seeds, output)
    (output / "table.md").write_text(text + "\n")
    print(f"Miniature, {args.split} split, opts {args.opts}\n{text}")


if __name__ == "__main__":
    main()
