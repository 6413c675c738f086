"""Starting the processes of a run: detectron2's ``launch``, processes on a CPU, and ``torchrun``.

detectron2 starts one process per GPU. Here ``--num-gpus N`` with ``MODEL.DEVICE cpu`` starts N
processes that share the CPU's cores and talk over gloo, and a process that ``torchrun`` has started
joins the group that torchrun describes in its environment.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import launch
from detectron2.utils import comm
from torch.multiprocessing.spawn import ProcessExitedException

from hierkd.training.hooks import SIGNALS, handling

__all__ = ["check_devices", "launch_processes", "leave_groups"]


def check_devices(num_gpus: int, device: str) -> None:
    """Refuse more processes than this machine has GPUs, or than the device that is named.

    One process without a GPU runs on the CPU.

    Under torchrun its ``--nproc-per-node`` counts instead of ``--num-gpus``.

    Raises:
        ValueError: names the option and both numbers.
    """
    option = "--num-gpus"
    if _from_torchrun():
        option, num_gpus = "torchrun --nproc-per-node", int(os.environ["LOCAL_WORLD_SIZE"])
    if num_gpus > 1 and ":" in device:
        raise ValueError(
            f"{option} {num_gpus}: MODEL.DEVICE {device} is one device for all processes; "
            'write "cuda", and each takes its own'
        )
    available = torch.cuda.device_count()
    if device != "cpu" and num_gpus > max(available, 1):
        hint = "" if available else f"; for {num_gpus} processes on the CPU add MODEL.DEVICE cpu"
        raise ValueError(f"{option} {num_gpus}: this machine has {available} CUDA devices{hint}")


def launch_processes(main: Callable[[Namespace], Any], args: Namespace, device: str) -> None:
    """Run ``main(args)`` in as many processes as the command line or torchrun asks for.

    With the ``MODEL.DEVICE`` "cpu" they see no GPU and talk over gloo.

    Raises:
        SystemExit: one of the processes has ended without an exception; with its status.
        ProcessExitedException: one of them was killed.
    """
    timeout = timedelta(minutes=args.dist_timeout)
    if _from_torchrun():
        _run_under_torchrun(main, args, device, timeout)
        return
    starts_others = args.num_gpus * args.num_machines > 1
    on_cpu = device == "cpu" and starts_others
    if on_cpu:
        # detectron2 takes NCCL and a GPU per process as soon as there is a GPU.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with _passing_signals_on() if starts_others else nullcontext():
        launch(
            _main_in_process,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(main, args, args.num_gpus if on_cpu else 1),
            timeout=timeout,
        )


def _main_in_process(main: Callable[[Namespace], Any], args: Namespace, share: int) -> None:
    """What each process runs; ``share`` of them share the cores of this machine."""
    if share > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // share))
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


def _from_torchrun() -> bool:
    """Whether torchrun has started this process; RANK alone may be a cluster's."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def _run_under_torchrun(
    main: Callable[[Namespace], Any], args: Namespace, device: str, timeout: timedelta
) -> None:
    """Join torchrun's group, run ``main`` in it and leave it."""
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timeout)
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
    comm.synchronize()
    main(args)
    leave_groups()


@contextmanager
def _passing_signals_on() -> Iterator[None]:
    """Let a process that only starts others and waits for them give its signals to them.

    Without this it would be gone first, and what it started would be killed while saving.

    Raises:
        SystemExit: when one of the others has ended by itself or on a signal, with its status.
    """
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        children = multiprocessing.active_children()
        if not children:  # none yet: end as without a handler
            signal.signal(number, before[number])
            signal.raise_signal(number)
        for child in children:
            if child.pid is not None:
                os.kill(child.pid, number)

    with handling(handle) as before:
        try:
            yield
        except ProcessExitedException as error:
            if error.exit_code > 0:  # its own choice, which it has given a reason for
                raise SystemExit(error.exit_code) from None
            if received and -error.exit_code in SIGNALS:  # it had not begun to train
                raise SystemExit(128 + received[0]) from None
            raise
