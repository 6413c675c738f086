"""A training step of each row of Table 4, and of HierKD with CLIP's embeddings known beforehand.

A step is forward, backward and optimiser on random pictures, boxes and captions that are in memory
already: reading data is not part of it. The teacher is a random CLIP of the shape of ViT-B/32
(``--miniature``: of the miniature's tiny CLIP). Every positive point is distilled, as in a trained
detector, whose boxes are good, whereas a random one would distil next to none; every caption is new
to the teacher, as in the first epochs. In the last row all embeddings are looked up: what is left
of a step with the teacher's cache.

On a CPU the pictures are small, and so is the number of boxes, so that the teacher keeps about the
share of the work that it has at full size.

The shares of the parts come from steps of their own, in which the device is waited for around each
part.
"""

from __future__ import annotations

import itertools
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from hierkd.benchmarks.timing import (
    RandomTeacher,
    Report,
    measure,
    median,
    peak_memory,
    ratio,
    synchronized,
    tame,
)
from hierkd.experiments.tables import TABLES
from hierkd.load_config import load_config
from hierkd.miniature.clip import TinyCLIPSpec, build_tiny_clip, save_clip
from hierkd.modeling.detector import HierKD
from hierkd.teachers.openai_clip import import_clip
from hierkd.training.optimizer import build_optimizer

__all__ = ["PARTS", "TrainingStep", "build_steps", "run"]

PARTS = (
    *("backbone", "head", "assignment", "CLIP images", "CLIP texts", "MLCA", "losses"),
    *("backward", "optimiser", "other"),
)
_LOOKED_UP = "HierKD, embeddings looked up"
_NUM_CLASSES = 48
_STEPS_FOR_SHARES = 2
_VIT_B_32 = (512, 224, 12, 768, 32, 77, 49408, 512, 8, 12)  # arguments of clip.model.CLIP
# Images, (height, width), boxes per image.
_CPU_SIZES = (2, (256, 416), 1)
_GPU_SIZES = (8, (800, 1333), 7)  # COCO's base boxes per image are 6.2
_MINIATURE_SIZES = (16, (128, 128), 3)


def run(
    device: torch.device,
    *,
    rounds: int | None,
    miniature: bool,
    images: int | None,
    size: tuple[int, int] | None,
    boxes: int | None,
) -> Report:
    """Time the steps in turns; on a GPU with AMP and without.

    ``size`` is (height, width) of an image, ``boxes`` are those of an image; None: as fits.
    """
    gpu = device.type == "cuda"
    sizes = _MINIATURE_SIZES if miniature else _GPU_SIZES if gpu else _CPU_SIZES
    images, size, boxes = images or sizes[0], size or sizes[1], boxes or sizes[2]
    rounds = rounds or (20 if gpu else 8 if miniature else 2)
    batch = _random_batch(images, size, boxes)
    with tempfile.TemporaryDirectory() as scratch, EventStorage() as storage:
        steps = build_steps(batch, device, Path(scratch), miniature=miniature)
        times = measure(steps, device, rounds)
        atss = next(iter(steps))
        rows = [
            {
                "row of Table 4": name,
                "s/step": median(times[name]),
                "images/s": images / median(times[name]),
                "over ATSS": ratio(times[name], times[atss + ", AMP" * name.endswith(", AMP")]),
                "peak MiB": peak_memory(step, device),
                **{f"{part} %": share for part, share in _shares(step, device).items()},
            }
            for name, step in steps.items()
        ]
        distilled = storage.latest()["num_distilled_regions"][0]
    return Report(
        "A training step",
        device,
        {
            "images": images,
            "size": f"{size[0]} x {size[1]}",
            "boxes per image": boxes,
            "distilled points per image": distilled,
            "rounds": rounds,
            "configs": "miniature" if miniature else "configs/ablations/table4_*",
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
    """One training step; each call makes one."""

    model: HierKD  # in training mode
    optimizer: torch.optim.Optimizer
    batch: list[dict[str, Any]]  # each call puts other captions into the samples
    captions: Iterator[str]  # endless
    scaler: Any  # enabled where the forward pass runs in mixed precision

    def __call__(self, part: Callable[[str], AbstractContextManager[Any]] = nullcontext) -> None:
        """Make a step; ``part`` is entered around ``backward`` and ``optimiser``."""
        inputs = [{**sample, "caption": next(self.captions)} for sample in self.batch]
        self.optimizer.zero_grad()
        with torch.autocast(self.model.device.type, enabled=self.scaler.is_enabled()):
            losses = self.model(inputs)
        with part("backward"):
            self.scaler.scale(sum(losses.values())).backward()
        with part("optimiser"):
            if self.scaler.is_enabled():
                self.scaler.unscale_(self.optimizer)
            self.scaler.step(self.optimizer)
            self.scaler.update()


def build_steps(
    batch: list[dict[str, Any]], device: torch.device, scratch: Path, *, miniature: bool
) -> dict[str, TrainingStep]:
    """Build all rows, the one without distillation first; they share one CLIP.

    ``scratch`` is a folder for the random CLIP, needed as long as the steps.
    """
    torch.manual_seed(0)
    clip = build_tiny_clip(TinyCLIPSpec()) if miniature else import_clip().model.CLIP(*_VIT_B_32)
    save_clip(clip, scratch / "clip.pt")
    trainings: dict[str, Any] = {
        row.label: row.miniature if miniature else row.coco for row in TABLES[4].rows
    }
    trainings[_LOOKED_UP] = list(trainings.values())[-1]
    common = [
        *("MODEL.DEVICE", str(device), "MODEL.WEIGHTS", "", "DATASETS.TRAIN", "()"),
        *("MODEL.TEACHER.WEIGHTS", str(scratch / "clip.pt")),
        *("MODEL.TEACHER.TEXT_CACHE_DIR", str(scratch)),
        *("MODEL.IKD.IOU_THRESH", "0.0", "SOLVER.BASE_LR", "1e-9"),  # stays as it is
    ]
    steps: dict[str, TrainingStep] = {}
    teacher = None
    for precision in ("", ", AMP") if device.type == "cuda" else ("",):
        for label, training in trainings.items():
            cfg = load_config(training.config, [*training.opts, *common])
            torch.manual_seed(0)
            model: Any = build_model(cfg)
            tame(model)
            model.set_vocabulary([f"class {number}" for number in range(_NUM_CLASSES)])
            model.teacher = teacher = teacher or model.teacher
            if label == _LOOKED_UP:
                dim = cfg.MODEL.TEXT_CLASSIFIER.EMBED_DIM
                model.teacher = RandomTeacher(dim, cfg.MODEL.DEVICE)
            name = label + precision
            steps[name] = TrainingStep(
                model.train(),
                build_optimizer(cfg, model),
                batch,
                (f"{name}, picture {number}" for number in itertools.count()),
                torch.amp.GradScaler("cuda", enabled=bool(precision)),
            )
    return steps


def _random_batch(images: int, size: tuple[int, int], boxes: int) -> list[dict[str, Any]]:
    """Samples as the mapper makes them; sides of boxes are 6 % to 60 % of the image's."""
    generator = torch.Generator().manual_seed(0)
    extent = torch.tensor([size[1], size[0]])
    samples = []
    for _ in range(images):
        sides = 0.06 * 10 ** torch.rand(boxes, 2, generator=generator) * extent
        low = torch.rand(boxes, 2, generator=generator) * (extent - sides)
        instances = Instances(tuple(size))
        instances.gt_boxes = Boxes(torch.cat([low, low + sides], dim=1))
        instances.gt_classes = torch.randint(_NUM_CLASSES, (boxes,), generator=generator)
        image = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator)
        samples.append({"image": image, "instances": instances})
    return samples


def _shares(step: TrainingStep, device: torch.device) -> dict[str, float]:
    """Percent of a step that each of PARTS takes."""
    model: Any = step.model
    places: list[tuple[Any, str, str]] = [
        (model.backbone, "forward", "backbone"),
        (model.head, "forward", "head"),
        (model, "label_anchors", "assignment"),
        (model.teacher, "encode_regions", "CLIP images"),
        (model.teacher, "encode_captions", "CLIP texts"),
        (model, "losses", "losses"),
    ]
    if model.mlca is not None:
        places.append((model.mlca, "forward", "MLCA"))
    seconds: Counter[str] = Counter()

    @contextmanager
    def part(name: str) -> Iterator[None]:
        start = synchronized(device)
        yield
        seconds[name] += synchronized(device) - start  # type: ignore[assignment]

    with ExitStack() as stack:
        for owner, method, name in places:  # a context manager of contextlib decorates, too
            replaced = part(name)(getattr(owner, method))
            stack.enter_context(mock.patch.object(owner, method, replaced))
        with part("all"):
            for _ in range(_STEPS_FOR_SHARES):
                step(part)
    total = seconds.pop("all")
    seconds["other"] = total - sum(seconds.values())
    return {name: 100 * seconds[name] / total for name in PARTS}
