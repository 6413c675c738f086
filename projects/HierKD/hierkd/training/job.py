"""What one process of a training or of an evaluation does."""

from __future__ import annotations

import logging
import shlex
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from detectron2.engine import default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from hierkd.checkpoint import HierKDCheckpointer
from hierkd.data.coco import check_datasets, check_training_sets
from hierkd.data.custom import describe_datasets
from hierkd.data.mapper import check_images
from hierkd.inference.predictor import for_inference
from hierkd.load_config import load_config
from hierkd.reports.run_record import record_evaluation, record_start
from hierkd.training.agreement import in_every_process
from hierkd.training.trainer import Trainer

__all__ = ["prepare"]

logger = logging.getLogger(__name__)

# Of a message on the screen: detectron2 writes out config, versions and model. [ours]
_LONGEST_MESSAGE = 15

Work = Callable[[], dict[str, Any] | None]


def prepare(args: Namespace, root: Path) -> Work:
    """Check and build all that one process of a training or of an evaluation needs.

    Args:
        args: of train_net.py.
        root: the checkout whose commit the run notes.

    Returns a function that does the work and returns its figures.

    Raises:
        ValueError: the config, a file that it names, or the command line is wrong.
        OSError: a file is missing, cannot be read or written, or cannot be downloaded.
    """
    cfg = load_config(args.config_file, args.opts)
    setup = _evaluation_setup(cfg) if args.eval_only else cfg
    # Before anything is written, and before a log that nobody reads to its end.
    with in_every_process("reading DATASETS.TEST"):
        test_images = check_datasets(cfg.DATASETS.TEST)
        if not args.eval_only:
            check_training_sets(cfg.DATASETS.TRAIN)
        elif not cfg.DATASETS.TEST:
            raise ValueError("DATASETS.TEST is empty: it must name what to evaluate on")
    _set_up_loggers(setup.OUTPUT_DIR)
    default_setup(setup, args)
    if cfg.DATASETS.DEFINITIONS:
        trained = () if args.eval_only else cfg.DATASETS.TRAIN
        for line in describe_datasets([*trained, *cfg.DATASETS.TEST]):
            logger.info(line)
    if args.eval_only:
        return _prepare_evaluation(cfg, root, resume=args.resume)
    if cfg.DATALOADER.CHECK_IMAGES:
        check_images(test_images)
    return _prepare_training(cfg, root, resume=args.resume)


class _Brief(logging.Formatter):
    """The first line of each message of more than `_LONGEST_MESSAGE` lines."""

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__()
        self._whole = formatter

    def format(self, record: logging.LogRecord) -> str:
        text = self._whole.format(record)
        first, *rest = text.split("\n")
        long = len(rest) >= _LONGEST_MESSAGE
        return f"{first} ({len(rest)} more lines in log.txt)" if long else text


def _set_up_loggers(folder: str) -> None:
    """Log to ``folder`` and, long messages of the libraries in brief, to the screen."""
    rank = comm.get_rank()
    # As default_setup calls it: its own calls are then the same, and add no second handler.
    libraries = [
        setup_logger(folder, distributed_rank=rank, name="fvcore"),
        setup_logger(folder, distributed_rank=rank),
    ]
    setup_logger(folder, distributed_rank=rank, name="hierkd")
    for handler in (each for library in libraries for each in library.handlers):
        if handler.stream is sys.stdout:
            handler.setFormatter(_Brief(handler.formatter))


def _evaluation_setup(cfg: Any) -> Any:
    """The config that detectron2 sets a process up with for an evaluation.

    It writes a config.yaml and a log into its OUTPUT_DIR: in a training's folder these are the
    training's, so that the evaluation's go into ``inference``.
    """
    trained = (Path(cfg.OUTPUT_DIR) / "config.yaml").is_file()
    if comm.all_gather(trained)[0]:  # of the first process, which writes it
        cfg = cfg.clone()
        cfg.defrost()
        cfg.OUTPUT_DIR = str(Path(cfg.OUTPUT_DIR) / "inference")
        cfg.freeze()
    return cfg


def _prepare_training(cfg: Any, root: Path, *, resume: bool) -> Work:
    """Build a trainer, with the weights or the checkpoint that it starts from."""
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    Trainer.check_vocabularies(cfg, trainer.model)
    if trainer.start_iter >= trainer.max_iter:
        logger.info(
            "The training has done its %d iterations already; more need a larger SOLVER.MAX_ITER",
            trainer.start_iter,
        )
    if comm.is_main_process():
        Trainer.store_vocabulary(cfg, trainer.model)
        record_start(
            cfg.OUTPUT_DIR,
            command=shlex.join(sys.argv),
            root=root,
            iteration=trainer.start_iter,
            num_processes=comm.get_world_size(),
        )
    return trainer.train


def _prepare_evaluation(cfg: Any, root: Path, *, resume: bool) -> Work:
    """Build a detector with trained weights."""
    model = Trainer.build_model(for_inference(cfg))
    checkpointer = HierKDCheckpointer(model, save_dir=cfg.OUTPUT_DIR)
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    checkpointer.check_trained()
    Trainer.check_vocabularies(cfg, model)
    cfg.defrost()
    cfg.MODEL.WEIGHTS = checkpointer.loaded  # what is evaluated: --resume has found it
    cfg.freeze()

    def evaluate() -> dict[str, Any]:
        results = Trainer.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
            record_evaluation(
                cfg.OUTPUT_DIR,
                results,
                command=shlex.join(sys.argv),
                root=root,
                weights=cfg.MODEL.WEIGHTS,
                num_processes=comm.get_world_size(),
            )
        return results

    return evaluate
