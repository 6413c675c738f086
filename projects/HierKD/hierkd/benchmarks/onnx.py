"""An exported detector in onnxruntime beside PyTorch, on the CPU.

From the resized picture to boxes with classes and scores; random weights, one random picture. Both
get as many threads (--threads). onnxruntime comes with ``pip install -e '.[export]'``; the
export takes a minute before anything is timed.
"""

from __future__ import annotations

import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from hierkd.benchmarks.random_models import random_hierkd
from hierkd.benchmarks.timing import Report, measure, peak_memory, ratio
from hierkd.inference.export import export_graph, load_graph, require_packages
from hierkd.inference.predictor import OpenVocabularyPredictor

__all__ = ["add_arguments", "run"]

_EAGER = "PyTorch"


def add_arguments(parser: ArgumentParser) -> None:
    """Add what runs at which size."""
    parser.add_argument(
        "--size", type=int, nargs=2, default=(320, 533), metavar=("HEIGHT", "WIDTH")
    )
    parser.add_argument("--classes", type=int, default=65, help="default: %(default)s")
    parser.add_argument("--config-file", default="configs/hierkd_R50.yaml", metavar="YAML")


def run(args: Namespace, device: torch.device) -> Report:
    """Time one picture with each.

    Args:
        args: of :func:`add_arguments`, and ``rounds``.
        device: the CPU.

    Raises:
        ImportError: a package of the extra ``export`` is missing.
        ValueError: the device is another one.
    """
    if device.type != "cpu":
        raise ValueError("onnxruntime is compared on the CPU: --device cpu")
    require_packages("onnx", "onnxscript", "onnxruntime")
    height, width = args.size
    model = random_hierkd(args.config_file, args.classes, device, ("MODEL.WEIGHTS", ""))
    predictor = OpenVocabularyPredictor(model=model, min_size=height, max_size=max(height, width))
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    inputs = [{"image": torch.from_numpy(picture.transpose(2, 0, 1).copy())}]
    candidates: dict[str, Callable[[], object]] = {_EAGER: lambda: model(inputs)}
    with tempfile.TemporaryDirectory() as folder:
        for name, suffix in (("onnxruntime", ".onnx"), ("PyTorch, the exported .pt2", ".pt2")):
            path = Path(folder) / f"detector{suffix}"
            export_graph(predictor, path)
            graph, _ = load_graph(path)
            candidates[name] = lambda graph=graph: graph(picture, None)  # type: ignore[misc]
    with torch.inference_mode():
        times = measure(candidates, device=device, rounds=args.rounds or 5)
        memory = {name: peak_memory(call, device) for name, call in candidates.items()}
    rows = [
        {
            "runs in": name,
            "seconds": times[name].median,
            "over PyTorch": ratio(times[name], times[_EAGER]),
            "peak MiB": memory[name],
        }
        for name in candidates
    ]
    return Report(
        "An exported detector",
        device,
        {
            "picture": f"{height} x {width}",
            "classes": args.classes,
            "threads": torch.get_num_threads(),
            "rounds": len(times[_EAGER].seconds),
        },
        rows,
        ["Memory comes on top of the weights."],
    )
