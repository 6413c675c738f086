"""Write randomly initialised models of open_clip as folders, as a model hub has them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

# As `open_clip_config.json` holds them; small, but with the real tokeniser's vocabulary.
TINY: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {
        "image_size": 48,
        "layers": 1,
        "width": 64,
        "patch_size": 16,
        "head_width": 32,
    },
    "text_cfg": {
        "context_length": 20,
        "vocab_size": 49408,
        "width": 32,
        "heads": 2,
        "layers": 1,
    },
}
# Neither OpenAI's nor ImageNet's.
PIXELS = {"mean": [0.5, 0.4, 0.3], "std": [0.3, 0.25, 0.2]}


def write_folder(
    folder: Path,
    *,
    seed: int = 0,
    name: str = "open_clip_model.safetensors",
    preprocess_cfg: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """Write a random model; `changes` are of its config. Skips the test without open_clip."""
    open_clip = pytest.importorskip("open_clip", reason="open_clip_torch is not installed")
    folder.mkdir(parents=True, exist_ok=True)
    config = {**TINY, **changes}
    content = {"model_cfg": config, "preprocess_cfg": preprocess_cfg or PIXELS}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        kinds = {True: open_clip.CustomTextCLIP, False: open_clip.CLIP}
        arguments = {key: value for key, value in config.items() if key != "custom_text"}
        model = kinds[config.get("custom_text", False)](**arguments)
        for part in model.visual.modules():
            # The initial class token swamps the patches of a tiny ViT: make the image count.
            if isinstance(part, nn.Conv2d) and part.in_channels == 3:
                nn.init.normal_(part.weight, std=0.1)
            elif isinstance(part, nn.BatchNorm2d):  # the initial residuals are zero
                nn.init.uniform_(part.weight, 0.5, 1.5)
    state = model.state_dict()
    if name.endswith(".safetensors"):
        from safetensors.torch import save_file

        save_file({key: value.contiguous() for key, value in state.items()}, folder / name)
    else:
        torch.save(state, folder / name)
    return folder
