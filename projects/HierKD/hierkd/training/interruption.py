"""Ending a training on a signal: after the step, with a checkpoint, on all processes.

Ctrl-C, and what clusters send before they take a machine away, let a run finish its step, save and
leave with a status that says why. All processes leave after the same step: each step they tell one
another whether a signal has come, which costs what detectron2's own exchange of the losses costs.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from detectron2.engine import HookBase
from detectron2.utils import comm
from torch.multiprocessing.spawn import ProcessExitedException

from hierkd.checkpoint import HierKDCheckpointer

__all__ = ["SIGNALS", "Interruption", "passing_signals_on"]

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

# Seconds in which a second Ctrl-C is taken for the first: launchers pass on what the terminal has
# already sent to every process. [ours]
_SAME_KEYSTROKE = 1.0


class Interruption(HookBase):  # type: ignore[misc]  # detectron2 is untyped
    """Saves a checkpoint and ends the process once a signal has come.

    Register it on every process, behind the hooks that write. Signals are heard inside
    :meth:`listening` alone. A second Ctrl-C ends the process at once. A signal during an evaluation
    ends that evaluation; the step before it is saved.
    """

    def __init__(self, checkpointer: HierKDCheckpointer) -> None:
        """Take the checkpointer; only the first process's one writes."""
        self._checkpointer = checkpointer
        self._received = 0  # number of the first signal, 0 = none
        self._keystroke = 0.0  # when the first Ctrl-C came, by time.monotonic
        self._stopped = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals inside the block; those that are ignored stay so.

        Outside of the main thread, where Python allows no handlers, nothing is handled.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {each: signal.getsignal(each) for each in SIGNALS}
        heard = {k: v for k, v in before.items() if v is not signal.SIG_IGN and v is not None}
        polling = self.trainer.model.register_forward_pre_hook(self._poll)
        for number in heard:
            signal.signal(number, self._handle)
        try:
            yield
        finally:
            for number, handler in heard.items():
                signal.signal(number, handler)
            polling.remove()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # os.write: logging, or writing to sys.stderr, may be what the signal has interrupted
        now, name = time.monotonic(), signal.Signals(number).name
        if number == signal.SIGINT:
            if self._keystroke and now - self._keystroke > _SAME_KEYSTROKE:
                os.write(2, b"\nSecond Ctrl-C: stopping at once, without a checkpoint\n")
                os._exit(128 + number)
            self._keystroke = self._keystroke or now
        if not self._received:
            self._received = number
            if comm.is_main_process():
                text = f"\n{name}: finishing this step, then saving a checkpoint"
                text += " (Ctrl-C once more: stop at once)\n" if number == signal.SIGINT else "\n"
                os.write(2, text.encode())

    def after_step(self) -> None:
        """Leave if any process has received a signal.

        Raises:
            SystemExit: with 128 + the signal's number.
        """
        self._received = max(comm.all_gather(self._received))
        if self._received:
            self._stop(together=True)

    def _poll(self, model: Any, inputs: Any) -> None:
        """Leave an evaluation, which may take much longer than a cluster waits."""
        if self._received and not model.training:
            self._stop(together=False)

    def _stop(self, *, together: bool) -> NoReturn:
        status = 128 + self._received
        if self._stopped:  # detectron2 evaluates what was stopped in its last step
            raise SystemExit(status)
        self._stopped = True
        iteration = self.trainer.iter
        if iteration < self.trainer.max_iter and self._checkpointer.saved_iteration != iteration:
            self._checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
        if comm.is_main_process():
            logger.warning(
                "%s: stopped after iteration %d of %d. To go on from %s, give the same command "
                "with --resume",
                signal.Signals(self._received).name,
                min(iteration + 1, self.trainer.max_iter),
                self.trainer.max_iter,
                self._checkpointer.get_checkpoint_file(),
            )
        if together:
            comm.synchronize()  # a launcher ends the others when the first one leaves
        raise SystemExit(status)


@contextmanager
def passing_signals_on() -> Iterator[None]:
    """Let a process that only starts others and waits for them give its signals to them.

    Without this it would be gone first, and what it started would be killed while saving. It must
    be the main thread.

    Raises:
        SystemExit: when one of the others has ended on a signal, with the same status.
    """
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        children = multiprocessing.active_children()
        if not children:  # none yet: end as without a handler
            signal.signal(number, before[signal.Signals(number)])
            signal.raise_signal(number)
        for child in children:
            if child.pid is not None:
                os.kill(child.pid, number)

    before = {each: signal.getsignal(each) for each in SIGNALS}
    before = {k: v for k, v in before.items() if v is not signal.SIG_IGN and v is not None}
    for number in before:
        signal.signal(number, handle)
    try:
        yield
    except ProcessExitedException as error:
        if error.exit_code in {128 + each for each in SIGNALS}:
            raise SystemExit(error.exit_code) from None
        if received and -error.exit_code in SIGNALS:  # it had not begun to train
            raise SystemExit(128 + received[0]) from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
