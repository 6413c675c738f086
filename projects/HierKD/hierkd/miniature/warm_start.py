"""A warm start for the miniature's backbone, in the place of ImageNet weights.

The backbone learns to name crops of the detector's own training boxes, so of base classes only.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import Backbone
from detectron2.structures import BoxMode
from torch import Tensor, nn
from tqdm import tqdm

from hierkd.data.mapper import read_picture
from hierkd.files import replacing
from hierkd.teachers.crops import crop_regions

__all__ = ["train_warm_start"]


def train_warm_start(
    bottom_up: Backbone,
    path: str | os.PathLike[str],
    dataset_name: str,
    *,
    pixel_mean: Sequence[float],
    pixel_std: Sequence[float],
    steps: int = 200,
    batch_size: int = 96,
    size: int = 64,
    lr: float = 3e-3,
) -> dict[str, float]:
    """Train a bottom-up backbone as a classifier of ground-truth boxes and save its weights.

    Args:
        bottom_up: a detectron2 backbone without FPN; trained in place.
        path: checkpoint to write; ``MODEL.WEIGHTS`` reads it.
        dataset_name: a registered training dataset; its images are held in memory.
        pixel_mean: RGB, in 0..255, as the detector will normalise; `pixel_std` likewise.
        steps: of AdamW with a one-cycle schedule up to `lr`, each of `batch_size` crops.
        size: px, side of the letterboxed crops.

    Returns:
        ``seconds`` and ``accuracy`` over the last tenth of the steps.
    """
    started = time.monotonic()
    rng = np.random.default_rng(0)
    images, regions = _load_regions(dataset_name)
    num_classes = len(MetadataCatalog.get(dataset_name).thing_classes)
    last, shape = max(bottom_up.output_shape().items(), key=lambda item: item[1].stride)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        classifier = nn.Linear(shape.channels, num_classes)
    bottom_up.train().to(memory_format=torch.channels_last)
    parameters = [*bottom_up.parameters(), *classifier.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    accuracies: list[float] = []
    for _ in tqdm(range(steps), desc="warming up the backbone", unit="step"):
        chosen = [regions[i] for i in rng.integers(0, len(regions), batch_size)]
        crops = crop_regions(
            [images[region[0]] for region in chosen],
            [_jitter(region[1], rng) for region in chosen],
            size=size,
            scale=1.0,
            mean=[float(each) for each in pixel_mean],  # a YAML may say 0
            std=[float(each) for each in pixel_std],
        )
        flip = torch.from_numpy(rng.random(len(crops)) < 0.5)
        crops[flip] = crops[flip].flip(3)
        labels = torch.tensor([region[2] for region in chosen])
        features = bottom_up(crops.contiguous(memory_format=torch.channels_last))[last]
        logits = classifier(features.mean(dim=(2, 3)))
        optimizer.zero_grad()
        F.cross_entropy(logits, labels, label_smoothing=0.1).backward()
        optimizer.step()
        schedule.step()
        accuracies.append(float((logits.argmax(dim=1) == labels).float().mean()))
    model = {f"backbone.bottom_up.{key}": value for key, value in bottom_up.state_dict().items()}
    with replacing(path) as making:
        # detectron2 fits the names to a model's by their endings where this is set
        torch.save({"model": model, "__author__": "hierkd", "matching_heuristics": True}, making)
    tail = accuracies[-max(1, steps // 10) :]
    return {"seconds": time.monotonic() - started, "accuracy": sum(tail) / len(tail)}


def _load_regions(dataset_name: str) -> tuple[list[Tensor], list[tuple[int, Tensor, int]]]:
    """All images (3, H, W), and (image index, XYXY box (4,), class) of every box."""
    images: list[Tensor] = []
    regions: list[tuple[int, Tensor, int]] = []
    for record in DatasetCatalog.get(dataset_name):
        for annotation in record["annotations"]:
            box: Any = BoxMode.convert(
                annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS
            )
            regions.append((len(images), torch.tensor(box), annotation["category_id"]))
        picture = read_picture(record["file_name"], "RGB")
        images.append(torch.from_numpy(picture).permute(2, 0, 1).contiguous())
    return images, regions


def _jitter(box: Tensor, rng: np.random.Generator) -> Tensor:
    """(1, 4): the box, 0.9 to 1.5 times as large, a little off its place."""
    center, side = (box[:2] + box[2:]) / 2, box[2:] - box[:2]
    center = center + torch.from_numpy(rng.uniform(-0.1, 0.1, 2)).float() * side
    half = side * rng.uniform(0.9, 1.5) / 2
    return torch.cat([center - half, center + half])[None]
