"""The trainer: detectron2's, with HierKD's data, checkpoints and vocabularies."""

from __future__ import annotations

import logging
import shlex
import sys
import weakref
from contextlib import nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import (
    MetadataCatalog,
    build_detection_test_loader,
    get_detection_dataset_dicts,
)
from detectron2.engine import (
    AMPTrainer,
    DefaultTrainer,
    SimpleTrainer,
    TrainerBase,
    create_ddp_model,
)
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage, has_event_storage
from torch import nn

from hierkd.checkpoint import HierKDCheckpointer
from hierkd.data.coco import check_captions
from hierkd.data.loader import build_resumable_train_loader
from hierkd.data.mapper import HierKDDatasetMapper, check_images
from hierkd.evaluation.federated_evaluation import FederatedEvaluator
from hierkd.evaluation.proposal_evaluation import ProposalEvaluator
from hierkd.evaluation.split_coco_evaluation import SplitCOCOEvaluator
from hierkd.evaluation.transfer import (
    Overlap,
    detection_limit,
    find_overlap,
    transfer_record,
    transfer_table,
)
from hierkd.files import write_json_atomically
from hierkd.reports.metrics import mend_metrics
from hierkd.teachers.clip import build_region_cache
from hierkd.teachers.region_cache import RegionCache
from hierkd.teachers.texts import OWN_EMBEDDINGS, each_once, save_text_embeddings
from hierkd.training.agreement import broadcast_buffers, in_every_process
from hierkd.training.hooks import FiniteGuard, Interruption
from hierkd.training.monitoring import build_monitoring_hooks
from hierkd.training.optimizer import build_optimizer, check_optimizer_state

logger = logging.getLogger(__name__)

__all__ = ["Trainer", "without_ddp"]


class Trainer(DefaultTrainer):  # type: ignore[misc]  # detectron2 is untyped
    """detectron2's trainer with HierKD's data, checkpoints and vocabularies."""

    iter: int  # the step that is being done, from 0

    def __init__(self, cfg: Any) -> None:
        """Build all that a training needs, in the order of ``DefaultTrainer.__init__``.

        That has no place for another checkpointer, nor for processes on a CPU.
        """
        TrainerBase.__init__(self)
        cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = build_optimizer(cfg, model)
        # The detector's teacher has opened and checked the cache; a model may have no teacher.
        cache = getattr(getattr(model, "teacher", None), "cache", None)
        data_loader = self.build_train_loader(cfg, cache)
        devices = {"device_ids": None} if cfg.MODEL.DEVICE == "cpu" else {}
        model = create_ddp_model(model, broadcast_buffers=False, **devices)
        self._trainer = (
            AMPTrainer(model, data_loader, optimizer, grad_scaler=torch.amp.GradScaler("cuda"))
            if cfg.SOLVER.AMP.ENABLED
            else SimpleTrainer(model, data_loader, optimizer)
        )
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = HierKDCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list[Any]:
        """detectron2's hooks, those to watch by, a guard, and one that signals interrupt."""
        self._trainer.register_hooks([FiniteGuard(self.model)])  # before the optimizer
        self._interruption = Interruption(self.checkpointer)
        hooks: list[Any] = super().build_hooks()
        with in_every_process("choosing the pictures of TEST.VIS_PICTURES"):
            if comm.is_main_process():  # before the writer, which comes last
                hooks[-1:-1] = build_monitoring_hooks(self.cfg, without_ddp(self.model))
        return [*hooks, self._interruption]

    def build_writers(self) -> list[Any]:
        """detectron2's writers, which append to what a killed run has left."""
        mend_metrics(f"{self.cfg.OUTPUT_DIR}/metrics.json")
        return list(super().build_writers())

    def train(self) -> dict[str, Any] | None:
        """Train to the end, or until a signal comes; see :class:`Interruption`.

        Raises:
            SystemExit: after a signal, with 128 + its number.
        """
        if comm.is_main_process():
            last = self.checkpointer.get_checkpoint_file() if self.start_iter else ""
            if self.start_iter == self.max_iter and not last.endswith("model_final.pth"):
                # killed behind the last step: detectron2 writes this file in a step alone
                self.checkpointer.save("model_final", iteration=self.iter)
        with self._interruption.listening():
            results: dict[str, Any] | None = super().train()
        return results

    def after_train(self) -> None:
        """Let the hooks end; the iteration is the same whether the last step was done before."""
        self.iter = min(self.iter, self.max_iter)  # one too many if no step was left
        super().after_train()

    def resume_or_load(self, resume: bool = True) -> None:
        """Load weights, or the last checkpoint together with the place in the data stream."""
        super().resume_or_load(resume=resume)
        self.data_loader.batch_sampler.start_iter = self.start_iter

    def data_order(self) -> dict[str, int]:
        """What decides which images come when; as docs/training.md says, it is to stay."""
        return {
            "SEED": self.cfg.SEED,
            "SOLVER.IMS_PER_BATCH": self.cfg.SOLVER.IMS_PER_BATCH,
            "the number of processes": comm.get_world_size(),
            "the number of training images": len(self.data_loader.dataset),
        }

    def vocabulary(self) -> list[str]:
        """The class names of the training data, sorted."""
        catalog = [MetadataCatalog.get(name) for name in self.cfg.DATASETS.TRAIN]
        return sorted({name for each in catalog for name in each.get("thing_classes", ())})

    def state_dict(self) -> dict[str, Any]:
        """detectron2's, with what decides the order of the data, and the training vocabulary."""
        own = {"data_order": self.data_order(), "vocabulary": self.vocabulary()}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """detectron2's; a checkpoint of other classes, optimizer or detector is refused by name."""
        ours = set(self.vocabulary())
        theirs = set(state_dict.get("vocabulary", ours))  # absent in older checkpoints
        if ours != theirs:
            raise ValueError(
                f"--resume: the checkpoint is of another training: its classes lack "
                f"{sorted(ours - theirs)[:5]} and have {sorted(theirs - ours)[:5]} besides those "
                "of DATASETS.TRAIN. Resume with the same base classes, or start anew in another "
                "OUTPUT_DIR"
            )
        for name, value in self.data_order().items():
            if (before := state_dict["data_order"].get(name, value)) != value:
                logger.warning(
                    "--resume: %s is %d and was %d: from here on the images are others than those "
                    "of a run without the interruption",
                    *(name, value, before),
                )
        inner = state_dict["_trainer"]
        check_optimizer_state(self.optimizer, inner["optimizer"])
        if isinstance(self._trainer, AMPTrainer):  # absent if it was trained in float32 so far
            inner.setdefault("grad_scaler", self._trainer.grad_scaler.state_dict())
        super().load_state_dict(state_dict)

    def run_step(self) -> None:
        """One step; its random draws depend on the seed and the iteration, not on the history."""
        if self.cfg.SEED >= 0:
            words = np.random.SeedSequence((self.cfg.SEED, self.iter, comm.get_rank()))
            torch.manual_seed(int(words.generate_state(1)[0]))
        super().run_step()

    @classmethod
    def build_model(cls, cfg: Any) -> nn.Module:
        """detectron2's; what one process cannot build or read ends all."""
        with in_every_process("building the model"):
            model: nn.Module = super().build_model(cfg)
        return model

    @classmethod
    def build_train_loader(cls, cfg: Any, cache: RegionCache | None = None) -> Any:
        """Endless batches; captions and images are checked before the first step."""
        with in_every_process("reading DATASETS.TRAIN"):
            if not cfg.DATASETS.TRAIN:
                raise ValueError("DATASETS.TRAIN is empty: it must name what to train on")
            sources = [MetadataCatalog.get(name) for name in cfg.DATASETS.TRAIN]
            names = ", ".join(each.get("source", each.get("json_file", "")) for each in sources)
            try:
                dataset_dicts = get_detection_dataset_dicts(
                    cfg.DATASETS.TRAIN, filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
                )
            except AssertionError as error:  # detectron2's, of an empty set
                raise ValueError(
                    f"DATASETS.TRAIN: {names}: no image has a box to train on: of base classes "
                    "there are none, or crowd regions and unusable boxes alone."
                ) from error
            if cfg.MODEL.GKD.LOSS_WEIGHT > 0:
                check_captions(dataset_dicts, names)
            if cache is None and cfg.MODEL.TEACHER.CACHE:
                cache = build_region_cache(cfg)
        if cfg.DATALOADER.CHECK_IMAGES:
            dataset_dicts = check_images(
                dataset_dicts, skip_broken=cfg.DATALOADER.SKIP_BROKEN_IMAGES
            )
        return build_resumable_train_loader(
            dataset_dicts,
            HierKDDatasetMapper(cfg, is_train=True, cache=cache),
            total_batch_size=cfg.SOLVER.IMS_PER_BATCH,
            num_workers=cfg.DATALOADER.NUM_WORKERS,
            seed=cfg.SEED,
        )

    @classmethod
    def build_test_loader(cls, cfg: Any, dataset_name: str) -> Any:
        """detectron2's, with errors that name the image and batches of any size."""
        mapper = HierKDDatasetMapper(cfg, is_train=False)
        return build_detection_test_loader(
            cfg, dataset_name, mapper=mapper, batch_size=cfg.TEST.IMS_PER_BATCH
        )

    @classmethod
    def build_evaluator(cls, cfg: Any, dataset_name: str) -> DatasetEvaluator:
        """AP and AR of base, novel and all classes; of proposals their recall (Table 1)."""
        if cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork":
            return ProposalEvaluator(dataset_name, complete=True)
        overlap = overlap_with_training(cfg, dataset_name)
        federated = MetadataCatalog.get(dataset_name).get("federated", False)
        return (FederatedEvaluator if federated else SplitCOCOEvaluator)(
            dataset_name,
            output_dir=f"{cfg.OUTPUT_DIR}/inference/{dataset_name}",
            max_dets_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
            split=None if overlap is None else (list(overlap.known), overlap.new),
            complete=True,
        )

    @classmethod
    def test(cls, cfg: Any, model: nn.Module) -> dict[str, Any]:
        """Evaluate each dataset with its own vocabulary; the training one comes back after it.

        A model without a vocabulary, such as the class-agnostic RPN of Table 1, runs as it is.

        Returns:
            Results per dataset name, also when there is only one dataset.
        """
        detector = without_ddp(model)
        broadcast_buffers(detector)  # what is evaluated is what is saved
        results: dict[str, Any] = {}
        for name in cfg.DATASETS.TEST:
            one = cfg.clone()
            one.defrost()
            one.DATASETS.TEST = (name,)
            limit = MetadataCatalog.get(name).get("detections_per_image")
            one.TEST.DETECTIONS_PER_IMAGE = limit or cfg.TEST.DETECTIONS_PER_IMAGE
            with cls._vocabulary(detector, name), detection_limit(detector, limit):
                results[name] = super().test(one, model)
        if comm.is_main_process():
            report_transfer(cfg, results)
        return results

    @classmethod
    def check_vocabularies(cls, cfg: Any, model: nn.Module) -> None:
        """Embed the class names of each test dataset, so that no evaluation lacks any.

        Raises:
            ValueError: the teacher has no embedding of a name.
            FileNotFoundError: that needs CLIP, and its weights are not there.
        """
        detector = without_ddp(model)
        for name in cfg.DATASETS.TEST:
            with (
                in_every_process(f"embedding the class names of {name}"),
                cls._vocabulary(detector, name),
            ):
                pass

    @classmethod
    def store_vocabulary(cls, cfg: Any, model: nn.Module) -> None:
        """Leave the embeddings of all class names beside the checkpoints, which then need no CLIP.

        The largest vocabulary comes first; of names that are one to CLIP, the first.
        """
        if (teacher := getattr(without_ddp(model), "teacher", None)) is None:
            return
        sets = [MetadataCatalog.get(n) for n in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN)]
        largest_first = sorted((s.get("thing_classes", ()) for s in sets), key=len, reverse=True)
        names, _ = each_once(chain.from_iterable(largest_first))
        if names:
            prompt = cfg.MODEL.TEXT_CLASSIFIER.BACKGROUND_PROMPT
            stored = teacher.text_embeddings(names, prompt)
            save_text_embeddings(stored, Path(cfg.OUTPUT_DIR) / OWN_EMBEDDINGS)

    @staticmethod
    def _vocabulary(detector: Any, dataset_name: str) -> Any:
        """Give a detector a dataset's class names inside the block; a model without names none."""
        if not hasattr(detector, "vocabulary"):
            return nullcontext()
        return detector.vocabulary(MetadataCatalog.get(dataset_name).thing_classes)


def without_ddp(model: nn.Module) -> Any:
    """The detector itself."""
    return getattr(model, "module", model)


def overlap_with_training(cfg: Any, dataset_name: str) -> Overlap | None:
    """Which names of a dataset without a split of its own training knew; None for the others."""
    metadata = MetadataCatalog.get(dataset_name)
    if metadata.get("declares_split", True):
        return None
    trained = [
        name
        for each in cfg.DATASETS.TRAIN
        for name in MetadataCatalog.get(each).get("thing_classes", ())
    ]
    return find_overlap(metadata.thing_classes, trained)


def report_transfer(cfg: Any, results: dict[str, Any]) -> None:
    """Log and write the figures of datasets that are another vocabulary than training's."""
    found = {name: overlap_with_training(cfg, name) for name in results}
    overlaps = {name: overlap for name, overlap in found.items() if overlap is not None}
    figures = {name: results[name]["bbox"] for name in overlaps if "bbox" in results[name]}
    if not figures:
        return
    for name, overlap in overlaps.items():
        logger.info("%s: %s", name, overlap)
    path = Path(cfg.OUTPUT_DIR) / "inference" / "transfer.json"
    training = {"iteration": get_event_storage().iter + 1} if has_event_storage() else {}
    record = transfer_record(
        figures,
        overlaps,
        command=shlex.join(sys.argv),
        weights=cfg.OUTPUT_DIR if training else cfg.MODEL.WEIGHTS,
        **training,
        trained_on=list(cfg.DATASETS.TRAIN),
    )
    write_json_atomically(path, record)
    logger.info("Transfer (percent), also in %s:\n%s", path, transfer_table(figures, overlaps))
