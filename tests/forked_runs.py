"""Runs of ``train_net.py`` in processes of their own, forked from the tests' one.

What a fresh interpreter does is to import PyTorch and detectron2 for five seconds; everything else
is real: the command line, the processes that it starts, their signals and exit statuses.
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
from detectron2.utils.logger import setup_logger

import train_net

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 120  # seconds after which a run is taken to hang


class Run:
    """One run in a group of processes of its own, that cannot outlive its test.

    Args:
        arguments: of train_net.py.
        log: where it writes what it says.
        environment: what is added to that of the tests.
        arrange: called in the new process before anything else.
    """

    def __init__(
        self,
        arguments: list[str],
        log: Path,
        environment: dict[str, str] | None = None,
        arrange: Callable[[], None] = lambda: None,
    ) -> None:
        self.log = log
        before = self.text()
        work = functools.partial(_work, arguments, log, environment or {}, arrange)
        self.process = multiprocessing.get_context("fork").Process(target=work)
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
    arguments: list[str], log: Path, environment: dict[str, str], arrange: Callable[[], None]
) -> None:
    os.setsid()
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)  # noqa: SIM115
    os.environ.update(environment)
    os.chdir(ROOT)
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
