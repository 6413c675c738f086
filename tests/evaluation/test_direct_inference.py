"""CLIP direct inference against a slow loop over Algorithm 1, and its options."""

from typing import Any

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, pairwise_iou
from torch.nn.functional import normalize

import hierkd.modeling.detector as meta_arch
from fake_teacher import FakeTeacher
from hierkd.evaluation.direct_inference import DirectInference
from hierkd.load_config import load_config
from hierkd.modeling.detector import HierKD

SIZE = 128
CLASSES = ["dog", "ant", "cow", "bee"]
CONFIG = "configs/miniature/hierkd.yaml"


class BoxTeacher(FakeTeacher):
    """What it sees in a region follows from the box, the crop scale and the image's brightness."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__(embed_dim)
        generator = torch.Generator().manual_seed(7)
        self.weight = torch.randn(4, embed_dim, generator=generator) / 12

    def encode_regions(self, images, boxes, crop_scale):
        super().encode_regions(images, boxes, crop_scale)
        return torch.cat(
            [
                self.look(image, box, crop_scale)[None]
                for image, image_boxes in zip(images, boxes, strict=True)
                for box in image_boxes
            ]
        )

    def look(self, image, box, crop_scale):
        return normalize(torch.sin(crop_scale * box @ self.weight + image.float().mean()), dim=0)


@pytest.fixture
def build(monkeypatch):
    def _build(*overrides: Any) -> HierKD:
        cfg = load_config(CONFIG, ["MODEL.DEVICE", "cpu", "DATASETS.TRAIN", "()", *overrides])
        teacher = BoxTeacher(cfg.MODEL.TEXT_CLASSIFIER.EMBED_DIM)
        monkeypatch.setattr(meta_arch, "build_teacher", lambda cfg: teacher)
        torch.manual_seed(3)
        model = build_model(cfg).eval()
        # Spread the boxes and scores of the untrained head, so that ranking and NMS have work.
        for conv in (model.head.embedding, model.head.anchor_deltas, model.head.quality):
            torch.nn.init.normal_(conv.weight, std=0.2)
        model.set_vocabulary(CLASSES)
        return model

    return _build


def picture(seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    brightness = 40 * seed
    pixels = torch.randint(brightness, 256, (3, SIZE, SIZE), generator=generator)
    return {"image": pixels.to(torch.uint8)}


def algorithm_1(
    model: HierKD,
    given: dict[str, Any],
    *,
    per_level: int,
    with_iou: bool,
    crop_scale: float,
) -> list[tuple[float, int, torch.Tensor]]:
    """One image, one anchor and one class at a time."""
    texts, tau = model.teacher.encode_classes(CLASSES), model.teacher.logit_scale
    images = model.preprocess_image([given])
    features = [model.backbone(images.tensor)[f] for f in model.head_in_features]
    embeddings, deltas, qualities = model.head(features)
    pairs = []
    for level, anchors in enumerate(model.anchor_generator(features)):
        width = embeddings[level].shape[3]
        points = []
        for index, anchor in enumerate(anchors.tensor):
            y, x = divmod(index, width)
            logits = model.text_classifier(embeddings[level][0, :, y, x])
            iou = qualities[level][0, 0, y, x].sigmoid()
            delta = deltas[level][0, :, y, x]
            points.append((float(logits.softmax(0)[:-1].max() * iou), float(iou), delta, anchor))
        points.sort(key=lambda point: -point[0])
        for _, iou, delta, anchor in points[:per_level]:
            box = model.box2box_transform.apply_deltas(delta[None], anchor[None])[0].clamp(0, SIZE)
            seen = model.teacher.look(given["image"], box, crop_scale)
            cosines = [float(seen @ text) for text in texts]
            probs = (tau * torch.tensor(cosines)).softmax(0)
            pairs += [(float(p) * (iou if with_iou else 1.0), k, box) for k, p in enumerate(probs)]
    pairs.sort(key=lambda pair: -pair[0])
    kept: list[tuple[float, int, torch.Tensor]] = []
    for score, k, box in pairs:
        others = [b for _, c, b in kept if c == k]
        if not others or pairwise_iou(Boxes(torch.stack(others)), Boxes(box[None])).max() <= 0.4:
            kept.append((score, k, box))
    return kept[:100]


def assert_same(output: dict[str, Any], expected: list[tuple[float, int, torch.Tensor]]) -> None:
    found = output["instances"]
    assert len(found) == len(expected) > 10
    scores = torch.tensor([score for score, _, _ in expected])
    torch.testing.assert_close(found.scores, scores, rtol=1e-3, atol=1e-6)
    assert found.pred_classes.tolist() == [k for _, k, _ in expected]
    boxes = torch.stack([box for _, _, box in expected])
    torch.testing.assert_close(found.pred_boxes.tensor, boxes, rtol=1e-4, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("fuse_quality", [False, True])
def test_a_batch_equals_the_slow_loop(build, fuse_quality):
    model = build("MODEL.ATSS.TOPK_ANCHORS_TEST", 20)
    inputs = [picture(1), picture(2)]
    outputs = DirectInference(model, crop_scale=1.25, fuse_quality=fuse_quality)(inputs)
    for given, output in zip(inputs, outputs, strict=True):
        expected = algorithm_1(model, given, per_level=20, with_iou=fuse_quality, crop_scale=1.25)
        assert_same(output, expected)


@torch.no_grad()
def test_with_the_detectors_own_probabilities_it_is_the_detector(build, monkeypatch):
    model = build()
    inputs = [picture(1), picture(2)]
    direct = DirectInference(model, fuse_quality=True)
    own = iter([fore.probs for fore in model.fore_anchors(inputs)])
    monkeypatch.setattr(direct, "class_probabilities", lambda embeddings: next(own))
    for output, plain in zip(direct(inputs), model(inputs), strict=True):
        found, wanted = output["instances"], plain["instances"]
        assert torch.equal(found.scores, wanted.scores)
        assert torch.equal(found.pred_classes, wanted.pred_classes)
        assert torch.equal(found.pred_boxes.tensor, wanted.pred_boxes.tensor)
        assert found.image_size == wanted.image_size


def test_at_most_so_many_anchors_and_they_are_the_best(build):
    model = build()
    inputs = [picture(1), picture(2)]
    everything = model.fore_anchors(inputs)
    model.teacher.regions.clear()
    DirectInference(model, max_anchors=17)(inputs)
    ((_, boxes, _),) = model.teacher.regions
    for seen, fore in zip(boxes, everything, strict=True):
        scores = (fore.probs * fore.qualities[:, None]).amax(dim=1)
        best = fore.boxes[scores.argsort(descending=True)[:17]]
        assert {tuple(box) for box in seen.tolist()} == {tuple(box) for box in best.tolist()}
    model.teacher.regions.clear()
    DirectInference(model, max_anchors=10_000)(inputs)
    assert [len(b) for b in model.teacher.regions[0][1]] == [len(f.boxes) for f in everything]
