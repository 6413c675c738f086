"""Detectors with random weights, whose times are those of trained ones."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from torch import nn

from hierkd.load_config import load_config
from hierkd.modeling.detector import HierKD
from hierkd.teachers.texts import make_text_embeddings, save_text_embeddings

__all__ = ["random_hierkd", "random_retinanet", "tame"]


def random_hierkd(
    config_file: str, num_classes: int, device: torch.device, opts: Sequence[str] = ()
) -> HierKD:
    """Build HierKD in inference mode with a vocabulary of random embeddings, without CLIP.

    Args:
        config_file: path of a YAML.
        num_classes: size of the vocabulary.
        device: where it runs.
        opts: KEY VALUE ... on top of the config.
    """
    names = [f"class {number}" for number in range(num_classes)]
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.npz"
        cfg = load_config(
            config_file,
            [
                *("MODEL.DEVICE", str(device), "MODEL.TEXT_CLASSIFIER.EMBEDDINGS", str(path)),
                *("DATASETS.TRAIN", "()", *opts),
            ],
        )
        text = cfg.MODEL.TEXT_CLASSIFIER
        rows = generator.standard_normal((num_classes + 1, text.EMBED_DIM)).astype(np.float32)
        stored = make_text_embeddings(
            names,
            rows[:-1],
            background=rows[-1],
            background_prompt=text.BACKGROUND_PROMPT,
            clip=cfg.MODEL.TEACHER.WEIGHTS,
            templates=(text.TEMPLATE,),
        )
        save_text_embeddings(stored, path)
        with _without_log("hierkd.teachers.teacher"):  # it says that the file is unchecked
            model: HierKD = build_model(cfg).eval()
        model.set_vocabulary(names)
    tame(model)
    return model


def random_retinanet(device: torch.device, opts: Sequence[str] = ()) -> nn.Module:
    """Build detectron2's own RetinaNet-R50-FPN in inference mode."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="pkg_resources is deprecated")
        from detectron2 import model_zoo
    # detectron2's own YAML holds a Python tuple, of which it warns.
    with _without_log("fvcore.common.config"):
        cfg = model_zoo.get_config("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    cfg.MODEL.DEVICE = str(device)
    cfg.merge_from_list(list(opts))
    model: nn.Module = build_model(cfg)
    tame(model)
    return model.eval()


def tame(model: nn.Module) -> None:
    """Keep the activations of a random ResNet in range.

    A frozen normalisation with its initial statistics passes values on as they are, and they grow
    from block to block until they overflow; halved in each, they do not.
    """
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.weight.fill_(0.5)


class _without_log:  # noqa: N801  (reads like contextlib's)
    """Messages below errors of one logger are dropped inside the block."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)

    def __enter__(self) -> None:
        self._level = self._logger.level
        self._logger.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        self._logger.setLevel(self._level)
