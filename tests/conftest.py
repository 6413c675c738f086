"""What every test can rely on: tests that need a GPU or real CLIP weights skip without them."""

from pathlib import Path

import pytest
import torch

CLIP_WEIGHTS = Path("~/.cache/clip/ViT-B-32.pt").expanduser()  # where `clip.load` keeps them


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if item.get_closest_marker("clip") and not CLIP_WEIGHTS.exists():
        pytest.skip(f"no CLIP weights at {CLIP_WEIGHTS}")
