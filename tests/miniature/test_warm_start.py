"""The backbone's warm start: what it sees, what it writes, and that the detector reads it."""

import json

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import nn

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

NAME = "warm_start_test"


class Stages(Backbone):
    """Two stages with strides 4 and 8; the second is the one to classify with."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8), nn.ReLU())
        self.last = nn.Sequential(nn.Conv2d(8, 24, 3, 2, 1), nn.BatchNorm2d(24), nn.ReLU())
        self.inputs = []

    def forward(self, x):
        self.inputs.append(x.detach())
        stem = self.stem(x)
        return {"c2": stem, "c3": self.last(stem)}

    def output_shape(self):
        return {"c2": ShapeSpec(channels=8, stride=4), "c3": ShapeSpec(channels=24, stride=8)}


@pytest.fixture(scope="module", autouse=True)
def annotations(tmp_path_factory):
    """The annotations of a registered training set of 12 pictures."""
    root = tmp_path_factory.mktemp("world")
    ensure_miniature(root, MiniatureSpec(seed=1, train_images=12, val_images=1, test_images=1))
    json_file = root / "annotations" / "train_base.json"
    register_ovd_dataset(
        NAME,
        json_file=str(json_file),
        image_root=str(root / "train"),
        vocabulary=MINIATURE_BASE,
        base_classes=MINIATURE_BASE,
        novel_classes=MINIATURE_NOVEL,
        category_ids=[MINIATURE_CLASSES.index(c) + 1 for c in MINIATURE_BASE],
    )
    yield json.loads(json_file.read_text())
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def train(path, **changes):
    bottom_up = Stages()
    options = {"pixel_mean": [120.0] * 3, "pixel_std": [60.0] * 3, "batch_size": 8, "size": 32}
    return bottom_up, train_warm_start(bottom_up, path, NAME, **{"steps": 2, **options, **changes})


def test_it_sees_the_boxes_of_the_base_classes_and_no_other(annotations):
    names = {category["id"]: category["name"] for category in annotations["categories"]}
    images, regions = warm_start._load_regions(NAME)
    found = []
    for image, box, label in regions:
        x0, y0, x1, y1 = box.tolist()
        assert images[image].shape == (3, 128, 128)
        found.append((label, x0, y0, x1 - x0, y1 - y0))
    assert sorted(found) == sorted(
        (MINIATURE_BASE.index(names[a["category_id"]]), *a["bbox"])
        for a in annotations["annotations"]
    )


def test_the_detector_loads_every_weight(tmp_path):
    path = tmp_path / "backbone.pth"
    trained, _ = train(path)
    detector = nn.Module()
    detector.backbone = nn.Module()
    detector.backbone.bottom_up = Stages(seed=5)
    detector.head = nn.Linear(3, 3)
    before = detector.head.weight.clone()
    DetectionCheckpointer(detector, save_dir=str(tmp_path)).load(str(path))
    for key, value in detector.backbone.bottom_up.state_dict().items():
        assert torch.equal(value, trained.state_dict()[key]), key
    assert torch.equal(detector.head.weight, before)


def test_crops_are_normalised_as_the_detector_does(tmp_path):
    shifted, _ = train(tmp_path / "b.pth", steps=1, pixel_mean=(0, 0, 0), pixel_std=(1, 1, 1))
    ours, raw = train(tmp_path / "a.pth", steps=1)[0].inputs[0], shifted.inputs[0]
    assert ours.shape == (8, 3, 32, 32)
    content = (raw != 0).all(dim=1, keepdim=True).expand_as(raw)
    torch.testing.assert_close(ours[content], (raw[content] - 120) / 60, atol=1e-3, rtol=1e-4)
    assert (raw[content] > 3).any(), "0..255"


def test_it_learns_to_name_its_crops(tmp_path):
    # About 20 boxes of up to 24 classes; the first step, untrained, is right about 1 in 24 times.
    _, start = train(tmp_path / "s.pth", steps=1, batch_size=32)
    _, figures = train(tmp_path / "w.pth", steps=60, batch_size=32, lr=1e-2)
    assert figures["accuracy"] > start["accuracy"] + 0.2
    assert figures["seconds"] > 0
