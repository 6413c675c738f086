"""Cut regions out of images, ready for an image encoder (paper §3.2).

Letters: N images · P regions · S side of the square output. Boxes are XYXY in absolute pixels of
the raw, unpadded image; pixel i covers [i, i + 1).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["crop_regions"]


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
    """
    crops = torch.zeros((sum(map(len, boxes)), 3, size, size), device=images[0].device)
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
    boxes = boxes.float()
    limit = torch.tensor([width, height], device=boxes.device)
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    half = (boxes[:, 2:] - boxes[:, :2]) * (scale / 2)
    low = torch.minimum((centre - half).clamp(min=0), limit.float())
    high = torch.minimum((centre + half).clamp(min=0), limit.float())
    # Clamping the integers again keeps a NaN from reading outside of the image.
    low = torch.minimum(low.floor().long().clamp(min=0), limit - 1)
    high = torch.minimum(torch.maximum(high.ceil().long(), low + 1), limit)
    return torch.cat([low, high], dim=1)


def _resize(region: Tensor, height: int, width: int) -> Tensor:
    """Antialiased bicubic resize of a region (1, 3, h, w)."""
    if width == 1 < height:
        # PyTorch, 2.15 at least, returns wrong values for one column, but not for one row.
        return _resize(region.mT, 1, height).mT
    return F.interpolate(region, (height, width), mode="bicubic", antialias=True)
