import math

import pytest
import torch
from torch.nn import functional as F

from hierkd.teachers.crops import crop_regions


def antialiased_bicubic(region, height, width):
    if width == 1 < height:
        # F.interpolate returns wrong values for outputs of one column; those of one row are right.
        return antialiased_bicubic(region.mT, width, height).mT
    return F.interpolate(
        region[None].contiguous(), (height, width), mode="bicubic", antialias=True
    )[0]


def crop_one_by_one(images, boxes, size, scale=1.0, mean=(0, 0, 0), std=(1, 1, 1)):
    """Slice, resize and pad each box with PyTorch's own antialiased bicubic filter."""
    crops = []
    shift, spread = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
    for image, image_boxes in zip(images, boxes, strict=True):
        _, height, width = image.shape
        for x1, y1, x2, y2 in image_boxes.tolist():
            cx, cy = (x1 + x2) / 2, (y1 + y2) / 2
            hw, hh = (x2 - x1) / 2 * scale, (y2 - y1) / 2 * scale
            left = min(max(math.floor(cx - hw), 0), width - 1)
            top = min(max(math.floor(cy - hh), 0), height - 1)
            right = max(min(math.ceil(cx + hw), width), left + 1)
            bottom = max(min(math.ceil(cy + hh), height), top + 1)
            region = (image[:, top:bottom, left:right].float() - shift) / spread
            h, w = bottom - top, right - left
            h_out = max(1, math.floor(h * size / max(h, w) + 0.5))
            w_out = max(1, math.floor(w * size / max(h, w) + 0.5))
            region = antialiased_bicubic(region, h_out, w_out)
            above, before = (size - h_out) // 2, (size - w_out) // 2
            margins = (before, size - w_out - before, above, size - h_out - above)
            crops.append(F.pad(region, margins))
    return torch.stack(crops)


def random_boxes(count, height, width, generator):
    corners = torch.rand(count, 2, 2, generator=generator) * torch.tensor([width, height])
    return torch.cat([corners.amin(1), corners.amax(1)], dim=1)


@pytest.mark.parametrize("size", [1, 17, 32, 50, 224])
@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_equals_a_loop_over_the_boxes(size, scale):
    generator = torch.Generator().manual_seed(size)
    images = [torch.rand(3, h, w, generator=generator) * 255 for h, w in [(90, 130), (211, 60)]]
    boxes = [random_boxes(21, *image.shape[1:], generator) for image in images]
    mean, std = (120.0, 110.0, 100.0), (70.0, 60.0, 65.0)
    expected = crop_one_by_one(images, boxes, size, scale, mean, std)
    torch.testing.assert_close(
        crop_regions(images, boxes, size, scale, mean, std), expected, atol=2e-5, rtol=0
    )


@pytest.mark.parametrize(
    "box",
    [
        [0, 0, 400, 300],  # the whole image
        [3, 7, 4, 8],  # one pixel
        [3, 7, 4, 250],  # one column
        [10, 299, 390, 300],  # one row at the lower border
        [20.2, 30.1, 20.4, 30.3],  # inside one pixel
        [50, 60, 50, 60],  # no area
        [399.5, 299.5, 400, 300],  # the last pixel
        [3, 0, 9, 300],  # so thin that its short side becomes a few pixels
        [-60, -70, 20, 10],  # partly outside
    ],
)
def test_edge_cases_equal_the_loop(box):
    image = torch.rand(3, 300, 400, generator=torch.Generator().manual_seed(0))
    boxes = [torch.tensor([box], dtype=torch.float32)]
    expected = crop_one_by_one([image], boxes, 64)
    torch.testing.assert_close(crop_regions([image], boxes, 64), expected, atol=1e-5, rtol=0)


def test_not_a_number_reads_inside_the_image():
    image = torch.ones(3, 30, 40)
    boxes = [torch.full((1, 4), math.nan), torch.full((1, 4), math.inf)]
    crops = crop_regions([image, image], boxes, 16)
    assert crops.isfinite().all()


def test_constant_image_and_exactly_zero_padding():
    image = torch.full((3, 100, 200), 50.0)
    wide, tall = [10.0, 10.0, 90.0, 50.0], [10.0, 10.0, 30.0, 90.0]
    crops = crop_regions(
        [image], [torch.tensor([wide, tall])], 64, mean=(10.0, 20.0, 30.0), std=(2.0, 3.0, 4.0)
    )
    content = torch.tensor([20.0, 10.0, 5.0]).view(3, 1, 1)
    torch.testing.assert_close(crops[0, :, 16:48], content.expand(3, 32, 64))
    torch.testing.assert_close(crops[1, :, :, 24:40], content.expand(3, 64, 16))
    assert (crops[0, :, :16] == 0).all()
    assert (crops[0, :, 48:] == 0).all()
    assert (crops[1, :, :, :24] == 0).all()
    assert (crops[1, :, :, 40:] == 0).all()


@pytest.mark.gpu
def test_gpu_equals_cpu():
    generator = torch.Generator().manual_seed(6)
    image = torch.rand(3, 800, 1333, generator=generator)
    boxes = random_boxes(100, 800, 1333, generator)
    on_gpu = crop_regions([image.cuda()], [boxes.cuda()], 224, 1.5)
    torch.testing.assert_close(
        on_gpu.cpu(), crop_regions([image], [boxes], 224, 1.5), atol=1e-4, rtol=0
    )
