"""Sizes of OpenAI's released models; reading their files is tested in test_teacher.py."""

from pathlib import Path

import pytest
import torch

import clip_files
from hierkd.teachers import openai_clip
from hierkd.teachers.clip import CLIPTeacher

# Shapes of OpenAI's state dicts: D; px, layers, width and patch of the image encoder; width of the
# text encoder.
RELEASED = {
    "RN50": (1024, 224, (3, 4, 6, 3), 64, None, 512),
    "RN101": (512, 224, (3, 4, 23, 3), 64, None, 512),
    "RN50x4": (640, 288, (4, 6, 10, 6), 80, None, 640),
    "RN50x16": (768, 384, (6, 8, 18, 8), 96, None, 768),
    "RN50x64": (1024, 448, (3, 15, 36, 10), 128, None, 1024),
    "ViT-B/32": (512, 224, 12, 768, 32, 512),
    "ViT-B/16": (512, 224, 12, 768, 16, 512),
    "ViT-L/14": (768, 224, 24, 1024, 14, 768),
    "ViT-L/14@336px": (768, 336, 24, 1024, 14, 768),
}


def test_all_released_models_are_known():
    assert list(openai_clip.OPENAI_MODELS) == list(RELEASED)
    assert list(RELEASED) == clip_files.import_clip().available_models()


@pytest.mark.parametrize("name", RELEASED)
def test_the_size_of_a_released_model_is_that_of_its_weights(name, monkeypatch):
    embed_dim, side, layers, width, patch, text_width = RELEASED[name]
    clip = clip_files.import_clip()
    heads = text_width // 64
    with torch.device("meta"):  # shapes, no memory
        model = clip.model.CLIP(
            *(embed_dim, side, layers, width, patch, 77, 49408),
            *(text_width, heads, 2),
        )
        state_dict = model.state_dict()
        monkeypatch.setattr(openai_clip, "_find_weights", lambda *_: Path("weights.pt"))
        monkeypatch.setattr(openai_clip, "_read_state_dict", lambda _: state_dict)
        monkeypatch.setattr(openai_clip, "_scale", lambda _: 100.0)
        loaded = openai_clip.OpenAIFiles(name).load(torch.device("meta"), half=False)
        regions = loaded.model.encode_image(torch.zeros(1, 3, side, side))
        texts = loaded.model.encode_text(torch.zeros(1, 77, dtype=torch.long))
    assert loaded.input_size == side
    assert loaded.context_length == 77
    assert loaded.embed_dim == embed_dim == regions.shape[1] == texts.shape[1]
    assert (embed_dim, side) == openai_clip.OPENAI_MODELS[name]
    assert CLIPTeacher(name, device="cpu").embed_dim == embed_dim  # without weights
