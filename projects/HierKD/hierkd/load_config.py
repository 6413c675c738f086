"""Reading a config: defaults, then the YAML file, then KEY VALUE pairs."""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2.config import get_cfg

import hierkd.data
import hierkd.miniature
import hierkd.modeling  # noqa: F401  (they fill detectron2's registries)
from hierkd.config import add_hierkd_config
from hierkd.data.custom import has_no_captions, register_definitions
from hierkd.teachers.texts import OWN_EMBEDDINGS, read_templates

__all__ = ["load_config", "requested_device"]

logger = logging.getLogger(__name__)

# What yacs and fvcore raise; TypeError: an empty file, or a key below a value
_MERGE_ERRORS = (KeyError, ValueError, AttributeError, AssertionError, TypeError)
# Least and largest values of keys whose misprints would go unnoticed.
_RANGES = {
    "SOLVER.MAX_ITER": (1, math.inf),
    "SOLVER.CHECKPOINT_PERIOD": (1, math.inf),
    "SOLVER.IMS_PER_BATCH": (1, math.inf),
    "INPUT.MIN_SIZE_TEST": (0, math.inf),
    "INPUT.MAX_SIZE_TEST": (32, math.inf),
    "TEST.IMS_PER_BATCH": (1, math.inf),
    "TEST.DETECTIONS_PER_IMAGE": (1, math.inf),
    "TEST.VIS_PICTURES": (0, math.inf),
    "VIS_PERIOD": (0, math.inf),
    "MODEL.ATSS.NMS_THRESH_TEST": (0, 1),
    "MODEL.ATSS.SCORE_THRESH_TEST": (0, 1),
    "MODEL.ATSS.TOPK": (1, math.inf),
    "MODEL.IKD.LOSS_WEIGHT": (0, math.inf),
    "MODEL.IKD.IOU_THRESH": (0, 1),
    "MODEL.IKD.MAX_CROPS_PER_IMAGE": (0, math.inf),
    "MODEL.GKD.LOSS_WEIGHT": (0, math.inf),
}
# Keys of detectron2's that would be set in vain, and what they must be.
_NOT_READ = {
    "DATALOADER.SAMPLER_TRAIN": "TrainingSampler",
    "DATALOADER.REPEAT_THRESHOLD": 0.0,
    "TEST.AUG.ENABLED": False,
    "MODEL.LOAD_PROPOSALS": False,  # detectron2 runs the pickled code of proposal files
}


def load_config(config_file: str, overrides: Sequence[str] = ()) -> Any:
    """Build the frozen config of a run.

    Where there is no CUDA device, ``MODEL.DEVICE`` falls back to the CPU and
    ``SOLVER.AMP.ENABLED`` to float32, with a note. The teacher and the text embeddings are sought
    from the config's folder, too, and ``OUTPUT_DIR`` is where a training's config.yaml lies, unless
    overridden. Prompt templates of a ``TEMPLATES_FILE`` go into ``TEMPLATES``. The datasets of
    ``DATASETS.DEFINITIONS`` are registered; where such a training set has no captions at all,
    ``MODEL.GKD.LOSS_WEIGHT`` falls back to 0, with a note.

    Args:
        config_file: path of a YAML; "" takes the defaults.
        overrides: KEY VALUE KEY VALUE ..., as given on the command line.

    Raises:
        FileNotFoundError: if the file, or its ``_BASE_``, does not exist.
        ValueError: if the file is not YAML, a key is unknown, a value has the wrong type or is out
            of its range (names the file or the pair, and the key), a key of detectron2's is set
            that nothing here reads, or a file that a key names is wrong.
    """
    cfg = _merge(config_file, overrides)
    if config_file:
        _look_around(cfg, Path(config_file).resolve(), moved="OUTPUT_DIR" not in overrides[::2])
    device = _device(cfg.MODEL.DEVICE)
    if device.type == "cuda" and not torch.cuda.is_available():
        logger.warning("MODEL.DEVICE is %s, but there is no CUDA device: using the CPU", device)
        cfg.MODEL.DEVICE = "cpu"
    if cfg.SOLVER.AMP.ENABLED and not cfg.MODEL.DEVICE.startswith("cuda"):
        logger.warning("SOLVER.AMP.ENABLED needs a CUDA device: training in float32")
        cfg.SOLVER.AMP.ENABLED = False
    for key, (least, most) in _RANGES.items():
        if not least <= (number := _value(cfg, key)) <= most:
            expected = f"{least:g} or more" if most == math.inf else f"{least:g} to {most:g}"
            raise ValueError(f"{key} must be {expected}, got {number}")
    for key, only in _NOT_READ.items():
        if (found := _value(cfg, key)) != only:
            raise ValueError(f"{key} is {found!r}, but is not read here: leave it at {only!r}")
    _read_templates_file(cfg.MODEL.TEXT_CLASSIFIER)
    keep_empty = not cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    register_definitions(cfg.DATASETS.DEFINITIONS, keep_empty=keep_empty)
    if cfg.MODEL.GKD.LOSS_WEIGHT > 0 and has_no_captions(cfg.DATASETS.TRAIN):
        logger.warning(
            "%s has no captions: global distillation is off (MODEL.GKD.LOSS_WEIGHT 0.0). Name a "
            "captions file in its YAML, or `captions: from_class_names`, to have it.",
            ", ".join(cfg.DATASETS.TRAIN),
        )
        cfg.MODEL.GKD.LOSS_WEIGHT = 0.0
    cfg.freeze()
    return cfg


def _look_around(cfg: Any, config: Path, *, moved: bool) -> None:
    """Find what a config names from where it lies: runs are copied, and used from elsewhere.

    Sought is from its folder and those around it, and, by the name alone, beside it. ``moved``: the
    config.yaml of a training's folder has this folder for its OUTPUT_DIR.
    """
    folder = config.parent
    if moved and config.name == "config.yaml" and any(folder.glob("*.pth")):
        cfg.OUTPUT_DIR = str(folder)
    teacher, text = cfg.MODEL.TEACHER, cfg.MODEL.TEXT_CLASSIFIER
    for node, key, own in ((teacher, "WEIGHTS", ""), (text, "EMBEDDINGS", OWN_EMBEDDINGS)):
        if node[key] and not Path(node[key]).exists():
            places = [each / node[key] for each in config.parents]
            places += [folder / Path(node[key]).name, folder / own]
            node[key] = str(next(filter(Path.is_file, places), node[key]))


def _read_templates_file(text: Any) -> None:
    """Put the templates of MODEL.TEXT_CLASSIFIER.TEMPLATES_FILE into TEMPLATES."""
    key = "MODEL.TEXT_CLASSIFIER.TEMPLATES_FILE"
    if not text.TEMPLATES_FILE:
        return
    if text.TEMPLATES:
        raise ValueError(f"{key} and TEMPLATES are both set: leave one of them empty")
    try:
        text.TEMPLATES = read_templates(text.TEMPLATES_FILE)
    except (OSError, ValueError) as error:
        raise type(error)(f"{key}: {error}") from error
    text.TEMPLATES_FILE = ""


def requested_device(config_file: str, overrides: Sequence[str] = ()) -> str:
    """Return ``MODEL.DEVICE`` as the config says it, whether this machine has it or not.

    Raises as :func:`load_config`.
    """
    return str(_merge(config_file, overrides).MODEL.DEVICE)


def _device(name: str) -> torch.device:
    """The device of that name; a CUDA device also where there is none."""
    try:
        device = torch.device(name)
        if device.type != "cuda":
            torch.empty(0, device=device)
    except (RuntimeError, ImportError, AssertionError) as error:  # one or other for each kind
        why = str(error).split(". ")[0].split("\n")[0]  # torch may list all its kernels
        raise ValueError(f"MODEL.DEVICE: no device {name!r}: {why}") from error
    return device


def _merge(config_file: str, overrides: Sequence[str]) -> Any:
    """detectron2's and our defaults, with a file and the command line merged into them."""
    cfg = get_cfg()
    add_hierkd_config(cfg)
    if config_file:
        if not os.path.isfile(config_file):
            raise FileNotFoundError(f"--config-file: no file {config_file!r}")
        try:
            cfg.merge_from_file(config_file, allow_unsafe=False)  # detectron2 allows code in it
        except (*_MERGE_ERRORS, yaml.YAMLError, RecursionError) as error:
            raise ValueError(f"{config_file}: {_message(error, cfg)}") from error
    if flags := [key for key in overrides[::2] if key.startswith("-")]:
        raise ValueError(f"{flags[0]!r} stands among the KEY VALUE pairs: options go before them")
    if len(overrides) % 2:
        raise ValueError(f"{overrides[-1]!r}: expected KEY VALUE pairs, but no value is behind it")
    for key, value in zip(overrides[::2], overrides[1::2], strict=True):
        try:
            cfg.merge_from_list([key, _as_float(cfg, key, value)])
        except _MERGE_ERRORS as error:
            raise ValueError(f"KEY VALUE pair {key} {value!r}: {_message(error, cfg)}") from error
    return cfg


def _value(cfg: Any, key: str) -> Any:
    """The value of a dotted key."""
    return reduce(getitem, key.split("."), cfg)


def _as_float(cfg: Any, key: str, value: Any) -> Any:
    """A whole number as a float where the key holds one: yacs tells 1 from 1.0."""
    try:
        is_float = isinstance(_value(cfg, key), float)
        return float(int(value)) if is_float and not isinstance(value, float) else value
    except (KeyError, TypeError, ValueError, AttributeError):
        return value


def _keys(node: Any, prefix: str = "") -> Iterator[str]:
    """All dotted keys, of nodes too."""
    for name, value in node.items():
        yield prefix + name
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{name}.")


def _message(error: Exception, cfg: Any) -> str:
    # str() of a KeyError is the repr of its message
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if "'NoneType' is not iterable" in text:
        return "the file is empty"
    if unknown := re.search(r"Non-existent (?:config )?key: (\S+)", text):
        near = get_close_matches(unknown[1], list(_keys(cfg)), n=1, cutoff=0.8)
        text += "".join(f"; did you mean {key}?" for key in near)
    if "(<class 'float'> vs. <class 'int'>)" in text:
        text += "; write the number with a decimal point"
    return text
