"""Commands in the tests' process: their exit status, and the loggers that they set up."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from detectron2.utils.logger import setup_logger

LOADED_LOGGERS = ("detectron2", "fvcore", "hierkd")


@contextlib.contextmanager
def own_log_handlers() -> Iterator[None]:
    """Forget inside-made handlers and settings of the loggers that a run sets up."""
    loggers = [logging.getLogger(name) for name in LOADED_LOGGERS]
    before = [(each.handlers[:], each.propagate, each.level) for each in loggers]
    try:
        yield
    finally:
        for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
            for handler in logger.handlers:
                with contextlib.suppress(ValueError):  # its stream was pytest's, and is closed
                    handler.flush()
            logger.handlers[:], logger.propagate = handlers, propagate
            logger.setLevel(level)
        if hasattr(setup_logger, "cache_clear"):  # else the next call would add no handler
            setup_logger.cache_clear()


def exit_status(main: Callable[[Sequence[str]], Any], *arguments: object) -> int:
    """The status with which a program of this ``main`` would end; argparse's included."""
    try:
        return main([str(each) for each in arguments]) or 0
    except SystemExit as end:
        return int(end.code or 0)
