"""Boxes of every kind on their way from the file to the losses, and the crops of the teacher."""

import math

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.events import EventStorage
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

import hierkd.modeling.detector as meta_arch
from fake_teacher import FakeTeacher
from hierkd.data.mapper import HierKDDatasetMapper
from hierkd.load_config import load_config
from hierkd.teachers.crops import crop_regions

SIZE = 128
CLASSES = [f"thing {i}" for i in range(5)]
EXTREMES = [0.0, -0.0, 1e-9, 0.5, 1.0, 64.0, 127.0, 127.99, 128.0, 129.0, -1.0, -1e30, 1e30, 3e38]
ODD = [math.nan, math.inf, -math.inf]
COORDINATES = st.one_of(st.sampled_from([*EXTREMES, *ODD]), st.floats(-300, 300, width=32))
BOXES = st.lists(st.tuples(*[COORDINATES] * 4), min_size=1, max_size=6)
CORNERS = st.tuples(*[st.floats(-200, 300, width=32)] * 4)
USABLE = st.lists(
    CORNERS.map(lambda c: (min(c[::2]), min(c[1::2]), max(c[::2]), max(c[1::2]))), max_size=6
)
MANY = pytest.mark.slow


def tries(number):
    """Hypothesis' settings for so many cases: the same ones each time."""
    return settings(
        max_examples=number,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )


# --- the mapper -----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [150, pytest.param(4_000, marks=MANY)])
def test_the_mapper_gives_boxes_inside_the_image(tmp_path, number):
    Image.new("RGB", (40, 30)).save(tmp_path / "1.png")
    mapper = HierKDDatasetMapper(
        True,
        augmentations=[T.ResizeShortestEdge(60), T.RandomFlip(0.5)],
        image_format="RGB",
        with_caption=False,
    )
    count = 0

    @tries(number)
    @given(BOXES)
    def check(boxes):
        nonlocal count
        count += 1
        annotations = [
            {"bbox": list(box), "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0} for box in boxes
        ]
        record = {"file_name": str(tmp_path / "1.png"), "annotations": annotations}
        with np.errstate(all="ignore"):
            found = mapper(record)["instances"].gt_boxes.tensor
        assert torch.isfinite(found).all()
        assert (found[:, 2:] > found[:, :2]).all()
        assert (found >= 0).all()
        assert (found <= torch.tensor([80.0, 60, 80, 60])).all()

    check()
    print(f"{count} images with boxes of every kind")
    assert count >= number / 2


# --- the detector ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    with pytest.MonkeyPatch.context() as patch:
        cfg = load_config(
            "configs/miniature/hierkd.yaml", ["MODEL.DEVICE", "cpu", "DATASETS.TRAIN", "()"]
        )
        teacher = FakeTeacher(cfg.MODEL.TEXT_CLASSIFIER.EMBED_DIM)
        patch.setattr(meta_arch, "build_teacher", lambda cfg: teacher)
        torch.manual_seed(0)
        detector = build_model(cfg)
    detector.set_vocabulary(CLASSES)
    return detector.train()


def sample(boxes, classes=None, number=0):
    instances = Instances((SIZE, SIZE))
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    labels = [0] * len(boxes) if classes is None else classes
    instances.gt_classes = torch.tensor(labels, dtype=torch.int64)
    generator = torch.Generator().manual_seed(number)
    image = torch.randint(0, 256, (3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    name = {"file_name": f"{number}.png", "image_id": number, "caption": f"picture {number}"}
    return {"image": image, "instances": instances, **name}


def losses(model, batch):
    torch.manual_seed(0)
    with EventStorage():
        return model(batch)


@pytest.mark.parametrize(
    "box",
    [
        (0, 0, SIZE, SIZE),
        (-500, -500, 900, 900),
        (-1e6, -1e6, 1e6, 1e6),
        (0, 0, 1, 1),
        (SIZE - 1, SIZE - 1, SIZE, SIZE),
        (64, 0, 64, SIZE),
        (63, 63, 63, 63),
        (0, 60, SIZE, 60.001),
        (SIZE + 5, 5, SIZE + 40, 60),
        (-90, -90, -20, -20),
    ],
)
def test_losses_and_gradients_are_finite_at_the_edges(model, box):
    model.zero_grad()
    found = losses(model, [sample([box], number=1), sample([(10, 12, 70, 80)], number=2)])
    assert all(torch.isfinite(loss) for loss in found.values())
    sum(found.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("number", [40, pytest.param(1_500, marks=MANY)])
def test_losses_are_finite_or_the_image_is_named(model, number):
    good = sample([(10, 12, 70, 80)], [3], number=7)
    counts = {"finite": 0, "named": 0}

    @tries(number)
    @given(st.one_of(BOXES, USABLE), st.integers(-1, 5))
    def check(boxes, last_class):
        bad = sample(boxes, [0] * (len(boxes) - 1) + [last_class] * bool(boxes), number=8)
        usable = all(
            max(map(abs, box)) <= 1e7 and box[2] >= box[0] and box[3] >= box[1]
            for box in bad["instances"].gt_boxes.tensor.tolist()
            if not any(map(math.isnan, box))
        ) and not any(math.isnan(value) for box in boxes for value in box)
        try:
            found = losses(model, [bad, good])
        except ValueError as error:
            assert "Image 8.png (id 8): ground truth" in str(error)
            assert not (usable and 0 <= last_class < len(CLASSES))
            counts["named"] += 1
        else:
            assert usable
            assert all(torch.isfinite(loss) for loss in found.values())
            counts["finite"] += 1

    check()
    print(f"batches: {counts}")
    assert min(counts.values()) > 0


@torch.no_grad()
def test_the_other_images_of_a_batch_are_labelled_as_without_the_odd_one(model):
    good = [sample([(10, 12, 70, 80)], [3], number=1), sample([(40, 20, 120, 90)], number=2)]
    odd = sample([(-500, -500, 900, 900), (63, 63, 63, 63), (0, 0, 1, 1)], number=3)
    features, _ = model._predict_maps(model.preprocess_image(good))
    anchors = model.anchor_generator(features)
    without = model.label_anchors(anchors, [each["instances"] for each in good])
    together = model.label_anchors(
        anchors, [good[0]["instances"], odd["instances"], good[1]["instances"]]
    )
    for alone, mixed in zip(without, together, strict=True):
        assert torch.equal(alone, mixed[[0, 2]])


# --- the teacher's crops --------------------------------------------------------------------------


@pytest.mark.parametrize("number", [60, pytest.param(2_000, marks=MANY)])
def test_crops_of_any_box_are_pixels_of_the_image(number):
    """Finite, within the image's values, and those of the other boxes as without the odd ones."""
    image = torch.rand(3, 37, 53, generator=torch.Generator().manual_seed(0)) * 255
    sane = torch.tensor([[3.0, 4, 30, 20], [10, 1, 50, 36]])
    count = 0

    @seed(0)
    @tries(number)
    @given(BOXES, st.sampled_from([1.0, 1.5, 1e-6, 1e6]), st.booleans())
    def check(boxes, scale, batched):
        nonlocal count
        count += 1
        odd = torch.tensor(boxes, dtype=torch.float32)
        crops = crop_regions([image], [torch.cat([sane, odd])], 24, scale, batched=batched)
        assert crops.shape == (2 + len(boxes), 3, 24, 24)
        assert torch.isfinite(crops).all()
        assert crops.min() > -80  # a bicubic filter overshoots by less than a third
        assert crops.max() < 335
        alone = crop_regions([image], [sane], 24, scale, batched=batched)
        torch.testing.assert_close(crops[:2], alone, rtol=1e-4, atol=1e-2)

    check()
    print(f"{count} sets of regions")
    assert count >= number / 2


@pytest.mark.parametrize("shape", [(1, 1), (1, 20_000), (20_000, 1), (3, 5000)])
@pytest.mark.parametrize("batched", [False, True])
def test_crops_of_thin_images(shape, batched):
    image = torch.full((3, *shape), 77.0)
    box = torch.tensor([[0.0, 0, shape[1], shape[0]]])
    crops = crop_regions([image], [box], 32, 1.5, batched=batched)
    content = crops[crops != 0]
    assert len(content) >= 3 * 32
    assert torch.allclose(content, torch.tensor(77.0), atol=1e-2)
