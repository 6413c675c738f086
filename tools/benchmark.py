#!/usr/bin/env python
"""Measure the speed and the memory of the parts, against what a user would compare them with.

    python tools/benchmark.py step
    python tools/benchmark.py infer --device cuda --rounds 30

Random data and random weights, so that nothing has to be downloaded. The alternatives take turns in
one process; what is stated is the median of the ratios within a round. Each subcommand prints a
table and writes output/benchmark/<subcommand>.md and .json, with hardware and versions.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path

# quiets PyTorch's deprecation warnings, too
from hierkd.command import one_line_errors, run_command

ROOT = Path(__file__).resolve().parent.parent


def get_parser() -> argparse.ArgumentParser:
    """Build the command line; what it holds beside the first four goes to the module's ``run``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--device", help="default: the GPU if there is one")
    common.add_argument("--threads", type=int, metavar="N", help="of PyTorch on the CPU")
    common.add_argument(
        "--output", type=Path, default=ROOT / "output" / "benchmark", metavar="FOLDER"
    )
    common.add_argument("--rounds", type=int, metavar="N", help="default: as fits")
    parts = parser.add_subparsers(dest="subcommand", required=True, metavar="SUBCOMMAND")

    step = parts.add_parser("step", parents=[common], help="a training step of each row of Table 4")
    step.add_argument(
        "--miniature", action="store_true", help="configs/miniature, a tiny CLIP, 16 x 128 x 128"
    )
    step.add_argument("--images", type=int, metavar="N", help="of a step; default: as fits")
    step.add_argument("--boxes", type=int, metavar="N", help="of an image; default: as fits")

    infer = parts.add_parser("infer", parents=[common], help="detection beside RetinaNet's")
    infer.add_argument("--batch", type=int, default=4, help="default: %(default)s")
    infer.add_argument(
        "--no-compile", dest="compiled", action="store_false", help="leave out what is compiled"
    )

    vocabulary = parts.add_parser(
        "vocabulary", parents=[common], help="detection among 17 to 20,000 names"
    )
    vocabulary.add_argument(
        "--names",
        type=int,
        nargs="+",
        default=[17, 65, 1203, 20_000],
        metavar="K",
        help="sizes of vocabularies beside 65",
    )
    vocabulary.add_argument(
        "--embeddings",
        type=Path,
        metavar="FILE",
        help="array (K, D), .npy: the vocabulary of K names has these embeddings",
    )

    peers = parts.add_parser("peers", parents=[common], help="other open-vocabulary detectors")
    peers.add_argument(
        "--scale", type=float, help="factor on all picture sizes; default: 1 on a GPU, 0.6 on a CPU"
    )

    for part in (step, infer, vocabulary):
        part.add_argument(
            "--size",
            type=int,
            nargs=2,
            metavar=("HEIGHT", "WIDTH"),
            default=(800, 1333) if part is vocabulary else None,
            help="of a picture, pixels",
        )
    for part in (infer, peers):
        part.add_argument("--classes", type=int, default=65, help="default: %(default)s")
    for part in (infer, vocabulary, peers):
        part.add_argument("--config-file", default="configs/hierkd_R50.yaml", metavar="YAML")
    return parser


@one_line_errors
def main(argv: Sequence[str] | None = None) -> None:
    """Run one subcommand."""
    parser = get_parser()
    options = vars(parser.parse_args(argv))
    name, threads, output = (options.pop(key) for key in ("subcommand", "threads", "output"))

    import torch

    from hierkd.experiments.runs import git_commit

    gpu = torch.cuda.is_available()
    try:
        device = torch.device(options.pop("device") or ("cuda" if gpu else "cpu"))
    except RuntimeError as error:
        parser.error(f"--device: {error}")
    if device.type == "cuda" and not gpu:
        parser.error(f"--device {device}: there is no CUDA device here")
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    report = importlib.import_module(f"hierkd.benchmarks.{name}").run(device, **options)
    report.settings["commit"] = git_commit(ROOT)
    print(report.markdown())
    markdown, data = report.write(output, name)
    print(f"written to {markdown} and {data}")


if __name__ == "__main__":
    run_command(main)
