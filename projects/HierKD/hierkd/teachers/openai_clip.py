"""OpenAI's CLIP: its files, names and tokeniser; this module alone imports ``clip``.

OpenAI's models are what the paper distils. `hierkd.teachers.open_clip` has the others.
"""

from __future__ import annotations

import os
import urllib.parse
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from iopath.common.file_io import file_lock
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from hierkd.files import (
    file_hash,
    is_torchscript,
    read_torch_file,
    read_torchscript_state_dict,
)
from hierkd.teachers.protocol import LoadedCLIP

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "CONTEXT_LENGTH",
    "OPENAI_MODELS",
    "OpenAIFiles",
    "count_tokens",
    "import_clip",
]

# Mean and standard deviation of RGB pixels in [0, 1] that every released CLIP was trained with
# (the CLIP repository's `_transform`).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


CONTEXT_LENGTH = 77
"""Tokens that OpenAI's models read; the rest of a text is cut off."""
_LONGEST_TEXT = 1024  # a longer one counts as this long

OPENAI_MODELS = {
    "RN50": 1024,
    "RN101": 512,
    "RN50x4": 640,
    "RN50x16": 768,
    "RN50x64": 1024,
    "ViT-B/32": 512,
    "ViT-B/16": 512,
    "ViT-L/14": 768,
    "ViT-L/14@336px": 768,
}
"""D of what ``clip.available_models()`` lists."""


class OpenAIFiles:
    """A CLIP in OpenAI's formats, on disk or to be downloaded; `digest` is of its weights.

    Args:
        weights: a name that ``clip.available_models()`` lists (downloaded and hash-checked by
            ``clip``), or the path of a TorchScript archive or a plain state dict.
        download_root: folder of downloaded models; None or "" means clip's own ``~/.cache/clip``.

    Raises:
        FileNotFoundError: `weights` is neither a known name nor an existing file.
    """

    def __init__(self, weights: str, download_root: str | None = None) -> None:
        self.weights = weights
        self.title = Path(weights).name if os.path.isfile(weights) else weights
        self.digest = _weights_digest(weights)
        self._download_root = Path(download_root or "~/.cache/clip").expanduser()

    @property
    def embed_dim(self) -> int | None:
        """D of a released model, None of a file."""
        return None if os.path.isfile(self.weights) else OPENAI_MODELS.get(self.weights)

    def load(self, device: torch.device, half: bool) -> LoadedCLIP:
        """Load it; the first time this may download it.

        Raises:
            FileNotFoundError: the weights are not there and cannot be downloaded.
            ValueError: they are broken, or not those of such a model.
        """
        path = _find_weights(self.weights, self._download_root)
        clip = import_clip()
        model: Any = _build(clip, path)
        model = model.float().to(device).eval().requires_grad_(False)
        _fold_batch_norms(model.visual)
        if half:
            clip.model.convert_weights(model)

        def tokenize(texts: Sequence[str]) -> Tensor:
            tokens: Tensor = clip.tokenize(
                list(texts), context_length=model.context_length, truncate=True
            )
            return tokens

        return LoadedCLIP(
            model=model,
            tokenize=tokenize,
            embed_dim=int(model.text_projection.shape[1]),
            logit_scale=float(model.logit_scale.exp()),
            input_size=int(model.visual.input_resolution),
            pixel_mean=CLIP_MEAN,
            pixel_std=CLIP_STD,
            dtype=model.dtype,
        )


def count_tokens(texts: Sequence[str]) -> list[int]:
    """Tokens of each text, start and end included; of one that holds nothing as many as of ""."""
    tokens = import_clip().tokenize(list(texts), context_length=_LONGEST_TEXT, truncate=True)
    return [int(end) + 1 for end in tokens.argmax(dim=1)]  # the end has the highest number of all


def import_clip() -> ModuleType:
    """Import ``clip`` without the deprecation warning of the `pkg_resources` that it imports."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
        warnings.filterwarnings("ignore", message="Deprecated call to `pkg_resources")
        try:
            import clip
        except ModuleNotFoundError as error:
            raise FileNotFoundError(
                f"OpenAI's CLIP cannot be imported ({error}): pip install clip-anytorch"
            ) from error
    module: ModuleType = clip
    return module


def _model_urls() -> dict[str, str]:
    urls: dict[str, str] = import_clip().clip._MODELS
    return urls


def _weights_digest(weights: str) -> str:
    """SHA-256 (hex) of the weights; for a named model it is part of the URL, nothing is read."""
    if os.path.isfile(weights):
        return file_hash(weights)
    urls = _model_urls()
    if weights not in urls:
        raise FileNotFoundError(
            f"MODEL.TEACHER.WEIGHTS: {weights!r} is neither an existing file nor one of the CLIP "
            f"models {', '.join(urls)}, nor does it begin with 'open_clip:' (docs/teachers.md); "
            f"looked from {os.getcwd()!r}, and beside the config for {Path(weights).name!r}, too"
        )
    return urls[weights].split("/")[-2]


def _find_weights(weights: str, download_root: Path) -> Path:
    """Path of the weights; a named model is downloaded and hash-checked by ``clip``."""
    if os.path.isfile(weights):
        return Path(weights)
    url = _model_urls()[weights]
    target = download_root / os.path.basename(urllib.parse.urlparse(url).path)
    put = f"download {url} to {target}, or set MODEL.TEACHER.WEIGHTS to the path of the file"
    try:
        download_root.mkdir(parents=True, exist_ok=True)
        with file_lock(str(target)):  # several processes of one machine start at the same time
            return Path(import_clip().clip._download(url, str(download_root)))
    except OSError as error:  # includes URLError: no network, no space, no permission
        wrong = " (the file is there, but is not the published one)" if target.exists() else ""
        raise FileNotFoundError(
            f"the weights of CLIP {weights!r} are not at {target}{wrong} and could not be "
            f"downloaded ({error}); {put}"
        ) from error
    except RuntimeError as error:  # how clip reports a hash mismatch or a folder in the way
        raise ValueError(f"{target} is not the published CLIP {weights!r} ({error}); {put}") from (
            error
        )


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a TorchScript archive or a plain state dict; nothing that the file holds is run."""
    try:
        read = read_torchscript_state_dict if is_torchscript(path) else read_torch_file
        loaded: Any = read(path)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read as a CLIP, neither as a TorchScript archive nor as a state "
            f"dict: {error}"
        ) from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{path}: expected a state dict, found a {type(loaded).__name__}")
    return dict(loaded)


def _build(clip: ModuleType, path: Path) -> nn.Module:
    state_dict = _read_state_dict(path)
    try:
        rows, known = len(state_dict["token_embedding.weight"]), len(clip.clip._tokenizer.encoder)
        if rows != known:
            raise ValueError(f"it has {rows} tokens, the tokeniser {known}")
        model: nn.Module = clip.model.build_model(state_dict)
    except (AssertionError, LookupError, RuntimeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(
            f"{path} is not a CLIP in OpenAI's format: {type(error).__name__}: {error}"
        ) from error
    return model


def _fold_batch_norms(module: nn.Module) -> None:
    """Fold each batch normalisation of a ResNet into the convolution before it, in place.

    In evaluation mode it is an affine function per channel. Pairs are found as CLIP's ResNets have
    them: children ``conv1``, ``bn1``, and neighbours in an ``nn.Sequential``.
    """
    for part in list(module.modules()):
        children = dict(part.named_children())
        if isinstance(part, nn.Sequential):
            pairs = list(pairwise(children))
        else:
            pairs = [(name, f"bn{name[4:]}") for name in children if name.startswith("conv")]
        for conv_name, norm_name in pairs:
            conv, norm = children[conv_name], children.get(norm_name)
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(part, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(part, norm_name, nn.Identity())
