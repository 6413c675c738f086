"""HierKD's inference as the vocabulary grows from 17 names to 20,000: time and memory.

Random weights, one random picture of 800 x 1333 pixels, random unit embeddings of the names (or
real ones, ``--embeddings``).
"""

from __future__ import annotations

import copy
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import torch

from hierkd.benchmarks.random_models import random_hierkd
from hierkd.benchmarks.timing import Report, measure, peak_memory, ratio
from hierkd.teachers.texts import read_embedding_array

__all__ = ["add_arguments", "run"]

_SIZES = (17, 65, 1203, 20_000)
_REFERENCE = 65  # names of COCO's generalised setting


def add_arguments(parser: ArgumentParser) -> None:
    """Add sizes."""
    parser.add_argument(
        "--size", type=int, nargs=2, default=(800, 1333), metavar=("HEIGHT", "WIDTH")
    )
    parser.add_argument(
        "--names",
        type=int,
        nargs="+",
        default=_SIZES,
        metavar="K",
        help=f"sizes of vocabularies beside {_REFERENCE}",
    )
    parser.add_argument(
        "--embeddings",
        type=Path,
        metavar="FILE",
        help="array (K, D), .npy: the vocabulary of K names has these embeddings",
    )
    parser.add_argument("--config-file", default="configs/hierkd_R50.yaml", metavar="YAML")


def run(args: Namespace, device: torch.device) -> Report:
    """Time one picture under each vocabulary.

    Args:
        args: of :func:`add_arguments`, and ``rounds``.
        device: where the detector runs.

    Raises:
        ValueError: a size is not positive, or the array of ``--embeddings`` does not fit.
        FileNotFoundError: there is no such file.
    """
    if min(args.names) < 1:
        raise ValueError(f"--names: a vocabulary has at least one name, got {min(args.names)}")
    given: dict[int, torch.Tensor] = {}
    if args.embeddings is not None:
        array, _ = read_embedding_array(args.embeddings)
        given[len(array)] = torch.as_tensor(array, dtype=torch.float32)
    sizes = sorted({*args.names, _REFERENCE, *given})
    inputs = [{"image": torch.randint(0, 256, (3, *args.size), dtype=torch.uint8)}]
    # MODEL.WEIGHTS of the config are not loaded: the network is random, and all share it.
    model: Any = random_hierkd(args.config_file, _REFERENCE, device)
    models = {str(number): _with_vocabulary(model, number, given) for number in sizes}
    calls = {name: (lambda m=m: m(inputs)) for name, m in models.items()}
    with torch.inference_mode():
        rounds = args.rounds or (20 if device.type == "cuda" else 3)
        times = measure(calls, device=device, rounds=rounds)
        rows = [
            {
                "names": name,
                "embeddings": "real" if models[name].text_classifier.num_classes in given else "-",
                "seconds": times[name].median,
                f"over {_REFERENCE}": ratio(times[name], times[str(_REFERENCE)]),
                "peak MiB": peak_memory(call, device),
            }
            for name, call in calls.items()
        ]
    settings = {
        "picture": f"{args.size[0]} x {args.size[1]}",
        "rounds": rounds,
    }
    notes = ["Memory comes on top of the weights and of the vocabulary, K x 512 numbers."]
    return Report("Growing vocabularies", device, settings, rows, notes)


def _with_vocabulary(model: Any, number: int, given: dict[int, torch.Tensor]) -> Any:
    """The same network with a text classifier of its own."""
    embed_dim = model.text_classifier.embed_dim
    generator = torch.Generator().manual_seed(number)
    rows = given.get(number)
    if rows is None:
        rows = torch.randn(number, embed_dim, generator=generator)
    # Shallow copies share backbone and head; what differs is put into dictionaries of their own.
    other = copy.copy(model)
    other._modules = {**model._modules, "text_classifier": copy.deepcopy(model.text_classifier)}
    other.set_vocabulary([f"name {i}" for i in range(number)], rows)
    return other
