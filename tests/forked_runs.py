"""Runs of ``train_net.py`` in processes of their own, forked from a clean one.

What a fresh interpreter does is to import PyTorch and detectron2 for five seconds; here a server
does it once. Everything else is real: the command line, the processes that it starts, their signals
and exit statuses. The tests' own process is not forked: its autograd may have threads.
"""

import functools
import multiprocessing
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch.multiprocessing
from detectron2.data import MetadataCatalog
from detectron2.utils.logger import setup_logger

import tiny_training
import train_net

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 120  # seconds after which a run is taken to hang

_SERVED = multiprocessing.get_context("forkserver")
_SERVED.set_forkserver_preload(["hierkd.load_config", "hierkd.training.trainer"])


class Run:
    """One run in a group of processes of its own, that cannot outlive its test.

    Args:
        arguments: of train_net.py.
        log: where it writes what it says.
        environment: what is added to that of the tests.
        arrange: called in the new process before anything else; it has to be picklable.
    """

    def __init__(
        self,
        arguments: list[str],
        log: Path,
        environment: dict[str, str] | None = None,
        arrange: Callable[[], None] = int,
    ) -> None:
        self.log = log
        before = self.text()
        whole = {**os.environ, **(environment or {})}  # the server has that of its start
        root = Path(MetadataCatalog.get("miniature_ovd_val_all").json_file).parents[2]
        self.process = _SERVED.Process(target=_work, args=(arguments, root, log, whole, arrange))
        self.process.start()
        self._before = len(before)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        for kill in (lambda: os.killpg(self.process.pid, signal.SIGKILL), self.process.kill):
            try:
                kill()
            except ProcessLookupError:
                continue
        self.process.join()

    def wait(self, limit: float = LIMIT) -> int:
        """Its exit status, negative after a signal; the test fails if it does not end."""
        self.process.join(limit)
        assert self.process.exitcode is not None, f"no end after {limit} s: {self.text()[-2000:]}"
        return self.process.exitcode

    def status(self) -> int:
        """Wait for the end of a run that nothing is done to meanwhile."""
        with self:
            return self.wait()

    def text(self) -> str:
        """What has been said so far, by earlier runs with this log too."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait_for(self, pattern: str) -> None:
        """Until this run has said this."""
        deadline = time.monotonic() + LIMIT
        while not re.search(pattern, self.text()[self._before :]):
            assert self.process.exitcode is None, self.text()[-3000:]
            assert time.monotonic() < deadline, f"{pattern!r} not in {self.text()[-2000:]}"
            time.sleep(0.02)


def _work(
    arguments: list[str],
    root: Path,
    log: Path,
    environment: dict[str, str],
    arrange: Callable[[], None],
) -> None:
    os.setsid()
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)  # noqa: SIM115
    multiprocessing.set_start_method("fork", force=True)  # what a program starts with
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    tiny_training.register_anew(str(root))  # the server has registered another folder's
    sys.argv = ["train_net.py", *arguments]
    setup_logger.cache_clear()  # else it would write into what pytest has captured
    start = torch.multiprocessing.start_processes
    torch.multiprocessing.start_processes = functools.partial(start, start_method="fork")
    arrange()
    # outside of the handlers, as an exception would keep the run's loader processes alive
    sys.exit(_status(arguments))


def _status(arguments: list[str]) -> int:
    """What the interpreter would end with."""
    try:
        train_net.command(arguments)
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
