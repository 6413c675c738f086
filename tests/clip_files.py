"""Write randomly initialised CLIPs in the file formats that OpenAI publishes."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hierkd.teachers.openai_clip import import_clip

# Arguments of `clip.model.CLIP`.  The vocabulary is always CLIP's own; heads are width / 64.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny_vit": {
        "embed_dim": 16,
        "image_resolution": 32,
        "vision_layers": 1,
        "vision_width": 64,
        "vision_patch_size": 16,
        "context_length": 77,
        "transformer_width": 64,
        "transformer_layers": 1,
    },
    "tiny_resnet": {
        "embed_dim": 24,
        "image_resolution": 64,
        "vision_layers": (1, 1, 1, 1),
        "vision_width": 8,
        "vision_patch_size": None,
        "context_length": 32,
        "transformer_width": 64,
        "transformer_layers": 1,
    },
}


def random_clip(shape: str = "tiny_vit", seed: int = 0, **overrides: Any) -> nn.Module:
    """A float32 CLIP in evaluation mode; `overrides` are arguments of `clip.model.CLIP`."""
    arguments = {"vocab_size": 49408, **SHAPES[shape], **overrides}
    arguments["transformer_heads"] = arguments["transformer_width"] // 64
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = import_clip().model.CLIP(**arguments)
        # The initial class token swamps the patches of a tiny ViT: make the image count.
        nn.init.normal_(model.visual.conv1.weight, std=0.1)
    return model.eval()


def write_state_dict(path: Path, model: nn.Module) -> Path:
    """Save as a plain state dict, as `torch.save(model.state_dict())` does."""
    torch.save(model.state_dict(), path)
    return path


def write_torchscript(path: Path, model: Any) -> Path:
    """Save as a TorchScript archive with the three extra entries of OpenAI's files."""
    resolution = model.visual.input_resolution
    model.register_buffer("input_resolution", torch.tensor(resolution))
    context_length, vocab_size = model.context_length, model.vocab_size
    del model.context_length, model.vocab_size
    model.register_buffer("context_length", torch.tensor(context_length))
    model.register_buffer("vocab_size", torch.tensor(vocab_size))
    image = torch.zeros(1, 3, resolution, resolution)
    tokens = torch.zeros(1, context_length, dtype=torch.long)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # tracing is deprecated, and warns of constants
        torch.jit.save(torch.jit.trace(model, (image, tokens), check_trace=False), str(path))
    return path
