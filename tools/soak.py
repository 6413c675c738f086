#!/usr/bin/env python
"""Train and detect for an hour in one process, and see whether it keeps memory, files or processes.

    python tools/soak.py --minutes 60 --output output/soak

Trains the miniature with the loader, the checkpoints and the evaluations of ``train_net.py``; in
between a second detector looks at pictures of changing sizes with vocabularies of 1 to 3000 names
that change all the time. Writes samples.csv as it goes, and soak.png and verdict.json at the end.
Exit status 1: a limit was broken. Trailing KEY VALUE pairs override the config. Needs Linux, and
the miniature (``python tools/prepare_miniature.py``); run it in the repository's folder.
"""

from __future__ import annotations

import hierkd  # noqa: F401  (first: it quiets two deprecation warnings inside libraries)

# isort: split
import argparse
import importlib.util
import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.utils.logger import setup_logger

from hierkd.files import write_json_atomically
from hierkd.inference.predictor import OpenVocabularyPredictor
from hierkd.load_config import load_config
from hierkd.training.cpu_memory import keep_freed_memory
from hierkd.training.soak import Limits, SoakRecorder, draw, judge, read_samples
from hierkd.training.soak_load import ChangingInference, SoakHook, TimeIsUp

ROOT = Path(__file__).resolve().parent.parent
ENDLESS = 10_000_000  # iterations; the clock ends the run
PICTURES = 35


def get_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60.0, metavar="N")
    parser.add_argument("--config-file", default="configs/miniature/hierkd.yaml", metavar="FILE")
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "soak", metavar="FOLDER")
    parser.add_argument(
        "--interval", type=float, default=5.0, metavar="S", help="seconds between samples"
    )
    parser.add_argument(
        "--training-seconds", type=float, default=10.0, metavar="S", help="between two inferences"
    )
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="of the loader")
    parser.add_argument(
        "--checkpoint-period", type=int, default=200, metavar="N", help="iterations"
    )
    parser.add_argument("--eval-period", type=int, default=400, metavar="N", help="iterations")
    parser.add_argument("--largest", type=int, default=3000, metavar="N", help="vocabulary")
    defaults = Limits()
    for name, text in {
        "slope": "growth of memory, MiB per hour",
        "slack": "growth of memory that is noise, MiB",
        "more_files": "open files gained",
        "more_threads": "threads gained",
        "more_children": "processes gained",
        "slower_cpu": "processor time of a step or picture, times",
        "slower_wall": "wall time of a step or picture, times",
    }.items():
        value = getattr(defaults, name)
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=type(value),
            default=value,
            help=f"limit: {text} (default: %(default)s)",
        )
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE")
    return parser


def load_train_net() -> ModuleType:
    """``train_net.py``, which is a script beside this folder and no part of the package."""
    if "train_net" not in sys.modules:
        spec = importlib.util.spec_from_file_location("train_net", ROOT / "train_net.py")
        if spec is None or spec.loader is None:
            raise FileNotFoundError(f"no train_net.py in {ROOT}")
        module = importlib.util.module_from_spec(spec)
        sys.modules["train_net"] = module
        spec.loader.exec_module(module)
    return sys.modules["train_net"]


def build_config(args: argparse.Namespace) -> Any:
    """The config of the training, which does not end by itself."""
    values = {
        "OUTPUT_DIR": args.output / "training",
        "SOLVER.MAX_ITER": ENDLESS,
        "SOLVER.LR_SCHEDULER_NAME": "WarmupMultiStepLR",
        "SOLVER.STEPS": "()",
        "SOLVER.CHECKPOINT_PERIOD": args.checkpoint_period,
        "TEST.EVAL_PERIOD": args.eval_period,
        "DATALOADER.NUM_WORKERS": args.workers,
        "MODEL.TEACHER.TEXT_CACHE_DIR": args.output / "text_embeddings",
    }
    pairs = [str(each) for pair in values.items() for each in pair]
    return load_config(args.config_file, [*pairs, *args.opts])


def build_inference(cfg: Any, model_file: Path, largest: int) -> ChangingInference:
    """A second detector, with the weights that the training starts from."""
    one = cfg.clone()
    one.defrost()
    one.MODEL.WEIGHTS = str(model_file)
    name = cfg.DATASETS.TEST[-1]
    records = DatasetCatalog.get(name)[:PICTURES]
    pictures = [read_image(record["file_name"], format="BGR") for record in records]
    names = MetadataCatalog.get(name).thing_classes
    return ChangingInference(OpenVocabularyPredictor(one), pictures, names, largest=largest)


def soak(args: argparse.Namespace, cfg: Any) -> None:
    """Train and detect until the time is over."""
    train_net = load_train_net()
    trainer = train_net.Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.checkpointer.save("start")
    inference = build_inference(cfg, Path(cfg.OUTPUT_DIR) / "start.pth", args.largest)
    with SoakRecorder(args.output / "samples.csv", interval=args.interval) as recorder:
        run_step = trainer.run_step

        def timed_step() -> None:
            with recorder.unit("training"):
                run_step()
            if (trainer.iter + 1) % args.checkpoint_period == 0:  # the newest is enough
                for old in sorted(Path(cfg.OUTPUT_DIR).glob("model_*.pth"))[:-1]:
                    old.unlink()

        trainer.run_step = timed_step
        hook = SoakHook(
            recorder,
            inference,
            seconds=60 * args.minutes,
            training_seconds=args.training_seconds,
        )
        trainer.register_hooks([hook])
        try:
            trainer.train()
        except TimeIsUp:
            logging.getLogger("hierkd.soak").info("%g minutes are over", args.minutes)


def report(args: argparse.Namespace) -> bool:
    """Judge, plot and write what was found; whether all limits were kept."""
    samples = read_samples(args.output / "samples.csv")
    limits = Limits(**{name: getattr(args, name) for name in vars(Limits())})
    minutes = samples[-1].seconds / 60 if samples else 0.0
    if samples:
        draw(samples, args.output / "soak.png", f"{minutes:.0f} minutes: {args.config_file}")
    findings = judge(samples, limits)
    kept = all(finding.kept for finding in findings)
    work = {
        phase: sum(sample.work for sample in samples if sample.phase == phase)
        for phase in dict.fromkeys(sample.phase for sample in samples)
    }
    write_json_atomically(
        args.output / "verdict.json",
        {
            "kept": kept,
            "minutes": minutes,
            "samples": len(samples),
            "work": work,
            "limits": vars(limits),
            "findings": [vars(finding) for finding in findings],
        },
    )
    for finding in findings:
        print("ok    " if finding.kept else "BROKEN", finding.text)
    print(f"{minutes:.1f} minutes, {len(samples)} samples, {work}; written to {args.output}")
    return kept


def main(argv: Sequence[str] | None = None) -> int:
    """Run; 0 = all limits kept, 1 = one was broken, 2 = wrong input, or too short to judge."""
    parser = get_parser()
    args = parser.parse_args(argv)
    for name in ("minutes", "interval", "training_seconds", "checkpoint_period", "eval_period"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {getattr(args, name)}")
    if args.largest < 1 or args.workers < 0:
        parser.error("--largest must be at least 1 and --workers at least 0")
    shutil.rmtree(args.output / "training", ignore_errors=True)
    args.output.mkdir(parents=True, exist_ok=True)
    try:
        cfg = build_config(args)
        Path(cfg.OUTPUT_DIR).mkdir(parents=True, exist_ok=True)
        for name in ("detectron2", "fvcore", "hierkd"):
            setup_logger(cfg.OUTPUT_DIR, name=name)
        soak(args, cfg)
        return 0 if report(args) else 1
    except (FileNotFoundError, ValueError) as error:
        print(f"soak.py: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    keep_freed_memory()  # as train_net.py does
    sys.exit(main())
