"""Cut all regions of a batch out of their images, ready for an image encoder (paper §3.2).

Every region is widened about its centre, clipped to its image, resized so that its long side fills
a square, and letterboxed with zeros.  The result of one region is what slicing it out, calling
``F.interpolate(mode="bicubic", antialias=True)`` and padding would give.

There are two ways to it. On a CPU one region follows the other, through ``F.interpolate`` itself:
its kernel is near the floor, and what is saved are the passes around it. On a GPU, which a loop
leaves waiting for Python, all regions of all images go through the same few tensor operations:
resizing is separable and linear: ``crop = A_y @ window @ A_x^T`` with one banded matrix per side.
A block of neighbouring output rows reads only a short run of input rows, so the vertical product is
taken per block on just those rows; the horizontal product is one dense batched matrix product.

Letters:
    P regions · n regions of one group · S side of the square output · T taps of an output pixel ·
    B blocks of output rows · k input rows a block reads · w input columns read.
Boxes are XYXY in absolute pixels of the raw, unpadded image; pixel i covers [i, i + 1).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["crop_regions", "expand_boxes"]

# Output rows resized by one small matrix product. [ours] Larger blocks multiply more zeros, smaller
# ones copy more input rows twice; 16 and 32 were alike on a CPU, 56 up to 18 % slower.
_ROWS_PER_BLOCK = 32
# Output pixels (S x S each) of the regions resized together: bounds the memory, not the result.
# [ours] Measured on a CPU: 2 crops of 224 x 224, whose intermediate values stay in its caches, take
# 0.9 times as long as 4, and 4 about half as long as 16; at S = 64, 8 to 16 crops are best.  The
# figure for a GPU, where fewer and larger operations matter more, is not measured.
_GROUP_PIXELS_CPU = 2 * 224 * 224
_GROUP_PIXELS_GPU = 64 * 224 * 224


def expand_boxes(boxes: Tensor, scale: float, image_sizes: Tensor) -> Tensor:
    """Scale boxes about their centres and clip them to their images.

    Args:
        boxes: (P, 4) XYXY, absolute pixels.
        scale: factor on width and height; 1.5 in the paper (§3.2, Table 2), 1.0 keeps the box.
        image_sizes: (2,) or (P, 2), height and width of each box's image in pixels.

    Returns:
        (P, 4) XYXY; a box that lies outside its image becomes an empty one on the border.
    """
    if scale <= 0:
        raise ValueError(f"the crop scale must be positive, found {scale}")
    sizes = image_sizes.to(boxes).expand(len(boxes), 2)
    limit = sizes.flip(-1)
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
    *,
    batched: bool | None = None,
) -> Tensor:
    """Crop, resize and letterbox regions of several images.

    A region is the box times `scale` about its centre, clipped to the image, grown to whole pixels.
    The long side becomes `size`, the short side keeps the aspect ratio (at least one pixel) and is
    centred; where the margin is odd, the extra pixel is on the right or at the bottom.  Padding is
    exactly zero *after* normalisation.  An empty region, or one outside the image, yields the
    nearest pixels of the image.

    Args:
        images: N images (3, H_i, W_i) of any dtype on one device, without padding.
        boxes: N tensors (P_i, 4), XYXY in absolute pixels of the image of the same index.
        size: side S of the crops, in pixels.
        scale: factor on width and height of each box before clipping.
        mean: per channel, in the unit of the images; subtracted.
        std: per channel, in the unit of the images; divided by.
        batched: whether the regions are resized together or one after the other; by default
            together unless on a CPU, each the faster there.  The results are equal up to rounding.

    Returns:
        (P, 3, S, S) float32, P = sum of P_i, in the order of the images, then of the boxes.

    Raises:
        ValueError: numbers of images and box tensors differ, or a tensor has another shape.
    """
    _check_inputs(images, boxes, size)
    if sum(map(len, boxes)) == 0:
        device = images[0].device if images else None
        return torch.zeros((0, 3, size, size), device=device)
    # Pixels keep float32 also where the caller trains in mixed precision.
    with torch.autocast(images[0].device.type, enabled=False):
        windows = _whole_pixel_windows(images, boxes, size, scale)
        if batched is None:
            batched = images[0].device.type != "cpu"
        crop = _crop_together if batched else _crop_one_by_one
        return crop(images, windows, size, mean, std)


class _Windows(NamedTuple):
    """Where each region lies, alone and in the flattened images; int64 vectors (P,)."""

    image: Tensor  # index of the image
    top: Tensor  # first row of the region
    left: Tensor  # first column of the region
    height: Tensor  # rows of the region
    width: Tensor  # columns of the region
    content_height: Tensor  # rows of the resized region inside the square
    content_width: Tensor  # columns of the resized region inside the square
    first: Tensor  # index of the region's top left pixel, channel 0, in the flattened images
    image_width: Tensor  # distance between rows
    image_area: Tensor  # distance between channels


class _Group(NamedTuple):
    """Regions of similar shape that are resized together; the numbers are maxima over them."""

    members: Tensor  # (n,) int64 indices of the regions
    rows: int  # input rows read by one block of output rows
    columns: int  # input columns
    taps: int  # inputs read by one output, along either side
    content_height: int  # rows of the square that hold content, about its middle
    content_width: int  # columns of the square that hold content, about its middle


def _check_inputs(images: Sequence[Tensor], boxes: Sequence[Tensor], size: int) -> None:
    if len(images) != len(boxes):
        raise ValueError(f"found {len(images)} images but {len(boxes)} tensors of boxes")
    if size < 1:
        raise ValueError(f"the crop size must be at least 1 pixel, found {size}")
    for index, (image, image_boxes) in enumerate(zip(images, boxes, strict=True)):
        if image.dim() != 3 or image.shape[0] != 3 or image.numel() == 0:
            raise ValueError(f"image {index}: expected (3, H, W), found {tuple(image.shape)}")
        if image_boxes.dim() != 2 or image_boxes.shape[1] != 4:
            raise ValueError(f"boxes {index}: expected (P, 4), found {tuple(image_boxes.shape)}")


def _statistics(
    mean: Sequence[float], std: Sequence[float], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Mean and deviation as (3, 1, 1) each."""
    return (
        torch.tensor(mean, dtype=torch.float32, device=device).view(3, 1, 1),
        torch.tensor(std, dtype=torch.float32, device=device).view(3, 1, 1),
    )


def _crop_one_by_one(
    images: Sequence[Tensor],
    windows: _Windows,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """Resize one region after the other, each into its place in the zeros."""
    shift, spread = _statistics(mean, std, images[0].device)
    # Normalise an image as a whole if its regions, which may overlap, have more pixels together.
    areas = windows.height.new_zeros(len(images))
    areas.index_add_(0, windows.image, windows.height * windows.width)
    as_a_whole = [
        area > image[0].numel() for area, image in zip(areas.tolist(), images, strict=True)
    ]
    pixels = [
        (image - shift).div_(spread) if whole else image
        for image, whole in zip(images, as_a_whole, strict=True)
    ]
    crops = shift.new_zeros((len(windows.image), 3, size, size))
    # The first seven fields: where each region is, and how large it becomes.
    rows = torch.stack(windows[:7], dim=1).tolist()
    for crop, (index, top, left, height, width, *content) in zip(crops, rows, strict=True):
        region = pixels[index][None, :, top : top + height, left : left + width]
        if not as_a_whole[index]:
            region = (region - shift).div_(spread)
        above, before = (size - content[0]) // 2, (size - content[1]) // 2
        place = crop[:, above : above + content[0], before : before + content[1]]
        place.copy_(_resize(region.float(), content)[0])
    return crops


def _resize(region: Tensor, shape: list[int]) -> Tensor:
    """Antialiased bicubic resize of a region (1, 3, h, w) to (1, 3, *shape)."""
    if shape[1] == 1 < shape[0]:
        # PyTorch, 2.15 at least, returns wrong values for one column, but not for one row.
        return _resize(region.mT, [1, shape[0]]).mT
    return F.interpolate(region, shape, mode="bicubic", antialias=True)


def _crop_together(
    images: Sequence[Tensor],
    windows: _Windows,
    size: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> Tensor:
    """Resize the regions in groups of similar shape."""
    source = _flatten_images(images, mean, std)
    crops = source.new_zeros((len(windows.image), 3, size, size))
    groups = _groups(windows, size)
    # Of all regions at once: these are many small operations, of which a group then needs no more.
    taps = max(group.taps for group in groups)
    rows, columns = (
        _bicubic_taps(extent, content, (size - content) // 2, size + _ROWS_PER_BLOCK, taps)
        for extent, content in [
            (windows.height, windows.content_height),
            (windows.width, windows.content_width),
        ]
    )
    for group in groups:
        top, left = (size - group.content_height) // 2, (size - group.content_width) // 2
        bottom, right = top + group.content_height, left + group.content_width
        blocks = -(-group.content_height // _ROWS_PER_BLOCK)
        content = _resize_group(
            source,
            windows,
            group,
            _part_of_taps(rows, group, top, blocks * _ROWS_PER_BLOCK),
            _part_of_taps(columns, group, left, group.content_width),
        )
        crops[group.members, :, top:bottom, left:right] = content
    return crops


def _flatten_images(
    images: Sequence[Tensor], mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """Normalise the images and lay them end to end, followed by zeros for reads past the end."""
    widest = max(image.shape[-1] for image in images)
    device = images[0].device
    flat = torch.zeros(sum(image.numel() for image in images) + widest, device=device)
    shift, spread = _statistics(mean, std, device)
    start = 0
    for image in images:
        place = flat[start : start + image.numel()].view(image.shape)
        torch.sub(image.float(), shift, out=place).div_(spread)
        start += image.numel()
    return flat


def _whole_pixel_windows(
    images: Sequence[Tensor], boxes: Sequence[Tensor], size: int, scale: float
) -> _Windows:
    """Expand, clip and round all boxes outwards to whole pixels, at least one each way."""
    device = images[0].device
    counts = torch.tensor([len(b) for b in boxes])
    starts = torch.tensor([0, *(image.numel() for image in images[:-1])]).cumsum(0)
    shapes = torch.tensor([[*image.shape[1:]] for image in images])
    layout = torch.cat([torch.arange(len(images))[:, None], shapes, starts[:, None]], dim=1)
    layout = layout.repeat_interleave(counts, dim=0).to(device)
    index, image_height, image_width, image_start = layout.unbind(1)

    merged = torch.cat([b.to(device=device, dtype=torch.float32) for b in boxes])
    expanded = expand_boxes(merged, scale, torch.stack([image_height, image_width], dim=1))
    # Clamping the integers again also keeps a NaN from reading outside the image.
    left = torch.minimum(expanded[:, 0].floor().long().clamp(min=0), image_width - 1)
    top = torch.minimum(expanded[:, 1].floor().long().clamp(min=0), image_height - 1)
    right = torch.minimum(torch.maximum(expanded[:, 2].ceil().long(), left + 1), image_width)
    bottom = torch.minimum(torch.maximum(expanded[:, 3].ceil().long(), top + 1), image_height)
    height, width = bottom - top, right - left
    longest = torch.maximum(height, width)
    return _Windows(
        image=index,
        top=top,
        left=left,
        height=height,
        width=width,
        # Round to nearest in integers: the same on every device.
        content_height=((2 * height * size + longest) // (2 * longest)).clamp(min=1),
        content_width=((2 * width * size + longest) // (2 * longest)).clamp(min=1),
        first=image_start + top * image_width + left,
        image_width=image_width,
        image_area=image_height * image_width,
    )


def _groups(windows: _Windows, size: int) -> list[_Group]:
    """Split the regions into groups of similar shape; waits for the device once."""
    on_cpu = windows.width.device.type == "cpu"
    limit = max(1, (_GROUP_PIXELS_CPU if on_cpu else _GROUP_PIXELS_GPU) // size**2)
    row_step = windows.height / windows.content_height
    row_taps = _count_taps(windows.height, windows.content_height)
    block = windows.content_height.clamp(max=_ROWS_PER_BLOCK)
    # From the first input of a block's first output row to the last input of its last.
    rows = ((block - 1) * row_step).ceil().long() + row_taps + 1
    rows = torch.minimum(rows, windows.height)
    taps = torch.maximum(row_taps, _count_taps(windows.width, windows.content_width))
    extents = torch.stack(
        [rows, windows.width, taps, windows.content_height, windows.content_width], dim=1
    )
    # By blocks of content, then by width: what a group computes for nothing stays small.
    blocks = (windows.content_height - 1) // _ROWS_PER_BLOCK
    order = (blocks * (windows.width.max() + 1) + windows.width).argsort()
    members = torch.split(order, limit)
    maxima = torch.stack([extents[group].amax(0) for group in members]).tolist()
    return [_Group(group, *numbers) for group, numbers in zip(members, maxima, strict=True)]


def _part_of_taps(
    table: tuple[Tensor, Tensor], group: _Group, start: int, outputs: int
) -> tuple[Tensor, Tensor]:
    """Rows of a group and outputs start, start + 1, ... of what :func:`_bicubic_taps` gives."""
    first, weights = (part[group.members, start : start + outputs] for part in table)
    return first, weights[..., : group.taps]


def _resize_group(
    source: Tensor,
    windows: _Windows,
    group: _Group,
    row_taps: tuple[Tensor, Tensor],
    column_taps: tuple[Tensor, Tensor],
) -> Tensor:
    """Resize n regions and letterbox them up to the largest content of the group.

    Returns:
        (n, 3, content_height, content_width) of the group: the middle of the square crops.
    """
    windows = _Windows(*(field[group.members] for field in windows))
    n, rows, columns = len(group.members), group.rows, group.columns
    first, weights = row_taps
    padded = first.shape[1]
    blocks = padded // _ROWS_PER_BLOCK
    block_first = first[:, ::_ROWS_PER_BLOCK]  # (n, B)
    within_block = first - block_first.repeat_interleave(_ROWS_PER_BLOCK, dim=1)
    row_weights = _scatter_taps(within_block, weights, rows).view(n * blocks, _ROWS_PER_BLOCK, rows)
    column_weights = _scatter_taps(*column_taps, columns)

    # Where each run of w pixels starts: (n, B, 3, k).  Rows past the region have weight zero.
    row = block_first[..., None] + torch.arange(rows, device=source.device)
    row = torch.minimum(row, windows.height[:, None, None] - 1)
    channel = windows.image_area[:, None] * torch.arange(3, device=source.device)
    starts = windows.first[:, None, None] + row * windows.image_width[:, None, None]
    starts = starts[:, :, None, :] + channel[:, None, :, None]
    # A view in which row i is source[i : i + w]; index_select copies only the rows asked for.
    runs = source.as_strided((len(source) - columns + 1, columns), (1, 1))
    read = runs.index_select(0, starts.flatten()).view(n * blocks, 3, rows, columns)

    short = torch.matmul(row_weights[:, None], read)  # (n B, 3, rows per block, w)
    short = short.view(n, blocks * 3 * _ROWS_PER_BLOCK, columns)
    crops = torch.bmm(short, column_weights.transpose(1, 2))
    crops = crops.view(n, blocks, 3, _ROWS_PER_BLOCK, group.content_width).transpose(1, 2)
    return crops.reshape(n, 3, padded, group.content_width)[:, :, : group.content_height]


def _count_taps(extent: Tensor, content: Tensor) -> Tensor:
    """Upper bound on the inputs one output reads when `extent` inputs become `content` outputs."""
    taps = (4 * (extent / content).clamp(min=1)).floor().long() + 1
    return torch.minimum(taps, extent)


def _bicubic_taps(
    extent: Tensor, content: Tensor, offset: Tensor, outputs: int, taps: int
) -> tuple[Tensor, Tensor]:
    """Weights of an antialiased bicubic resize of `extent` inputs to `content` outputs.

    The filter is Keys' cubic with a = -0.5, stretched by the factor of reduction when reducing, cut
    off at the ends of the input and renormalised: as Pillow and ``F.interpolate(antialias=True)``.

    Args:
        extent: (n,) number of inputs.
        content: (n,) number of outputs with content.
        offset: (n,) index of the first output with content.
        outputs: number of outputs to compute; those outside the content are zero.
        taps: T, at least the number of inputs that one output reads.

    Returns:
        first: (n, outputs) int64, first input that each output reads; never decreasing.
        weights: (n, outputs, T), of the inputs first, first + 1, ...; zero past the end.
    """
    device = extent.device
    step = (extent / content)[:, None]
    stretch = step.clamp(min=1)
    position = torch.arange(outputs, device=device) - offset[:, None]
    inside = (position >= 0) & (position < content[:, None])
    position = torch.minimum(position.clamp(min=0), content[:, None] - 1)
    centre = (position + 0.5) * step
    first = (centre - 2 * stretch + 0.5).floor().long().clamp(min=0)

    tap = first[..., None] + torch.arange(taps, device=device)
    distance = ((tap + 0.5 - centre[..., None]) / stretch[..., None]).abs()
    weights = _cubic(distance) * (tap < extent[:, None, None])
    weights = weights / weights.sum(-1, keepdim=True)
    return first, weights * inside[..., None]


def _cubic(distance: Tensor) -> Tensor:
    """Keys' cubic convolution kernel, a = -0.5 (Keys 1981, Eq. 15), of distances >= 0."""
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    return torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))


def _scatter_taps(first: Tensor, weights: Tensor, inputs: int) -> Tensor:
    """Place (n, outputs, T) weights at columns first, first + 1, ... of (n, outputs, inputs)."""
    n, outputs, taps = weights.shape
    matrix = weights.new_zeros((n, outputs, inputs + taps))
    columns = first[..., None] + torch.arange(taps, device=first.device)
    matrix.scatter_(2, columns.clamp(max=inputs + taps - 1), weights)
    return matrix[..., :inputs].contiguous()
