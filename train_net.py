#!/usr/bin/env python
"""Train and evaluate HierKD.

    python train_net.py --config-file configs/hierkd_R50.yaml --num-gpus 4
    python train_net.py --config-file configs/hierkd_R50.yaml --num-gpus 4 --resume
    python train_net.py --config-file configs/hierkd_R50.yaml --eval-only MODEL.WEIGHTS model.pth

Trailing KEY VALUE pairs override the config. ``--num-gpus N`` with ``MODEL.DEVICE cpu`` starts N
processes on the CPU. Several machines: ``--num-machines``, ``--machine-rank`` and ``--dist-url``,
as in detectron2, or torchrun; see docs/training.md.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from hierkd.command import run_command

ROOT = Path(__file__).resolve().parent  # whose commit a run notes


def get_parser() -> argparse.ArgumentParser:
    """Build detectron2's command line, with a timeout and without detectron2 or PyTorch."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config-file", default="", metavar="FILE", help="the YAML of the run, in configs/")
    add("--resume", action="store_true", help="go on from the last checkpoint in OUTPUT_DIR")
    add("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS, train nothing")
    add("--num-gpus", type=int, default=1, metavar="N", help="processes per machine; default: 1")
    add("--num-machines", type=int, default=1, metavar="N", help="default: 1")
    add("--machine-rank", type=int, default=0, metavar="N", help="of this machine, from 0")
    # One port per user, so that a run that was left over is seen. [detectron2]
    port = 2**15 + 2**14 + hash(os.getuid() if hasattr(os, "getuid") else 1) % 2**14
    add(
        "--dist-url",
        default=f"tcp://127.0.0.1:{port}",
        metavar="URL",
        help="address of the first machine, such as tcp://10.0.0.1:29500; default: %(default)s",
    )
    add(
        "--dist-timeout",
        type=float,
        default=30.0,  # [detectron2]
        metavar="MINUTES",
        help="how long a process waits for the others before the run ends; default: %(default)g",
    )
    add("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="override the config")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what cannot be right before anything is imported or waits for it.

    Raises:
        ValueError: says which option, and what it may be.
    """
    for option in ("num_gpus", "num_machines", "dist_timeout"):
        if not (number := getattr(args, option)) > 0:
            raise ValueError(f"--{option.replace('_', '-')} must be positive, got {number:g}")
    if not 0 <= args.machine_rank < args.num_machines:
        raise ValueError(
            f"--machine-rank must be 0 to {args.num_machines - 1} with --num-machines "
            f"{args.num_machines}, got {args.machine_rank}"
        )
    if "TORCHELASTIC_RUN_ID" in os.environ and args.num_gpus * args.num_machines > 1:
        raise ValueError(
            f"torchrun has started {os.environ['WORLD_SIZE']} processes already: leave out "
            f"--num-gpus {args.num_gpus} and --num-machines {args.num_machines}; its "
            "--nproc-per-node and --nnodes take their place"
        )
    if not args.config_file:
        given = args.opts[0] if args.opts else ""
        raise ValueError(
            f"--config-file is missing in front of {given}"
            if given.endswith((".yaml", ".yml"))
            else "--config-file FILE is needed, such as configs/hierkd_R50.yaml"
        )
    if not Path(args.config_file).is_file():
        raise FileNotFoundError(f"--config-file: no file {args.config_file!r}")


def __getattr__(name: str) -> Any:
    """Give ``train_net.Trainer``, where other detectron2 projects have it."""
    if name != "Trainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from hierkd.training.trainer import Trainer

    return Trainer


def main(args: argparse.Namespace) -> dict[str, Any] | None:
    """Run one process of a training or of an evaluation; returns the figures at its end."""
    from hierkd.training.job import prepare

    return prepare(args, ROOT)()


def run(args: argparse.Namespace) -> None:
    """Do the same as a program: what is wrong before the work ends it with one line, status 2."""
    from detectron2.utils import comm

    from hierkd.training.job import prepare

    try:
        work = prepare(args, ROOT)
    except (ValueError, OSError) as error:
        if comm.get_world_size() > 1:  # the others have to hear of it
            raise
        fail(error)
    work()


def fail(error: Exception) -> NoReturn:
    """End the program because of something the user can put right."""
    sys.stderr.write(f"train_net.py: error: {error}\n")
    raise SystemExit(2)


def command(argv: Sequence[str] | None = None) -> None:
    """Do what the command line asks for, in as many processes as it asks for."""
    args = get_parser().parse_args(argv)
    try:
        check_arguments(args)
        from hierkd.load_config import requested_device
        from hierkd.training.launch import check_devices, launch_processes

        device = requested_device(args.config_file, args.opts)
        check_devices(args.num_gpus, device)
    except (ValueError, OSError) as error:
        fail(error)
    launch_processes(run, args, device)


if __name__ == "__main__":
    run_command(command)
