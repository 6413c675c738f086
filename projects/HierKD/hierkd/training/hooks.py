"""Hooks of a training: stopping on a signal, and stopping at a number that is not finite."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import Tensor, nn

from hierkd.checkpoint import HierKDCheckpointer

__all__ = ["SIGNALS", "FiniteGuard", "Interruption", "NonFiniteError", "handling"]

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

# Seconds in which a second Ctrl-C is taken for the first: launchers pass on what the terminal has
# already sent to every process. [ours]
_SAME_KEYSTROKE = 1.0
# Where a gradient scaler, which begins at 65536 and halves at each overflow, has given up: no
# finite gradient overflows half precision then. [ours]
_LEAST_SCALE = 1e-3


class Interruption(HookBase):  # type: ignore[misc]  # detectron2 is untyped
    """Saves a checkpoint and ends the process once a signal has come.

    Ctrl-C, and what clusters send before they take a machine away, let a run finish its step, save
    and leave with a status that says why. All processes leave after the same step: each step they
    tell one another whether a signal has come. A second Ctrl-C ends the process at once. A signal
    during an evaluation ends that evaluation; the step before it is saved.

    Register it on every process, behind the hooks that write. Signals are heard inside
    :meth:`listening` alone.
    """

    def __init__(self, checkpointer: HierKDCheckpointer) -> None:
        """Take the checkpointer; only the first process's one writes."""
        self._checkpointer = checkpointer
        self._received = 0  # number of the first signal, 0 = none
        self._keystroke = 0.0  # when the first Ctrl-C came, by time.monotonic
        self._stopped = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals inside the block; those that are ignored stay so."""
        with handling(self._handle):
            polling = self.trainer.model.register_forward_pre_hook(self._poll)
            try:
                yield
            finally:
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
def handling(handler: Any) -> Iterator[Mapping[int, Any]]:
    """Let ``handler(number, frame)`` have the signals inside the block, but for ignored ones.

    Gives number of a signal -> what handled it before, and will after the block.
    """
    heard = [int(each) for each in SIGNALS if signal.getsignal(each) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heard}
    try:
        yield before
    finally:
        for number, old in before.items():
            signal.signal(number, old)


class NonFiniteError(FloatingPointError):
    """A loss or a gradient is infinite or NaN; the optimizer has not seen it."""


class FiniteGuard(HookBase):  # type: ignore[misc]  # detectron2 is untyped
    """Ends all processes at a loss or gradient that is not finite, and names the images.

    detectron2 looks at the losses alone, and ends the first process alone. A hook of the inner
    trainer, which alone has a place between backward and optimizer. Under a gradient scaler
    infinite gradients are no fault, as the scaler skips the step, until its scale has collapsed.
    """

    def __init__(self, model: nn.Module) -> None:
        """Watch a model as it is trained, that is, wrapped for several processes."""
        self._model = model
        self._batch: Sequence[Mapping[str, Any]] = ()
        self._losses: dict[str, Tensor] = {}
        model.register_forward_hook(self._keep)

    def _keep(self, model: nn.Module, inputs: tuple[Any, ...], losses: Any) -> None:
        if model.training:
            self._batch = inputs[0]
            self._losses = {name: loss.detach() for name, loss in losses.items()}

    def after_backward(self) -> None:
        """Check this step.

        Raises:
            NonFiniteError: on all processes, if a number of one of them is not finite.
        """
        scaler = getattr(self.trainer, "grad_scaler", None)
        values = [loss.float() for loss in self._losses.values()]
        if scaler is None:  # a sum is finite only if all of its terms are
            gradients = [p.grad for p in self._model.parameters() if p.grad is not None]
            values += [gradient.sum().float() for gradient in gradients]
        fault = (~torch.stack(values).isfinite()).any().float()
        if comm.get_world_size() > 1:
            torch.distributed.all_reduce(fault, torch.distributed.ReduceOp.MAX)
        if fault.item() > 0:
            self._stop()
        if scaler is not None and scaler.get_scale() < _LEAST_SCALE:
            raise NonFiniteError(
                f"iteration {self.trainer.iter}: the gradients are infinite at every scale down to "
                f"{_LEAST_SCALE:g}: this is no overflow of half precision. Train with "
                "SOLVER.AMP.ENABLED False to find the step"
            )

    def _stop(self) -> None:
        wrong = [f"{n} is {loss.item()}" for n, loss in self._losses.items() if not loss.isfinite()]
        images = [str(each.get("file_name", "?")) for each in self._batch]
        found = list(enumerate(comm.all_gather((wrong, images))))
        if not any(wrong for _, (wrong, _) in found):
            gradients = {name: p.grad for name, p in self._model.named_parameters()}
            wrong = [n for n, g in gradients.items() if g is not None and not g.isfinite().all()]
            if not wrong:
                return  # only the sum of one was beyond float32
            told = f"the losses are finite, the gradients of {', '.join(wrong[:3])} are not"
            found = [(comm.get_rank(), ([told], images))]
        faults = [
            f"in process {rank}, {', '.join(wrong)}; its images are {', '.join(images)}"
            for rank, (wrong, images) in found
            if wrong
        ]
        raise NonFiniteError(
            f"iteration {self.trainer.iter}: {' | '.join(faults)}. The optimizer has not stepped, "
            "and the last checkpoint is from before it"
        )
