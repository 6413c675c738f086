"""CLIPs of the package open_clip; this module alone imports it, and only where one is named.

``MODEL.TEACHER.WEIGHTS`` names such a CLIP in one of three ways:

- ``open_clip:MODEL:TAG``, e.g. ``open_clip:ViT-B-16:laion2b_s34b_b88k``: published weights, which
  open_clip downloads once;
- ``open_clip:MODEL:FILE``: a file with weights for one of open_clip's architectures;
- ``open_clip:FOLDER``: what open_clip uploads to a model hub and reads as ``local-dir:FOLDER``,
  its config, the weights and, where the model has a tokeniser of its own, that.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from hierkd.files import file_hash, read_torch_file
from hierkd.teachers.protocol import LoadedCLIP

__all__ = ["OPEN_CLIP_PREFIX", "OpenCLIPFiles", "known_open_clip_digest"]

OPEN_CLIP_PREFIX = "open_clip:"

_KEY = "MODEL.TEACHER.WEIGHTS"
_SYNTAX = (
    "expected open_clip:MODEL:TAG, open_clip:MODEL:FILE or open_clip:FOLDER (docs/teachers.md)"
)
_CONFIG = "open_clip_config.json"
_LOCAL = "local-dir:"  # how open_clip names a folder
# tokenizer.json, merges.txt, spiece.model and the like
_TOKENIZER_SUFFIXES = (".json", ".txt", ".model", ".vocab", ".bpe", ".codes", ".tiktoken")
# What a config may tell the tokeniser. Others reach functions that run code of the folder
# (trust_remote_code) or draw tokens at random (reduction_mask).
_TOKENIZER_OPTIONS = {"clean", "strip_sep_token", "language", "additional_special_tokens"}

_Colour = tuple[float, float, float]


class _Weights(NamedTuple):
    """What a name stands for."""

    title: str
    model: str  # as open_clip names it, "local-dir:..." for a folder
    config: dict[str, Any]  # the architecture
    mean: _Colour
    std: _Colour
    path: Path | None  # of the weights; None: to be downloaded
    published: dict[str, Any]  # open_clip's entry of a tag


class OpenCLIPFiles:
    """A CLIP of the package open_clip, like `openai_clip.OpenAIFiles`.

    Its `digest` is of the weights, the architecture, the pixel statistics and the files of a
    folder's own tokeniser: open_clip reads one file into different models, with other embeddings
    ("ViT-B-32", "ViT-B-32-quickgelu").

    Args:
        weights: "open_clip:...", as this module describes. Published weights that are not there are
            downloaded now, since their digest is not known without.
        download_root: folder of downloaded models; None or "" means that of the model hub.

    Raises:
        FileNotFoundError: open_clip is not installed, there is no such model, tag, file or folder,
            or it cannot be downloaded.
        ValueError: the syntax, or the folder's config, is wrong.
    """

    def __init__(self, weights: str, download_root: str | None = None) -> None:
        found = _find(weights, download_root)
        if found.path is None:
            found = found._replace(path=_download(found, download_root))
        self._weights = found
        self.title = found.title
        self.digest = _digest(found)

    @property
    def embed_dim(self) -> int | None:
        """D, of the architecture."""
        return int(self._weights.config["embed_dim"])

    def load(self, device: torch.device, half: bool) -> LoadedCLIP:
        """Load it, see `openai_clip.OpenAIFiles.load`."""
        found, open_clip = self._weights, _import_open_clip()
        tokenizer = _make_tokenizer(open_clip, found)
        with _quiet_root_logger(), _as_value_error(f"{found.title} cannot be built"):
            model: Any = open_clip.create_model(
                found.model,
                load_weights=False,
                pretrained_text=False,
                precision="fp16" if half else "fp32",
                device=device,
            )
        _load_weights(open_clip, model, found)
        model = model.eval().requires_grad_(False)
        return LoadedCLIP(
            model=model,
            tokenize=tokenizer,
            embed_dim=int(found.config["embed_dim"]),
            logit_scale=model.logit_scale.detach().float().exp().item(),
            input_size=_side(model.visual.image_size),
            pixel_mean=found.mean,
            pixel_std=found.std,
            dtype=torch.float16 if half else torch.float32,
        )


def known_open_clip_digest(weights: str, download_root: str | None = None) -> str | None:
    """`OpenCLIPFiles.digest`, None if the weights or open_clip are not there; downloads nothing.

    Raises:
        ValueError: the syntax, or the folder's config, is wrong.
    """
    try:
        found = _find(weights, download_root)
    except FileNotFoundError:
        return None
    return None if found.path is None else _digest(found)


# --- Names ----------------------------------------------------------------------------------------


def _find(weights: str, download_root: str | None) -> _Weights:
    """Resolve a name; nothing is downloaded."""
    rest = weights.removeprefix(OPEN_CLIP_PREFIX)
    if os.path.isdir(rest):
        return _find_folder(Path(rest))
    model, colon, source = rest.partition(":")
    if not model or rest.startswith("hf-hub:"):
        raise ValueError(f"{_KEY}: {weights!r}: {_SYNTAX}")
    open_clip = _import_open_clip()
    known = open_clip.list_models()
    if model not in known:
        raise FileNotFoundError(
            f"{_KEY}: {weights!r}: {model!r} is none of open_clip's models {', '.join(known)}; "
            f"{_SYNTAX}"
        )
    tags = open_clip.list_pretrained_tags_by_model(model)
    published = open_clip.get_pretrained_cfg(model, source) if source else {}
    if not published and not os.path.isfile(source):
        missing = f"{source!r} is neither a file nor a tag of {model}" if colon else "no weights"
        raise FileNotFoundError(
            f"{_KEY}: {weights!r}: {missing}; {_SYNTAX}; the tags of {model} are "
            f"{', '.join(tags) or 'none'}"
        )
    config = open_clip.get_model_config(model)
    if published:
        quick = f"{model}-quickgelu"
        if published.get("quick_gelu") and not config.get("quick_gelu") and quick in known:
            # open_clip warns only, and gives other embeddings than those that were trained
            raise ValueError(
                f"{_KEY}: {weights!r}: these weights were trained with another activation than "
                f"{model!r} has: name them {OPEN_CLIP_PREFIX}{quick}:{source}"
            )
        title, path = f"{OPEN_CLIP_PREFIX}{model}:{source}", _cached(published, download_root)
    else:
        title, path = f"{OPEN_CLIP_PREFIX}{model}:{Path(source).name}", Path(source)
    entries = [published] if published else [open_clip.get_pretrained_cfg(model, t) for t in tags]
    mean, std = _common_statistics(entries, weights, open_clip)
    return _Weights(title, model, config, mean, std, path, published)


def _find_folder(folder: Path) -> _Weights:
    open_clip = _import_open_clip()
    from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME

    wanted = (HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME)
    path, files = folder / _CONFIG, [folder / name for name in wanted if (folder / name).is_file()]
    if not path.is_file() or not files:
        raise FileNotFoundError(
            f"{_KEY}: the folder {str(folder)!r} needs {_CONFIG} and {' or '.join(wanted)}"
        )
    with _as_value_error(f"{path} is no config of an open_clip model"):
        content = json.loads(path.read_text(encoding="utf-8"))
        config, pixels = content["model_cfg"], content.get("preprocess_cfg", {})
        options = config["text_cfg"].get("tokenizer_kwargs", {})
        if unknown := sorted(set(options) - _TOKENIZER_OPTIONS):
            raise ValueError(f"tokenizer_kwargs {unknown}: only {sorted(_TOKENIZER_OPTIONS)}")
        mean = _colour(pixels.get("mean") or open_clip.OPENAI_DATASET_MEAN)
        std = _colour(pixels.get("std") or open_clip.OPENAI_DATASET_STD)
        config["embed_dim"] = int(config["embed_dim"])
    title = f"{OPEN_CLIP_PREFIX}{folder.resolve().name}"
    return _Weights(title, f"{_LOCAL}{folder}", config, mean, std, files[0], {})


def _common_statistics(
    entries: Sequence[Mapping[str, Any]], weights: str, open_clip: ModuleType
) -> tuple[_Colour, _Colour]:
    """Mean and deviation that all published weights of an architecture agree on."""
    found = {(_colour(entry["mean"]), _colour(entry["std"])) for entry in entries}
    if len(found) > 1:
        raise ValueError(
            f"{_KEY}: {weights!r}: models of this architecture were trained with different pixel "
            f"statistics, {sorted(found)}: put the file into a folder with {_CONFIG}, whose "
            "preprocess_cfg says the mean and std, and name the folder"
        )
    if found:
        return found.pop()
    return _colour(open_clip.OPENAI_DATASET_MEAN), _colour(open_clip.OPENAI_DATASET_STD)


def _colour(values: Sequence[float]) -> _Colour:
    red, green, blue = map(float, values)
    return red, green, blue


def _side(size: int | Sequence[int]) -> int:
    return size if isinstance(size, int) else int(size[0])


# --- Files ----------------------------------------------------------------------------------------


def _digest(found: _Weights) -> str:
    weights_sha256 = file_hash(str(found.path))
    described = [found.config, found.mean, found.std, weights_sha256]
    if tokenizer := _tokenizer_files(found):
        described.append({path.name: file_hash(path) for path in tokenizer})
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _tokenizer_files(found: _Weights) -> list[Path]:
    """What a folder's own tokeniser may be made of; none where it is CLIP's, of the package."""
    if not (found.model.startswith(_LOCAL) and found.config["text_cfg"].get("hf_tokenizer_name")):
        return []
    return [
        path
        for path in Path(found.model.removeprefix(_LOCAL)).iterdir()
        if path.suffix in _TOKENIZER_SUFFIXES and path.name != _CONFIG and path.is_file()
    ]


def _hub_names(published: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Repository of published weights, and the files that open_clip looks for, best first."""
    from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME

    repository, _, name = str(published.get("hf_hub", "")).rpartition("/")
    if not name:
        return repository, [HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME]
    return repository, [str(Path(name).with_suffix(".safetensors")), name]


def _cached(published: Mapping[str, Any], download_root: str | None) -> Path | None:
    """Published weights that were downloaded before, looked up without the network."""
    from huggingface_hub import try_to_load_from_cache

    repository, names = _hub_names(published)
    for name in names if repository else ():
        path = try_to_load_from_cache(repository, name, cache_dir=download_root or None)
        if isinstance(path, str):
            return Path(path)
    return None


def _download(found: _Weights, download_root: str | None) -> Path:
    open_clip, (repository, _) = _import_open_clip(), _hub_names(found.published)
    try:
        return Path(open_clip.download_pretrained(found.published, cache_dir=download_root or None))
    # the hub's client raises its HTTP library's errors, which are no OSErrors
    except Exception as error:
        raise FileNotFoundError(
            f"the weights of {found.title} are not in the cache of the model hub and could not be "
            f"downloaded ({error}); get them from https://huggingface.co/{repository}, and set "
            f"{_KEY} to {OPEN_CLIP_PREFIX}{found.model}:FILE"
        ) from error


def _load_weights(open_clip: ModuleType, model: Any, found: _Weights) -> None:
    """Put the weights into the model; nothing that the file holds is run."""
    path = Path(str(found.path))
    if path.suffix != ".safetensors":
        # open_clip reads a file again without this guard where reading it raises a TypeError
        read_torch_file(path)
    with _quiet_root_logger(), _as_value_error(f"{path} does not fit {found.title}"):
        open_clip.load_checkpoint(model, str(path), strict=True, weights_only=True)


def _make_tokenizer(open_clip: ModuleType, found: _Weights) -> Any:
    source = found.config["text_cfg"].get("hf_tokenizer_name")
    # else transformers asks, in a terminal, whether to run code that a folder brings along
    options = {"trust_remote_code": False} if source else {}
    try:
        with _quiet_root_logger():
            return open_clip.get_tokenizer(found.model, **options)
    # a missing package, the hub's client, a broken file: anything from OSError to KeyError
    except Exception as error:
        raise FileNotFoundError(
            f"the tokeniser of {found.title} comes from {source or 'a hub'!r} and cannot be made "
            f"({type(error).__name__}: {error}). It needs the package transformers and, the first "
            "time, the network; without, put its files (tokenizer.json, tokenizer_config.json) "
            f"beside the weights and an {_CONFIG}, and set {_KEY} to {OPEN_CLIP_PREFIX}FOLDER"
        ) from error


# --- The package ----------------------------------------------------------------------------------


def _import_open_clip() -> ModuleType:
    try:
        import open_clip
    except ImportError as error:
        raise FileNotFoundError(
            f"{_KEY} names a model of open_clip, which cannot be imported ({error}): "
            "pip install open_clip_torch"
        ) from error
    module: ModuleType = open_clip
    return module


@contextlib.contextmanager
def _quiet_root_logger() -> Iterator[None]:
    """Keep open_clip, which logs to the root logger, from configuring it and from being heard."""
    root, quiet = logging.getLogger(), logging.NullHandler()

    def is_error(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    root.addHandler(quiet)  # with a handler there, logging.info() adds none
    root.addFilter(is_error)
    try:
        yield
    finally:
        root.removeFilter(is_error)
        root.removeHandler(quiet)


@contextlib.contextmanager
def _as_value_error(what: str) -> Iterator[None]:
    """Say what failed: open_clip and torch raise anything from AssertionError to RuntimeError."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what}: {type(error).__name__}: {error}") from error
