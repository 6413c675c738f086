"""Starting the processes of a run: detectron2's ``launch``, processes on a CPU, and ``torchrun``.

detectron2 starts one process per GPU. Here ``--num-gpus N`` with ``MODEL.DEVICE cpu`` starts N
processes that share the CPU's cores and talk over gloo, and a process that ``torchrun`` has started
joins the group that torchrun describes in its environment.
"""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import default_argument_parser, launch
from detectron2.utils import comm
from torch.multiprocessing.spawn import ProcessExitedException

from hierkd.training.cpu_memory import keep_freed_memory
from hierkd.training.interruption import passing_signals_on

__all__ = ["get_parser", "launch_processes", "leave_groups"]

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# So many processes on a CPU may be started whatever the number of cores, to try things out. [ours]
_ALWAYS_ALLOWED = 8


@dataclass(frozen=True)
class _Launched:
    """The place of this process in the job that torchrun has started."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def get_parser(epilog: str | None = None) -> ArgumentParser:
    """detectron2's command line, with a timeout.

    Args:
        epilog: Shown below the options.
    """
    parser: ArgumentParser = default_argument_parser(epilog=epilog)
    parser.add_argument(
        "--dist-timeout",
        type=float,
        default=30.0,  # [detectron2]
        metavar="MINUTES",
        help="how long a process waits for the others before the run ends; default: %(default)g",
    )
    return parser


def launch_processes(main: Callable[[Namespace], Any], args: Namespace, device: str) -> None:
    """Run ``main(args)`` in as many processes as the command line or torchrun asks for.

    Args:
        main: A function of a module that spawned processes can import.
        args: From :func:`get_parser`.
        device: ``MODEL.DEVICE``. On "cpu" the processes see no GPU and talk over gloo.

    Raises:
        SystemExit: The command line contradicts the machine or torchrun; with a message.
    """
    if args.dist_timeout <= 0:
        raise SystemExit(f"--dist-timeout must be positive, got {args.dist_timeout:g} minutes")
    timeout = timedelta(minutes=args.dist_timeout)
    launched = _read_torchrun_environment()
    if launched is not None:
        _check_torchrun(args, device, launched)
        _run_under_torchrun(main, args, device, launched, timeout)
        return
    _check_machines(args)
    _check_num_gpus(args.num_gpus, device)
    starts_others = args.num_gpus * args.num_machines > 1
    on_cpu = device == "cpu" and starts_others
    if on_cpu:
        # detectron2 takes NCCL and a GPU per process as soon as there is a GPU.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        with passing_signals_on() if starts_others else nullcontext():
            launch(
                _main_in_process,
                args.num_gpus,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                args=(main, args, device, args.num_gpus if on_cpu else 1),
                timeout=timeout,
            )
    except ProcessExitedException as error:
        raise SystemExit(_exit_status(error)) from None


def _exit_status(error: ProcessExitedException) -> int | str:
    """What the command ends with after one of its processes has ended without an exception."""
    if error.exit_code > 0:  # its own choice, which it has given a reason for
        return error.exit_code
    name = error.signal_name or f"signal {-error.exit_code}"
    return (
        f"process {error.error_index} of this machine was ended by {name}; the others were "
        "stopped. Start again with --resume to go on from the last checkpoint"
    )


def _main_in_process(
    main: Callable[[Namespace], Any], args: Namespace, device: str, share: int
) -> None:
    """What each process runs; ``share`` of them share the cores of this machine."""
    _prepare_cpu(device, share)
    main(args)
    leave_groups()


def leave_groups() -> None:
    """End this process's part in the groups of a job whose work is done.

    Not after an error: the others may wait in a collective. detectron2 keeps two groups of its own
    until the interpreter ends, whose threads may then abort the process after all its work.
    """
    if dist.is_initialized():
        comm._LOCAL_PROCESS_GROUP = None
        comm.create_local_process_group.cache_clear()
        comm._get_global_gloo_group.cache_clear()
        dist.destroy_process_group()


def _prepare_cpu(device: str, processes: int) -> None:
    """Set threads and memory of a process that computes on the CPU, one of some."""
    _limit_threads(processes)
    if device == "cpu" or not torch.cuda.is_available():
        keep_freed_memory()


def _limit_threads(processes: int) -> None:
    """Give each of some processes of this machine its part of the cores, unless told otherwise."""
    if processes > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, _cores() // processes))


def _cores() -> int:
    """How many cores this process may use; not every system can tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_num_gpus(num_gpus: int, device: str) -> None:
    """Refuse a number of processes that this machine cannot run.

    ``--num-gpus 1`` on a machine without a GPU is one process on the CPU.
    """
    if num_gpus < 1:
        raise SystemExit(f"--num-gpus must be at least 1, got {num_gpus}")
    if device == "cpu":
        most = max(_cores(), _ALWAYS_ALLOWED)
        if num_gpus > most:
            raise SystemExit(
                f"--num-gpus {num_gpus} with MODEL.DEVICE cpu: this machine has {_cores()} cores; "
                f"at most {most} processes make sense"
            )
        return
    available = torch.cuda.device_count()
    if num_gpus <= max(available, 1):
        return
    raise SystemExit(
        f"--num-gpus {num_gpus}: this machine has {available} CUDA devices"
        + (f"; for {num_gpus} processes on the CPU add MODEL.DEVICE cpu" if not available else "")
    )


def _check_machines(args: Namespace) -> None:
    """Refuse a rank or an address that cannot be right before anything waits for it."""
    if args.num_machines < 1:
        raise SystemExit(f"--num-machines must be at least 1, got {args.num_machines}")
    if not 0 <= args.machine_rank < args.num_machines:
        raise SystemExit(
            f"--machine-rank must be 0 to {args.num_machines - 1} with --num-machines "
            f"{args.num_machines}, got {args.machine_rank}"
        )
    if args.num_machines > 1 and args.dist_url == "auto":
        raise SystemExit(
            f"--num-machines {args.num_machines}: --dist-url auto is for one machine; give the "
            "first machine's address, such as tcp://10.0.0.1:29500, to all of them"
        )


# ---------------------------------------------------------------------------------------- torchrun


def _read_torchrun_environment() -> _Launched | None:
    """Return what torchrun says about this process; None if it did not start it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None  # a cluster may set RANK and WORLD_SIZE by itself
    missing = [name for name in _TORCHRUN if name not in os.environ]
    if missing:
        raise SystemExit(
            f"started by torchrun, but without {', '.join(missing)} in the environment"
        )
    numbers = [int(os.environ[name]) for name in _TORCHRUN[:4]]
    return _Launched(*numbers)


def _check_torchrun(args: Namespace, device: str, launched: _Launched) -> None:
    """Refuse options that torchrun decides, and more processes than GPUs."""
    if args.num_gpus > 1 or args.num_machines > 1:
        raise SystemExit(
            f"torchrun has started {launched.world_size} processes already: leave out "
            f"--num-gpus {args.num_gpus} and --num-machines {args.num_machines}; its "
            "--nproc-per-node and --nnodes take their place"
        )
    available = torch.cuda.device_count()
    if device != "cpu" and launched.local_world_size > max(available, 1):
        raise SystemExit(
            f"torchrun --nproc-per-node {launched.local_world_size}: this machine has {available} "
            "CUDA devices" + ("; on the CPU add MODEL.DEVICE cpu" if not available else "")
        )


def _run_under_torchrun(
    main: Callable[[Namespace], Any],
    args: Namespace,
    device: str,
    launched: _Launched,
    timeout: timedelta,
) -> None:
    """Join torchrun's group, run ``main`` in it and leave it."""
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(launched.local_rank)
    else:
        # torchrun sets OMP_NUM_THREADS to 1 where the user has not; that is its choice to make.
        _prepare_cpu(device, launched.local_world_size)
    if launched.world_size == 1:
        main(args)
        return
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timeout)
    comm.create_local_process_group(launched.local_world_size)
    comm.synchronize()
    main(args)
    leave_groups()
