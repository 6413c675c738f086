"""The training loader: images per second, where the time goes, and detectron2's own beside it.

Random JPEG pictures in a temporary folder, with boxes and captions, read as in training: decoded,
resized, flipped, with one caption drawn. The loader that resumes anywhere seeds every sample by
itself; detectron2's does not, and draws no caption. Both get the same batch size and workers.
"""

from __future__ import annotations

import contextlib
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetMapper, build_detection_train_loader, detection_utils
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from PIL import Image

from hierkd.benchmarks.timing import Measurement, Report, measure, ratio
from hierkd.data.loader import build_resumable_train_loader, seeded_rng
from hierkd.data.mapper import HierKDDatasetMapper

__all__ = ["add_arguments", "random_pictures", "run"]

_CPU = torch.device("cpu")
_BATCH = 8
_BOXES = 7  # per picture, as in COCO
_CAPTIONS = 5


def add_arguments(parser: ArgumentParser) -> None:
    """Add the pictures, their size in the network and the numbers of workers."""
    parser.add_argument("--pictures", type=int, default=32, help="default: %(default)s")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        default=(480, 640),
        metavar=("HEIGHT", "WIDTH"),
        help="of the stored pictures; default: 480 640",
    )
    parser.add_argument(
        "--short-side", type=int, help="of the network input; default: 800 with a GPU, else 400"
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="default: 0 2")
    parser.add_argument("--batches", type=int, default=4, help="per round; default: %(default)s")


def run(args: Namespace, device: torch.device) -> Report:
    """Time the loader, its parts, and detectron2's.

    Args:
        args: of :func:`add_arguments`, and ``rounds``.
        device: says how large the input is; loading runs on the CPU.

    Raises:
        ValueError: a number is out of range.
    """
    numbers = (args.pictures, *args.size, args.batches)
    if min(numbers) < 1 or min(args.workers) < 0:
        raise ValueError(
            "pictures, sizes and batches must be positive and workers not negative, got "
            f"{numbers} and {args.workers}"
        )
    short_side = args.short_side or (800 if device.type == "cuda" else 400)
    rounds = args.rounds or 5
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        records = random_pictures(Path(folder), args.pictures, (args.size[0], args.size[1]))
        for workers in args.workers:
            with _loaders(records, short_side, workers) as loaders:
                calls = {name: _drawer(batches, args.batches) for name, batches in loaders.items()}
                times = measure(calls, device=_CPU, rounds=rounds)
            images = _BATCH * args.batches
            rows += _rows(times, "detectron2", images, f"loader, {workers} workers")
        parts = _parts(records, short_side)
        times = measure(parts, device=_CPU, rounds=rounds)
        rows += _rows(times, "one whole sample", len(records), "part, in this process")
    return Report(
        "The training loader",
        _CPU,
        {
            "pictures": args.pictures,
            "stored size": "{} x {}".format(*args.size),
            "short side of the input": short_side,
            "batch": _BATCH,
            "rounds": rounds,
        },
        rows,
        [
            "A row is compared with detectron2's loader, or a part with the whole sample. "
            "Parts overlap with nothing and need not sum to one: what is left is bookkeeping."
        ],
    )


def random_pictures(folder: Path, number: int, size: tuple[int, int]) -> list[dict[str, Any]]:
    """Write JPEG pictures of soft random colours, which compress about as photographs do.

    Args:
        folder: Where.
        number: How many.
        size: Their height and width.

    Returns:
        detectron2 dataset dicts with boxes and captions.
    """
    rng = np.random.default_rng(0)
    height, width = size
    records = []
    for index in range(number):
        coarse = rng.integers(0, 256, (max(1, height // 8), max(1, width // 8), 3), np.uint8)
        soft = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
        noisy = soft + rng.normal(scale=6, size=soft.shape)
        path = folder / f"{index}.jpg"
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)
        corners = rng.uniform(0, 0.5, size=(_BOXES, 2)) * (width, height)
        sides = rng.uniform(0.1, 0.5, size=(_BOXES, 2)) * (width, height)
        records.append(
            {
                "file_name": str(path),
                "image_id": index,
                "height": height,
                "width": width,
                "captions": [f"caption {k} of picture {index}." for k in range(_CAPTIONS)],
                "annotations": [
                    {
                        "bbox": [*corner, *(corner + side)],
                        "bbox_mode": BoxMode.XYXY_ABS,
                        "category_id": int(rng.integers(48)),
                        "iscrowd": 0,
                    }
                    for corner, side in zip(corners.tolist(), sides, strict=True)
                ],
            }
        )
    return records


def _augmentations(short_side: int) -> list[Any]:
    return [T.ResizeShortestEdge(short_side, round(short_side * 1333 / 800)), T.RandomFlip()]


@contextlib.contextmanager
def _loaders(
    records: list[dict[str, Any]], short_side: int, workers: int
) -> Iterator[dict[str, Iterator[Any]]]:
    """Both loaders, already iterated; their processes end with the block."""
    common = {"augmentations": _augmentations(short_side), "image_format": "RGB"}
    with seeded_rng(0):
        theirs = build_detection_train_loader(
            records,
            mapper=DatasetMapper(True, **common),
            total_batch_size=_BATCH,
            num_workers=workers,
        )
        ours = build_resumable_train_loader(
            records,
            HierKDDatasetMapper(True, with_caption=True, **common),
            total_batch_size=_BATCH,
            num_workers=workers,
            seed=0,
        )
        loaders = {"detectron2": iter(theirs), "ours, resumable and with captions": iter(ours)}
        try:
            yield loaders
        finally:
            loaders.clear()


def _drawer(batches: Iterator[Any], number: int) -> Callable[[], object]:
    def draw() -> None:
        for _ in range(number):
            next(batches)

    return draw


def _parts(records: list[dict[str, Any]], short_side: int) -> dict[str, Callable[[], object]]:
    """What happens to each picture, step by step, over all pictures."""
    mapper = HierKDDatasetMapper(
        True, with_caption=True, augmentations=_augmentations(short_side), image_format="RGB"
    )
    resize, flip = _augmentations(short_side)
    pictures = [detection_utils.read_image(r["file_name"], format="RGB") for r in records]
    large = [resize.get_transform(p).apply_image(p) for p in pictures]

    def whole() -> None:
        for position, record in enumerate(records):
            with seeded_rng(0, position):
                mapper(record)

    def seeds() -> None:
        for position in range(len(records)):
            with seeded_rng(0, position):
                pass

    return {
        "one whole sample": whole,
        "decode": lambda: [detection_utils.read_image(r["file_name"], "RGB") for r in records],
        "resize": lambda: [resize.get_transform(p).apply_image(p) for p in pictures],
        "flip, half of them": lambda: [flip.get_transform(p).apply_image(p) for p in large],
        "to a tensor": lambda: [
            torch.as_tensor(np.ascontiguousarray(p.transpose(2, 0, 1))) for p in large
        ],
        "seed": seeds,
    }


def _rows(
    times: dict[str, Measurement], reference: str, images: int, what: str
) -> list[dict[str, Any]]:
    return [
        {
            "what": f"{what}: {name}",
            "seconds": each.median,
            "ratio": ratio(each, times[reference]),
            "images/s": images / each.median,
            "ms/image": 1000 * each.median / images,
        }
        for name, each in times.items()
    ]
