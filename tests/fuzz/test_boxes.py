"""Boxes of every kind on their way from the file to the detector, and the crops of the teacher."""

import math

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from hierkd.data.mapper import HierKDDatasetMapper
from hierkd.teachers.crops import crop_regions

EXTREMES = [0.0, -0.0, 1e-9, 0.5, 1.0, 64.0, 127.0, 127.99, 128.0, 129.0, -1.0, -1e30, 1e30, 3e38]
ODD = [math.nan, math.inf, -math.inf]
COORDINATES = st.one_of(st.sampled_from([*EXTREMES, *ODD]), st.floats(-300, 300, width=32))
BOXES = st.lists(st.tuples(*[COORDINATES] * 4), min_size=1, max_size=6)
MANY = pytest.mark.slow
SAME_EACH_TIME = {
    **{"deadline": None, "database": None, "derandomize": True},
    "suppress_health_check": list(HealthCheck),
}


@pytest.mark.parametrize("number", [150, pytest.param(4_000, marks=MANY)])
def test_the_mapper_gives_boxes_inside_the_image(tmp_path, number):
    Image.new("RGB", (40, 30)).save(tmp_path / "1.png")
    mapper = HierKDDatasetMapper(
        True,
        augmentations=[T.ResizeShortestEdge(60), T.RandomFlip(0.5)],
        image_format="RGB",
        with_caption=False,
    )

    @settings(max_examples=number, **SAME_EACH_TIME)
    @given(BOXES)
    def check(boxes):
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


@pytest.mark.parametrize("number", [60, pytest.param(2_000, marks=MANY)])
def test_crops_of_any_box_are_pixels_of_the_image(number):
    """Finite, within the image's values, and those of the other boxes as without the odd ones."""
    image = torch.rand(3, 37, 53, generator=torch.Generator().manual_seed(0)) * 255
    sane = torch.tensor([[3.0, 4, 30, 20], [10, 1, 50, 36]])

    @settings(max_examples=number, **SAME_EACH_TIME)
    @given(BOXES, st.sampled_from([1.0, 1.5, 1e-6, 1e6]))
    def check(boxes, scale):
        odd = torch.tensor(boxes, dtype=torch.float32)
        crops = crop_regions([image], [torch.cat([sane, odd])], 24, scale)
        assert crops.shape == (2 + len(boxes), 3, 24, 24)
        assert torch.isfinite(crops).all()
        assert crops.min() > -80  # a bicubic filter overshoots by less than a third
        assert crops.max() < 335
        alone = crop_regions([image], [sane], 24, scale)
        torch.testing.assert_close(crops[:2], alone, rtol=1e-4, atol=1e-2)

    check()


@pytest.mark.parametrize("shape", [(1, 1), (1, 20_000), (20_000, 1), (3, 5000)])
def test_crops_of_thin_images(shape):
    image = torch.full((3, *shape), 77.0)
    box = torch.tensor([[0.0, 0, shape[1], shape[0]]])
    crops = crop_regions([image], [box], 32, 1.5)
    content = crops[crops != 0]
    assert len(content) >= 3 * 32
    assert torch.allclose(content, torch.tensor(77.0), atol=1e-2)
