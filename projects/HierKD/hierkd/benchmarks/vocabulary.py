"""HierKD's inference as the vocabulary grows from 17 names to 20,000: time and memory.

Random weights, one random picture of 800 x 1333 pixels, random unit embeddings of the names (or
real ones, ``--embeddings``).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hierkd.benchmarks.timing import Report, measure, median, peak_memory, random_hierkd, ratio

__all__ = ["run"]

_REFERENCE = 65  # names of COCO's generalised setting


def run(
    device: torch.device,
    *,
    rounds: int | None,
    size: tuple[int, int],
    names: Sequence[int],
    embeddings: Path | None,
    config_file: str,
) -> Report:
    """Time one picture under each vocabulary.

    Args:
        device: where the detector runs.
        rounds: None: as fits.
        size: (height, width) of the picture.
        names: sizes of the vocabularies, beside the reference of 65.
        embeddings: an array (K, D), .npy: the vocabulary of K names has these.
        config_file: of HierKD.

    Raises:
        ValueError: the array does not fit.
        FileNotFoundError: there is no such file.
    """
    given: dict[int, Tensor] = {}
    if embeddings is not None:
        array = np.load(embeddings, allow_pickle=False)
        given[len(array)] = torch.as_tensor(array, dtype=torch.float32)
    inputs = [{"image": torch.randint(0, 256, (3, *size), dtype=torch.uint8)}]
    model: Any = random_hierkd(config_file, _REFERENCE, device).eval()
    models = {number: copy.deepcopy(model) for number in sorted({*names, _REFERENCE, *given})}
    for number, each in models.items():
        each.set_vocabulary([f"name {i}" for i in range(number)], given.get(number))
    calls = {str(number): (lambda m=m: m(inputs)) for number, m in models.items()}
    rounds = rounds or (20 if device.type == "cuda" else 3)
    with torch.inference_mode():
        times = measure(calls, device, rounds)
        rows = [
            {
                "names": number,
                "embeddings": "real" if number in given else "random",
                "seconds": median(times[str(number)]),
                f"over {_REFERENCE}": ratio(times[str(number)], times[str(_REFERENCE)]),
                "peak MiB": peak_memory(calls[str(number)], device),
            }
            for number in models
        ]
    settings = {"picture": f"{size[0]} x {size[1]}", "rounds": rounds}
    notes = ["Memory comes on top of the weights and of the vocabulary, K x 512 numbers."]
    return Report("Growing vocabularies", device, settings, rows, notes)
