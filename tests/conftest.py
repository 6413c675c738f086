"""What every test can rely on: tests that need a GPU or real CLIP weights skip without them."""

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch

from log_handlers import own_log_handlers

CLIP_WEIGHTS = Path("~/.cache/clip/ViT-B-32.pt").expanduser()  # where `clip.load` keeps them


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
