"""What every test can rely on: tests that need a GPU or real CLIP weights skip without them."""

import os
import signal
from collections.abc import Generator
from pathlib import Path
from typing import Any

# Tests work on small tensors, where one thread per process is fastest and always sums in one order.
if "OMP_NUM_THREADS" not in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

from log_handlers import own_log_handlers

CLIP_WEIGHTS = Path("~/.cache/clip/ViT-B-32.pt").expanduser()  # where `clip.load` keeps them


def pytest_configure() -> None:
    """Hear Ctrl-C, and let the tests' processes hear it, also where the shell has it ignored.

    A shell without job control starts what it puts into the background that way.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, Any, Any]:
    """Keep what a test, or a fixture that it is the first to need, does to the loggers from others.

    Their handlers would go on writing to the output that pytest had captured for that test.
    """
    with own_log_handlers():
        return (yield)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if item.get_closest_marker("clip") and not CLIP_WEIGHTS.exists():
        pytest.skip(f"no CLIP weights at {CLIP_WEIGHTS}")
