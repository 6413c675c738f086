"""A training step of each row of Table 4, and of HierKD with the teacher's embeddings cached.

A step is forward, backward and optimiser on random pictures, boxes and captions that are in memory
already: reading data is not part of it. The teacher is a random CLIP of the shape of ViT-B/32
(``--miniature``: of the miniature's tiny CLIP). Every positive point is distilled, as in a trained
detector, whose boxes are good, whereas a random one would distil next to none; every caption is new
to the teacher, as in the first epochs. The cached row takes regions and captions from files, as in
training.

On a CPU the pictures are small, and so is the number of boxes, so that the teacher keeps about the
share of the work that it has at full size.

The shares of the parts come from steps of their own, in which the device is waited for around each
part.
"""

from __future__ import annotations

import itertools
import tempfile
from argparse import ArgumentParser, Namespace
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from hierkd.benchmarks.random_models import tame
from hierkd.benchmarks.timing import Report, measure, peak_memory, ratio
from hierkd.experiments.tables import TABLES
from hierkd.load_config import load_config
from hierkd.miniature.clip import TinyCLIPSpec, build_tiny_clip, save_clip
from hierkd.modeling.detector import HierKD
from hierkd.teachers import teacher as teacher_module
from hierkd.teachers.region_cache import (
    CacheContents,
    TeacherCacheWriter,
    file_sha256,
    keys_sha256,
    sorted_texts,
)
from hierkd.teachers.teacher import import_clip
from hierkd.training.optimizer import build_optimizer

__all__ = ["PARTS", "TrainingStep", "add_arguments", "build_steps", "run"]

PARTS = (
    "backbone",
    "head",
    "assignment",
    "crops",
    "CLIP images",
    "texts",
    "MLCA",
    "losses",
    "backward",
    "optimiser",
    "other",
)
_CACHED = "HierKD, ground-truth boxes, cached"
_NUM_CLASSES = 48
# Captions that the cache holds; a step takes the next ones in turn.
_NUM_CACHED_CAPTIONS = 64
_STEPS_FOR_SHARES = 2
_VIT_B_32 = (512, 224, 12, 768, 32, 77, 49408, 512, 8, 12)  # arguments of clip.model.CLIP

Sizes = tuple[int, int, int, int]  # images, height, width, boxes per image
_CPU_SIZES: Sizes = (2, 256, 416, 1)
_GPU_SIZES: Sizes = (8, 800, 1333, 7)  # COCO's base boxes per image are 6.2
_MINIATURE_SIZES: Sizes = (16, 128, 128, 3)


def add_arguments(parser: ArgumentParser) -> None:
    """Add the sizes."""
    parser.add_argument(
        "--miniature", action="store_true", help="configs/miniature, a tiny CLIP, 16 x 128 x 128"
    )
    parser.add_argument("--images", type=int, metavar="N", help="of a step; default: as fits")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="of an image, pixels")
    parser.add_argument("--boxes", type=int, metavar="N", help="of an image")


def run(args: Namespace, device: torch.device) -> Report:
    """Time the steps in turns.

    Args:
        args: of :func:`add_arguments`, and ``rounds``.
        device: where training runs; on a GPU with AMP and without.
    """
    gpu = device.type == "cuda"
    sizes = _MINIATURE_SIZES if args.miniature else _GPU_SIZES if gpu else _CPU_SIZES
    asked = (args.images, *(args.size or (None, None)), args.boxes)
    rounds = args.rounds or (20 if gpu else 8 if args.miniature else 2)
    images, height, width, boxes = (
        default if own is None else own for own, default in zip(asked, sizes, strict=True)
    )
    batch = _random_batch(images, height, width, boxes)
    with tempfile.TemporaryDirectory() as scratch, EventStorage() as storage:
        steps = build_steps(batch, device, Path(scratch), miniature=args.miniature, amp=gpu)
        times = measure(
            steps,
            device=device,
            rounds=rounds,
        )
        plain = {step.amp: times[name] for name, step in reversed(steps.items())}
        rows = []
        for name, step in steps.items():
            rows.append(
                {
                    "row of Table 4": name,
                    "s/step": times[name].median,
                    "images/s": images / times[name].median,
                    "over ATSS": ratio(times[name], plain[step.amp]),
                    "peak MiB": peak_memory(step, device),
                    **{f"{part} %": share for part, share in _shares(step, device).items()},
                }
            )
        distilled = storage.latest()["num_distilled_regions"][0]
    return Report(
        "A training step",
        device,
        {
            "images": images,
            "size": f"{height} x {width}",
            "boxes per image": boxes,
            "distilled points per image": distilled,
            "rounds": rounds,
            "configs": "miniature" if args.miniature else "configs/ablations/table4_*",
        },
        rows,
        [
            "Random weights, pictures, boxes and captions; data loading is not included. "
            "ATSS is the row without distillation, in the same precision.",
            "The parts are forward; what distillation adds to the backward pass is in 'backward'.",
        ],
    )


@dataclass
class TrainingStep:
    """One training step; each call makes one.

    Attributes:
        model: in training mode.
        optimizer: of the model.
        batch: the samples; each call puts other captions into them.
        captions: endless.
        amp: whether the forward pass runs in mixed precision.
    """

    model: HierKD
    optimizer: torch.optim.Optimizer
    batch: list[dict[str, Any]]
    captions: Iterator[str]
    amp: bool = False
    scaler: Any = field(init=False)

    def __post_init__(self) -> None:
        self.scaler = torch.amp.GradScaler("cuda", enabled=self.amp)

    def __call__(self, part: Callable[[str], Any] | None = None) -> dict[str, float]:
        """Make a step.

        Args:
            part: context manager around the named parts ``backward`` and ``optimiser``.

        Returns:
            The losses.
        """
        around = part or (lambda name: ExitStack())
        inputs = [{**sample, "caption": next(self.captions)} for sample in self.batch]
        self.optimizer.zero_grad()
        with torch.autocast(self.model.device.type, enabled=self.amp):
            losses = self.model(inputs)
        with around("backward"):
            self.scaler.scale(sum(losses.values())).backward()
        with around("optimiser"):
            if self.amp:
                self.scaler.unscale_(self.optimizer)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return {name: loss.item() for name, loss in losses.items()}


def build_steps(
    batch: list[dict[str, Any]],
    device: torch.device,
    scratch: Path,
    *,
    miniature: bool,
    amp: bool,
) -> dict[str, TrainingStep]:
    """Build all rows, the one without distillation first; they share one CLIP.

    Args:
        batch: the samples of a step.
        device: where they run.
        scratch: folder for the random CLIP and the cache; needed as long as the steps.
        miniature: of the miniature's configs and with a tiny CLIP.
        amp: also in mixed precision.
    """
    clip, cache = scratch / "clip.pt", scratch / "cache"
    _write_clip(clip, miniature=miniature)
    rows: dict[str, tuple[str, tuple[str, ...]]] = {}
    for row in TABLES[4].rows:
        training = row.miniature if miniature else row.coco
        if training is not None:
            rows[row.label] = training.config, training.opts
    config, opts = rows[TABLES[4].rows[-1].label]
    ground_truth = (*opts, "MODEL.IKD.BOXES", "gt")
    rows["HierKD, ground-truth boxes"] = config, ground_truth
    rows[_CACHED] = config, (*ground_truth, "MODEL.TEACHER.CACHE", str(cache))
    common = [
        *("MODEL.DEVICE", str(device), "MODEL.WEIGHTS", "", "DATASETS.TRAIN", "()"),
        *("MODEL.TEACHER.WEIGHTS", str(clip), "MODEL.TEACHER.TEXT_CACHE_DIR", str(scratch)),
        *("MODEL.IKD.IOU_THRESH", "0.0", "SOLVER.BASE_LR", "1e-9"),  # stays as it is
    ]
    steps: dict[str, TrainingStep] = {}
    clip_teacher = None
    for precision in ("", ", AMP") if amp else ("",):
        for label, (path, own) in rows.items():
            cfg = load_config(path, [*own, *common])
            if cfg.MODEL.TEACHER.CACHE and not cache.exists():
                _build_cache(cfg, batch, clip, cache)
            model = _build_model(cfg)
            if not cfg.MODEL.TEACHER.CACHE:
                clip_teacher = model.teacher = clip_teacher or model.teacher
            captions = (
                itertools.cycle(_captions(_NUM_CACHED_CAPTIONS))
                if cfg.MODEL.TEACHER.CACHE
                else _new_captions(label + precision)
            )
            steps[label + precision] = TrainingStep(
                model, build_optimizer(cfg, model), batch, captions, bool(precision)
            )
    return steps


def _build_model(cfg: Any) -> HierKD:
    torch.manual_seed(0)
    model: Any = build_model(cfg)
    tame(model)
    model.set_vocabulary(_class_names())
    detector: HierKD = model.train()
    return detector


def _class_names() -> list[str]:
    return [f"class {number}" for number in range(_NUM_CLASSES)]


def _captions(count: int) -> list[str]:
    return [f"a picture of things, number {number}" for number in range(count)]


def _new_captions(label: str) -> Iterator[str]:
    """Texts that no other row has."""
    return (f"{label}, picture {number}" for number in itertools.count())


def _random_batch(images: int, height: int, width: int, boxes: int) -> list[dict[str, Any]]:
    """Samples as the mapper makes them; sides of boxes are 6 % to 60 % of the image's."""
    generator = torch.Generator().manual_seed(0)
    extent = torch.tensor([width, height])
    samples = []
    for number in range(images):
        sides = 0.06 * 10 ** torch.rand(boxes, 2, generator=generator) * extent
        low = torch.rand(boxes, 2, generator=generator) * (extent - sides)
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.cat([low, low + sides], dim=1))
        instances.gt_classes = torch.randint(_NUM_CLASSES, (boxes,), generator=generator)
        instances.gt_annotation_ids = torch.arange(boxes) + 1 + number * boxes
        shape = (3, height, width)
        image = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        flipped = number % 2 == 1
        samples.append({"image": image, "instances": instances, "horizontally_flipped": flipped})
    return samples


def _write_clip(path: Path, *, miniature: bool) -> None:
    torch.manual_seed(0)
    spec = TinyCLIPSpec()
    model = build_tiny_clip(spec) if miniature else import_clip().model.CLIP(*_VIT_B_32)
    save_clip(model, path)


def _build_cache(cfg: Any, batch: Sequence[dict[str, Any]], clip: Path, folder: Path) -> None:
    """A cache of random embeddings for the boxes of a batch and all texts."""
    text = cfg.MODEL.TEXT_CLASSIFIER
    prompts = [text.TEMPLATE.format(name) for name in _class_names()]
    captions = _captions(_NUM_CACHED_CAPTIONS)
    texts, keys = sorted_texts([text.BACKGROUND_PROMPT, *prompts, *captions])
    ids = torch.cat([sample["instances"].gt_annotation_ids for sample in batch]).numpy()
    contents = CacheContents(
        clip=str(clip),
        weights_sha256=file_sha256(clip),
        pixel_statistics=cfg.MODEL.TEACHER.PIXEL_STATISTICS,
        image_format=cfg.INPUT.FORMAT,
        crop_scale=cfg.MODEL.IKD.CROP_SCALE,
        datasets=(),
        annotations_sha256=(),
        embed_dim=text.EMBED_DIM,
        logit_scale=100.0,
        num_boxes=len(ids),
        num_texts=len(texts),
        texts_sha256=keys_sha256(keys),
    )
    rng = np.random.default_rng(0)
    writer = TeacherCacheWriter(folder, contents, ids, keys)
    size = text.EMBED_DIM
    writer.write_regions(rng.standard_normal((len(ids), 2, size)).astype(np.float32))
    writer.write_texts(rng.standard_normal((len(texts), size)).astype(np.float32))
    writer.finish()


def _shares(step: TrainingStep, device: torch.device) -> dict[str, float]:
    """Percent of a step that each of PARTS takes."""
    watch = _Stopwatch(device)
    with watch.watching(step.model):
        for _ in range(_STEPS_FOR_SHARES):
            with watch.part("other"):
                step(watch.part)
    total = sum(watch.seconds.values())
    return {part: 100 * watch.seconds[part] / total for part in PARTS}


class _Stopwatch:
    """Adds up what parts take, each without the parts inside it."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._device = device
        self._inside: list[float] = []  # of every open part: the time of the parts inside it

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = self._now()
        self._inside.append(0.0)
        try:
            yield
        finally:
            taken = self._now() - start
            self.seconds[name] += taken - self._inside.pop()
            if self._inside:
                self._inside[-1] += taken

    @contextmanager
    def watching(self, model: HierKD) -> Iterator[None]:
        """Watch the parts of a detector inside the block."""
        places: list[tuple[Any, str, str]] = [
            (model.backbone, "forward", "backbone"),
            (model.head, "forward", "head"),
            (model, "label_anchors", "assignment"),
            (model, "sample_negatives", "assignment"),
            (model, "positive_points", "assignment"),
            (model, "losses", "losses"),
            (model.teacher, "encode_regions", "CLIP images"),
            (model.teacher, "encode_captions", "texts"),
            (teacher_module, "crop_regions", "crops"),
        ]
        if model.mlca is not None:
            places.append((model.mlca, "forward", "MLCA"))
        with ExitStack() as stack:
            for owner, method, name in places:
                stack.enter_context(self._replaced(owner, method, name))
            yield

    @contextmanager
    def _replaced(self, owner: Any, method: str, name: str) -> Iterator[None]:
        original = getattr(owner, method)
        own = method in vars(owner)  # a function of a module; a method comes from the class

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return original(*args, **kwargs)

        setattr(owner, method, timed)
        try:
            yield
        finally:
            setattr(owner, method, original) if own else delattr(owner, method)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return perf_counter()
