"""Cut regions out of images, ready for an image encoder (paper §3.2).

Letters: N images · P regions · S side of the square output. Boxes are XYXY in absolute pixels of
the raw, unpadded image; pixel i covers [i, i + 1).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["crop_regions", "expand_boxes"]


def expand_boxes(boxes: Tensor, scale: float, image_sizes: Tensor) -> Tensor:
    """Scale boxes about their centres and clip them to their images.

    Args:
        boxes: (P, 4) XYXY, absolute pixels.
        scale: factor on width and height; 1.5 in the paper's Table 2, 1.0 keeps the box.
        image_sizes: (2,) or (P, 2), height and width of each box's image in pixels.

    Returns:
        (P, 4) XYXY; a box that lies outside its image becomes an empty one on the border.
    """
    if scale <= 0:
        raise ValueError(f"the crop scale must be positive, found {scale}")
    limit = image_sizes.to(boxes).expand(len(boxes), 2).flip(-1)
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    half = (boxes[:, 2:] - boxes[:, :2]) * (scale / 2)
    low = torch.minimum((centre - half).clamp(min=0), limit)
    high = torch.minimum((centre + half).clamp(min=0), limit)
    return torch.cat([low, high], dim=1)


@torch.no_grad()
def crop_regions(
    images: Sequence[Tensor],
    boxes: Sequence[Tensor],
    size: int,
    scale: float = 1.0,
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    std: Sequence[float] = (1.0, 1.0, 1.0),
) -> Tensor:
    """Crop, resize and letterbox regions of several images.

    A region is the box times ``scale`` about its centre, clipped to the image, grown to whole
    pixels. Its long side becomes S, the short side keeps the aspect ratio (at least one pixel) and
    is centred; where the margin is odd, the extra pixel is on the right or at the bottom. Padding
    is exactly zero *after* normalisation. An empty region, or one outside the image, yields the
    nearest pixels of the image.

    Args:
        images: N images (3, H_i, W_i) of any dtype on one device, without padding.
        boxes: N tensors (P_i, 4), XYXY in absolute pixels of the image of the same index.
        size: side S of the crops, in pixels.
        scale: factor on width and height of each box before clipping.
        mean: per channel, in the unit of the images; subtracted.
        std: per channel, in the unit of the images; divided by.

    Returns:
        (P, 3, S, S) float32, P = sum of P_i, in the order of the images, then of the boxes.

    Raises:
        ValueError: numbers of images and box tensors differ, or a tensor has another shape.
    """
    _check_inputs(images, boxes, size)
    device = images[0].device if images else None
    crops = torch.zeros((sum(map(len, boxes)), 3, size, size), device=device)
    if len(crops) == 0:
        return crops
    shift, spread = crops.new_tensor(mean).view(3, 1, 1), crops.new_tensor(std).view(3, 1, 1)
    owners = [index for index, of_image in enumerate(boxes) for _ in range(len(of_image))]
    # Pixels keep float32 also where the caller trains in mixed precision.
    with torch.autocast(crops.device.type, enabled=False):
        pairs = zip(images, boxes, strict=True)
        windows = torch.cat([_windows(box, scale, *image.shape[1:]) for image, box in pairs])
        # All boxes come to the host in one transfer: a GPU does not wait for each.
        places = zip(crops, owners, windows.tolist(), strict=True)
        for crop, index, (left, top, right, bottom) in places:
            region = (images[index][:, top:bottom, left:right] - shift).div_(spread).float()
            longest = max(region.shape[1:])
            height, width = (
                max((2 * side * size + longest) // (2 * longest), 1) for side in region.shape[1:]
            )
            y, x = (size - height) // 2, (size - width) // 2
            crop[:, y : y + height, x : x + width] = _resize(region[None], height, width)[0]
    return crops


def _windows(boxes: Tensor, scale: float, height: int, width: int) -> Tensor:
    """(P, 4) whole pixels left, top, right, bottom of the regions, at least one pixel each way."""
    limit = torch.tensor([width, height], device=boxes.device)
    expanded = expand_boxes(boxes.float(), scale, limit.flip(0))
    # Clamping the integers again keeps a NaN from reading outside of the image.
    low = torch.minimum(expanded[:, :2].floor().long().clamp(min=0), limit - 1)
    high = torch.minimum(torch.maximum(expanded[:, 2:].ceil().long(), low + 1), limit)
    return torch.cat([low, high], dim=1)


def _resize(region: Tensor, height: int, width: int) -> Tensor:
    """Antialiased bicubic resize of a region (1, 3, h, w)."""
    if width == 1 < height:
        # PyTorch, 2.15 at least, returns wrong values for one column, but not for one row.
        return _resize(region.mT, 1, height).mT
    return F.interpolate(region, (height, width), mode="bicubic", antialias=True)


def _check_inputs(images: Sequence[Tensor], boxes: Sequence[Tensor], size: int) -> None:
    if len(images) != len(boxes):
        raise ValueError(f"found {len(images)} images but {len(boxes)} tensors of boxes")
    if size < 1:
        raise ValueError(f"the crop size must be at least 1 pixel, found {size}")
    for index, (image, of_image) in enumerate(zip(images, boxes, strict=True)):
        if image.dim() != 3 or image.shape[0] != 3 or image.numel() == 0:
            raise ValueError(f"image {index}: expected (3, H, W), found {tuple(image.shape)}")
        if of_image.dim() != 2 or of_image.shape[1] != 4:
            raise ValueError(f"boxes {index}: expected (P, 4), found {tuple(of_image.shape)}")
