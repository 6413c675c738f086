"""The backbone's warm start: what it sees, what it writes, and that the detector reads it."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import Tensor, nn

from hierkd.data.coco import register_ovd_dataset
from hierkd.miniature import warm_start
from hierkd.miniature.warm_start import train_warm_start
from hierkd.miniature.world import (
    MINIATURE_BASE,
    MINIATURE_CLASSES,
    MINIATURE_NOVEL,
    MiniatureSpec,
    ensure_miniature,
)

MEAN, STD = (120.0, 120.0, 120.0), (60.0, 60.0, 60.0)
_SERIAL = itertools.count()


class Stages(Backbone):
    """Two stages with strides 4 and 8; the second is the one to classify with."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.ReLU())
        self.last = nn.Sequential(nn.Conv2d(8, 24, 3, 2, 1), nn.BatchNorm2d(24), nn.ReLU())
        self.inputs: list[Tensor] = []

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.inputs.append(x.detach())
        stem = self.stem(x)
        return {"c2": stem, "c3": self.last(stem)}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {"c2": ShapeSpec(channels=8, stride=4), "c3": ShapeSpec(channels=24, stride=8)}


def stages(seed: int = 0) -> Stages:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Stages()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A registered training set of 12 pictures, and its annotation file."""
    root = tmp_path_factory.mktemp("world")
    ensure_miniature(root, MiniatureSpec(seed=1, train_images=12, val_images=1, test_images=1))
    json_file = root / "annotations" / "train_base.json"
    name = f"warm_start_test_{next(_SERIAL)}"
    register_ovd_dataset(
        name,
        json_file=str(json_file),
        image_root=str(root / "train"),
        vocabulary=MINIATURE_BASE,
        base_classes=MINIATURE_BASE,
        novel_classes=MINIATURE_NOVEL,
        category_ids=[MINIATURE_CLASSES.index(c) + 1 for c in MINIATURE_BASE],
    )
    return name, json_file


def train(dataset: str, path: Path, **changes: Any) -> tuple[Stages, dict[str, float]]:
    bottom_up = stages()
    options = {"pixel_mean": MEAN, "pixel_std": STD, "steps": 2, "batch_size": 8, "size": 32}
    return bottom_up, train_warm_start(bottom_up, path, dataset, **(options | changes))


def test_it_sees_the_boxes_of_the_base_classes_and_no_other(world: tuple[str, Path]) -> None:
    name, json_file = world
    content = json.loads(json_file.read_text())
    names = {category["id"]: category["name"] for category in content["categories"]}
    assert not set(names.values()) & set(MINIATURE_NOVEL)
    expected = sorted(
        (MINIATURE_BASE.index(names[a["category_id"]]), *a["bbox"]) for a in content["annotations"]
    )
    images, regions = warm_start._load_regions(name)
    found = []
    for image, box, label in regions:
        x0, y0, x1, y1 = box.tolist()
        assert images[image].shape == (3, 128, 128)
        found.append((label, x0, y0, x1 - x0, y1 - y0))
    assert sorted(found) == expected


def test_a_jittered_box_keeps_most_of_the_object() -> None:
    rng = np.random.default_rng(0)
    box = torch.tensor([20.0, 30.0, 60.0, 50.0])
    jittered = torch.cat([warm_start._jitter(box, rng) for _ in range(500)])
    size = (jittered[:, 2:] - jittered[:, :2]) / torch.tensor([40.0, 20.0])
    torch.testing.assert_close(size[:, 0], size[:, 1])
    assert size.min() >= 0.9 - 1e-5
    assert size.max() <= 1.5 + 1e-5
    shift = ((jittered[:, 2:] + jittered[:, :2]) / 2 - torch.tensor([40.0, 40.0])).abs()
    assert (shift <= torch.tensor([4.0, 2.0]) + 1e-4).all()


def test_the_detector_loads_every_weight(world: tuple[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "backbone.pth"
    trained, _ = train(world[0], path)
    stored = torch.load(path)["model"]
    assert all(key.startswith("backbone.bottom_up.") for key in stored)

    detector = nn.Module()
    detector.backbone = nn.Module()
    detector.backbone.bottom_up = stages(seed=5)
    detector.head = nn.Linear(3, 3)
    before = detector.head.weight.clone()
    DetectionCheckpointer(detector, save_dir=str(tmp_path)).load(str(path))
    for key, value in detector.backbone.bottom_up.state_dict().items():
        assert torch.equal(value, trained.state_dict()[key]), key
    assert torch.equal(detector.head.weight, before)


def test_crops_are_normalised_as_the_detector_does(world: tuple[str, Path], tmp_path: Path) -> None:
    wide, _ = train(world[0], tmp_path / "a.pth", steps=1)
    shifted, _ = train(
        world[0], tmp_path / "b.pth", steps=1, pixel_mean=(0, 0, 0), pixel_std=(1, 1, 1)
    )
    ours, raw = wide.inputs[0], shifted.inputs[0]
    assert ours.shape == (8, 3, 32, 32)
    content = (raw != 0).all(dim=1, keepdim=True).expand_as(raw)
    torch.testing.assert_close(ours[content], (raw[content] - 120) / 60, atol=1e-3, rtol=1e-4)
    assert (raw[content] > 3).any(), "0..255"


def test_one_seed_gives_one_backbone_and_leaves_the_global_state(
    world: tuple[str, Path], tmp_path: Path
) -> None:
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    runs = [
        train(world[0], tmp_path / f"{i}.pth", seed=seed)[0] for i, seed in enumerate((0, 0, 1))
    ]
    assert torch.equal(torch.random.get_rng_state(), state)
    first, again, other = (run.state_dict() for run in runs)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["stem.0.weight"], other["stem.0.weight"])


def test_it_learns_to_name_its_crops(
    world: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[int] = set()
    cross_entropy = torch.nn.functional.cross_entropy

    def spy(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
        seen.update(labels.tolist())
        return cross_entropy(logits, labels, **options)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", spy)
    _, figures = train(world[0], tmp_path / "w.pth", steps=60, batch_size=32, lr=1e-2)
    assert seen == {label for _, _, label in warm_start._load_regions(world[0])[1]}
    # About 20 boxes of up to 24 classes; the first step, untrained, is right about 1 in 24 times.
    _, start = train(world[0], tmp_path / "s.pth", steps=1, batch_size=32)
    assert figures["accuracy"] > start["accuracy"] + 0.2
    assert figures["seconds"] > 0
