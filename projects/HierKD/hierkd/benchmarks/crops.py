"""Cutting regions out for CLIP: a loop over the boxes, this project's ways, and looser resamplers.

Two sizes: 450 boxes of 8 images of 800 x 1088 to 224 x 224, as the paper trains, and 96 boxes of 16
images of 128 x 128 to 64 x 64, as the miniature does. The loop is the best plain one: every image
is normalised once, and each box sliced out, resized (bicubic, antialiased) and padded. What differs
from its pixels is stated inside the letterboxed content, and as the angle between the embeddings of
a ViT-B/32 with CLIP's initial weights.
"""

from __future__ import annotations

import math
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import roi_align

from hierkd.benchmarks.timing import Measurement, Report, measure, peak_memory, ratio
from hierkd.teachers.crops import crop_regions
from hierkd.teachers.teacher import CLIP_MEAN, CLIP_STD, import_clip

__all__ = ["add_arguments", "run"]

_CROP_SCALE = 1.5
_LOOP = "loop: slice, F.interpolate, pad"


@dataclass(frozen=True)
class _Task:
    """Raw images and boxes, and where the loop finds and puts each region."""

    name: str
    images: list[Tensor]  # (3, H, W) uint8
    boxes: list[Tensor]  # (P_i, 4)
    size: int  # side of the crops
    windows: list[list[tuple[int, int, int, int]]]  # per image: left, top, right, bottom

    @property
    def placements(self) -> list[tuple[int, int, int, int]]:
        """Content of each crop: left, top, width, height."""
        return [_place(window, self.size) for windows in self.windows for window in windows]


def add_arguments(parser: ArgumentParser) -> None:
    """Add how much to cut."""
    parser.add_argument("--images", type=int, default=8, help="at 800 x 1088 (%(default)s)")
    parser.add_argument("--boxes", type=int, default=450, help="on those images (%(default)s)")
    parser.add_argument(
        "--encoded", type=int, default=16, metavar="N", help="crops to embed (%(default)s)"
    )


def run(args: Namespace, device: torch.device) -> Report:
    """Time every way on both sizes and compare the pixels.

    Args:
        args: of :func:`add_arguments`, and ``rounds``.
        device: where the images are.
    """
    for option in ("images", "boxes", "encoded"):
        if getattr(args, option) < 1:
            raise ValueError(f"--{option} must be at least 1, got {getattr(args, option)}")
    rounds = args.rounds or (20 if device.type == "cuda" else 5)
    tasks = [
        _random_task(args.images, args.boxes, (800, 1088), (32, 500), 224, device),
        _random_task(16, 96, (128, 128), (28, 70), 64, device),
    ]
    rows = [row for task in tasks for row in _rows(task, rounds, args.encoded, device)]
    return Report(
        "Regions cut out for CLIP",
        device,
        {"rounds": rounds, "crop scale": _CROP_SCALE, "crops embedded": args.encoded},
        rows,
        [
            "Errors are in units of the pixel range (255). 1 - cosine: the largest angle between "
            "embeddings of the loop's crop and this one; in the loop's row, for comparison, the "
            "smallest between its crops of two different boxes.",
            "uint8 rounds and clips like Pillow, that is, like CLIP's own preprocessing. "
            "roi_align and grid_sample are "
            "told where the letterboxed squares lie, and what they show around is blanked for the "
            "embedding.",
        ],
    )


def _random_task(
    num_images: int,
    num_boxes: int,
    shape: tuple[int, int],
    sides: tuple[int, int],
    size: int,
    device: torch.device,
) -> _Task:
    """Smooth pictures with noise, and boxes with log-uniform sides and centres anywhere."""
    generator = torch.Generator().manual_seed(0)
    height, width = shape
    coarse = torch.rand(num_images, 3, height // 16, width // 16, generator=generator)
    smooth = F.interpolate(coarse, shape, mode="bilinear")
    noisy = smooth + 0.1 * torch.randn(smooth.shape, generator=generator)
    images = (255 * noisy.clamp(0, 1)).round().to(torch.uint8)
    low, high = (math.log(side) for side in sides)
    extent = (torch.rand(num_boxes, 2, generator=generator) * (high - low) + low).exp()
    centre = torch.rand(num_boxes, 2, generator=generator) * torch.tensor([width, height])
    boxes = list(torch.cat([centre - extent / 2, centre + extent / 2], dim=1).chunk(num_images))
    boxes += [boxes[0][:0]] * (num_images - len(boxes))
    return _Task(
        f"{num_boxes} of {num_images} x {height} x {width} to {size}",
        list(images.to(device)),
        [each.to(device) for each in boxes],
        size,
        [[_window(box, height, width) for box in each.tolist()] for each in boxes],
    )


def _rows(task: _Task, rounds: int, encoded: int, device: torch.device) -> list[dict[str, Any]]:
    ways = _ways(task)
    times = measure(ways, device=device, rounds=rounds, progress=task.name)
    expected = ways[_LOOP]()
    inside = torch.zeros_like(expected, dtype=torch.bool)
    for mask, (left, top, width, height) in zip(inside, task.placements, strict=True):
        mask[:, top : top + height, left : left + width] = True
    deviation = torch.tensor(CLIP_STD, device=device).view(3, 1, 1)
    embed = _random_vit(task.size, device)
    reference = embed(expected[:encoded])
    rows = []
    for name, call in ways.items():
        crops = call()
        error = ((crops - expected).abs() * deviation)[inside]
        if name == _LOOP:
            others = (reference @ reference.T).fill_diagonal_(-1).max()
            angle = 1 - float(others) if len(reference) > 1 else None
        else:
            letterboxed = crops[:encoded] * inside[:encoded]
            angle = 1 - float((embed(letterboxed) * reference).sum(dim=1).min())
        del crops
        rows.append(
            {
                "boxes": task.name,
                "way": name,
                **_costs(times[name], times[_LOOP], call, device),
                "max error": float(error.max()),
                "mean error": float(error.mean()),
                "1 - cosine": angle,
            }
        )
    return rows


def _costs(
    mine: Measurement, loop: Measurement, call: Callable[[], object], device: torch.device
) -> dict[str, float]:
    return {
        "seconds": mine.median,
        "over the loop": ratio(mine, loop),
        "peak MiB": peak_memory(call, device),
    }


def _ways(task: _Task) -> dict[str, Callable[[], Tensor]]:
    ours = partial(
        crop_regions,
        task.images,
        task.boxes,
        task.size,
        _CROP_SCALE,
        [255 * value for value in CLIP_MEAN],
        [255 * value for value in CLIP_STD],
    )
    squares = _squares(task)
    return {
        _LOOP: partial(_loop, task),
        "crop_regions": ours,
        "crop_regions, one by one": partial(ours, batched=False),
        "crop_regions, together": partial(ours, batched=True),
        "loop in uint8": partial(_loop, task, in_uint8=True),
        "roi_align": partial(_roi_align, task, squares),
        "grid_sample": partial(_grid_sample, task, squares),
    }


# --- the alternatives -----------------------------------------------------------------------------


def _normalise(pixels: Tensor) -> Tensor:
    mean = torch.tensor(CLIP_MEAN, device=pixels.device).view(3, 1, 1) * 255
    std = torch.tensor(CLIP_STD, device=pixels.device).view(3, 1, 1) * 255
    return (pixels - mean).div_(std)


def _window(box: list[float], height: int, width: int) -> tuple[int, int, int, int]:
    """A box widened, clipped and grown to whole pixels: left, top, right, bottom."""
    half = [(box[2] - box[0]) / 2 * _CROP_SCALE, (box[3] - box[1]) / 2 * _CROP_SCALE]
    centre = [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2]
    left, top = (max(math.floor(c - h), 0) for c, h in zip(centre, half, strict=True))
    right, bottom = (math.ceil(c + h) for c, h in zip(centre, half, strict=True))
    return left, top, min(right, width), min(bottom, height)


def _place(window: tuple[int, int, int, int], size: int) -> tuple[int, int, int, int]:
    left, top, right, bottom = window
    longest = max(right - left, bottom - top)
    width = max(1, math.floor((right - left) * size / longest + 0.5))
    height = max(1, math.floor((bottom - top) * size / longest + 0.5))
    return (size - width) // 2, (size - height) // 2, width, height


def _loop(task: _Task, in_uint8: bool = False) -> Tensor:
    crops = []
    size = task.size
    for image, windows in zip(task.images, task.windows, strict=True):
        pixels = image if in_uint8 else _normalise(image)
        for window in windows:
            before, above, width, height = _place(window, size)
            left, top, right, bottom = window
            region = F.interpolate(
                pixels[None, :, top:bottom, left:right],
                (height, width),
                mode="bicubic",
                antialias=True,
            )[0]
            if in_uint8:
                region = _normalise(region)
            margins = (before, size - width - before, above, size - height - above)
            crops.append(F.pad(region, margins))
    return torch.stack(crops)


def _squares(task: _Task) -> list[Tensor]:
    """The squares of the images that the crops show, padding included: (P_i, 4) XYXY."""
    squares = []
    for windows in task.windows:
        rows = []
        for window in windows:
            left, top, right, bottom = window
            before, above, width, height = _place(window, task.size)
            step_x, step_y = (right - left) / width, (bottom - top) / height
            x, y = left - before * step_x, top - above * step_y
            rows.append([x, y, x + task.size * step_x, y + task.size * step_y])
        squares.append(torch.tensor(rows, device=task.images[0].device).view(-1, 4))
    return squares


def _roi_align(task: _Task, squares: list[Tensor]) -> Tensor:
    images = _normalise(torch.stack(task.images))
    crops: Tensor = roi_align(images, squares, task.size, aligned=True)
    return crops


def _grid_sample(task: _Task, squares: list[Tensor]) -> Tensor:
    size = task.size
    crops = []
    for image, of_image in zip(task.images, squares, strict=True):
        height, width = image.shape[1:]
        position = (torch.arange(size, device=image.device) + 0.5) / size
        x = of_image[:, :1] + (of_image[:, 2:3] - of_image[:, :1]) * position
        y = of_image[:, 1:2] + (of_image[:, 3:] - of_image[:, 1:2]) * position
        shape = (len(of_image), size, size)
        grid = torch.stack(
            [
                (2 * x / width - 1)[:, None, :].expand(shape),
                (2 * y / height - 1)[:, :, None].expand(shape),
            ],
            dim=-1,
        )
        sampled = F.grid_sample(
            _normalise(image)[None], grid.reshape(1, -1, size, 2), align_corners=False
        )
        crops.append(sampled.view(3, len(of_image), size, size).transpose(0, 1))
    return torch.cat(crops)


def _random_vit(
    size: int, device: torch.device, width: int = 768, layers: int = 12
) -> Callable[[Tensor], Tensor]:
    """Normalised embeddings by a ViT-B/32 of this input size, with CLIP's initial weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vit = import_clip().model.VisionTransformer(size, 32, width, layers, width // 64, 512)
    vit = vit.eval().to(device)

    def embed(crops: Tensor) -> Tensor:
        with torch.inference_mode():
            return F.normalize(vit(crops), dim=1)

    return embed
