import math

import pytest
import torch
from torch.nn import functional as F

from hierkd.teachers.crops import crop_regions, expand_boxes


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


@pytest.mark.parametrize(
    "box", [[500, 10, 600, 50], [-90, -90, -10, -10], [0, 900, 50, 990], [9, 9, 3, 3]]
)
def test_box_outside_the_image_gives_its_nearest_pixels(box):
    image = torch.rand(3, 30, 40, generator=torch.Generator().manual_seed(0))
    crops = crop_regions([image], [torch.tensor([box], dtype=torch.float32)], 16)
    assert crops.shape == (1, 3, 16, 16)
    assert crops.isfinite().all()
    assert crops.abs().sum() > 0


def test_not_a_number_reads_inside_the_image():
    image = torch.ones(3, 30, 40)
    boxes = [torch.full((1, 4), math.nan), torch.full((1, 4), math.inf)]
    crops = crop_regions([image, image], boxes, 16)
    assert crops.isfinite().all()


def test_crop_at_the_size_of_the_output_is_the_slice_itself():
    image = torch.randint(0, 256, (3, 80, 90), generator=torch.Generator().manual_seed(0))
    crops = crop_regions([image.to(torch.uint8)], [torch.tensor([[11, 20, 43, 52]])], 32)
    torch.testing.assert_close(crops[0], image[:, 20:52, 11:43].float(), atol=1e-3, rtol=0)


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


def test_shrinking_does_not_alias():
    # The finest checkerboard is grey at any smaller size; point sampling would keep it.
    y, x = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    image = (255.0 * ((x + y) % 2)).expand(3, 256, 256)
    crops = crop_regions([image], [torch.tensor([[0.0, 0.0, 256.0, 256.0]])], 32)
    torch.testing.assert_close(
        crops[..., 2:-2, 2:-2], torch.full((1, 3, 28, 28), 127.5), atol=1.0, rtol=0
    )


def test_neighbouring_image_does_not_leak_in():
    dark, bright = torch.zeros(3, 20, 30), torch.full((3, 40, 20), 255.0)
    whole = [torch.tensor([[0.0, 0.0, 30.0, 20.0]]), torch.tensor([[0.0, 0.0, 20.0, 40.0]])]
    crops = crop_regions([dark, bright], whole, 48, scale=1.5)
    assert (crops[0] == 0).all()
    torch.testing.assert_close(crops[1, :, :, 12:36], torch.full((3, 48, 24), 255.0))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float16, torch.float64])
def test_any_type_of_pixels(dtype):
    generator = torch.Generator().manual_seed(7)
    image = torch.randint(0, 256, (3, 50, 70), generator=generator)
    boxes = [random_boxes(12, 50, 70, generator)]
    statistics = (120.0, 110.0, 100.0), (70.0, 60.0, 65.0)
    crops = crop_regions([image.to(dtype)], boxes, 24, 1.5, *statistics)
    assert crops.dtype == torch.float32
    expected = crop_one_by_one([image], boxes, 24, 1.5, *statistics)
    torch.testing.assert_close(crops, expected, atol=1e-5, rtol=0)


def test_no_boxes():
    image = torch.rand(3, 20, 20)
    assert crop_regions([image], [torch.zeros(0, 4)], 8).shape == (0, 3, 8, 8)
    assert crop_regions([], [], 8).shape == (0, 3, 8, 8)


def test_no_gradient_flows():
    image = torch.rand(3, 20, 20, requires_grad=True)
    box = torch.tensor([[2.0, 2.0, 15.0, 15.0]], requires_grad=True)
    crops = crop_regions([image], [box], 8)
    assert not crops.requires_grad
    assert not crops.is_inference()


def test_wrong_input_is_refused():
    image, box = torch.rand(3, 20, 20), torch.zeros(1, 4)
    with pytest.raises(ValueError, match="2 images but 1 tensors of boxes"):
        crop_regions([image, image], [box], 8)
    with pytest.raises(ValueError, match=r"expected \(3, H, W\), found \(1, 20, 20\)"):
        crop_regions([image[:1]], [box], 8)
    with pytest.raises(ValueError, match=r"expected \(P, 4\), found \(1, 5\)"):
        crop_regions([image], [torch.zeros(1, 5)], 8)
    with pytest.raises(ValueError, match="at least 1 pixel, found 0"):
        crop_regions([image], [box], 0)
    with pytest.raises(ValueError, match="must be positive, found 0"):
        crop_regions([image], [box], 8, scale=0)


def test_expand_boxes_by_hand():
    boxes = torch.tensor(
        [[40.0, 20.0, 60.0, 40.0], [0.0, 0.0, 20.0, 10.0], [90.0, 45.0, 99.0, 49.0]]
    )
    expanded = expand_boxes(boxes, 1.5, torch.tensor([50, 100]))
    expected = [[35.0, 15.0, 65.0, 45.0], [0.0, 0.0, 25.0, 12.5], [87.75, 44.0, 100.0, 50.0]]
    assert expanded.tolist() == expected
    per_box = expand_boxes(boxes[:2], 1.5, torch.tensor([[42, 62], [12, 100]]))
    assert per_box.tolist() == [[35.0, 15.0, 62.0, 42.0], [0.0, 0.0, 25.0, 12.0]]


@pytest.mark.gpu
def test_gpu_equals_cpu():
    generator = torch.Generator().manual_seed(6)
    image = torch.rand(3, 300, 400, generator=generator)
    boxes = random_boxes(100, 300, 400, generator)
    on_gpu = crop_regions([image.cuda()], [boxes.cuda()], 224, 1.5)
    torch.testing.assert_close(
        on_gpu.cpu(), crop_regions([image], [boxes], 224, 1.5), atol=1e-4, rtol=0
    )
