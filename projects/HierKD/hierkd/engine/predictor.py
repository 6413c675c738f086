"""Detect any named classes in a picture: the model, its weights and the test-time resize in one.

::

    predictor = OpenVocabularyPredictor(load_config("config.yaml", ["MODEL.WEIGHTS", "model.pth"]))
    predictor.set_vocabulary(["cat", "traffic cone"])
    instances = predictor(read_picture("street.jpg"))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import configurable
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Instances
from numpy.typing import NDArray
from torch import nn

from hierkd.data.resizing import ResizeShortestEdge
from hierkd.engine.checkpoint import HierKDCheckpointer
from hierkd.modeling.text_embeddings import check_names

__all__ = ["OpenVocabularyPredictor", "resolve_vocabulary"]


class OpenVocabularyPredictor:
    """One picture in, detections of the current vocabulary out.

    In the manner of :class:`detectron2.engine.DefaultPredictor` (BGR picture, shorter side resized
    as for testing, one picture at a time), with a vocabulary that can be changed between calls.
    """

    @configurable
    def __init__(
        self, *, model: nn.Module, min_size: int, max_size: int, image_format: str = "BGR"
    ) -> None:
        """Wrap a model; ``OpenVocabularyPredictor(cfg)`` builds one and loads its weights.

        Args:
            model: A :class:`hierkd.modeling.meta_arch.HierKD`; put into eval mode.
            min_size: Length the shorter side is resized to, in pixels.
            max_size: Limit of the longer side, in pixels.
            image_format: Channel order the model was trained with, "RGB" or "BGR".

        Raises:
            ValueError: ``image_format`` is neither.
        """
        if image_format not in ("RGB", "BGR"):
            raise ValueError(f"INPUT.FORMAT must be 'RGB' or 'BGR', got {image_format!r}")
        self.model: Any = model.eval()
        self.resize = ResizeShortestEdge([min_size, min_size], max_size)
        self.image_format = image_format

    @classmethod
    def from_config(cls, cfg: Any) -> dict[str, Any]:
        """Build the model, load ``MODEL.WEIGHTS`` and choose the first vocabulary.

        The vocabulary is the largest among those of the test datasets; without any, the training
        dataset's.

        Raises:
            ValueError: ``MODEL.WEIGHTS`` is empty, or holds no trained detector of this config.
            FileNotFoundError: ``MODEL.WEIGHTS`` is a path without a file.
        """
        if not cfg.MODEL.WEIGHTS:  # the checkpointer takes it for random weights
            raise ValueError("MODEL.WEIGHTS is empty: detecting needs trained weights")
        model: Any = build_model(cfg)
        HierKDCheckpointer(model).load_detector(cfg.MODEL.WEIGHTS)
        vocabularies = [MetadataCatalog.get(n).get("thing_classes", []) for n in cfg.DATASETS.TEST]
        largest: list[str] = max(vocabularies, key=len, default=[])
        if largest:
            model.set_vocabulary(largest)
        return {
            "model": model,
            "min_size": cfg.INPUT.MIN_SIZE_TEST,
            "max_size": cfg.INPUT.MAX_SIZE_TEST,
            "image_format": cfg.INPUT.FORMAT,
        }

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Class names that ``pred_classes`` index."""
        return tuple(self.model.vocabulary_names)

    def set_vocabulary(self, names: Sequence[str]) -> None:
        """Detect these classes from now on.

        Raises:
            ValueError: ``names`` is empty, has blank or repeated names, or ones that are no names
                (:func:`hierkd.modeling.text_embeddings.check_names`).
        """
        self.model.set_vocabulary(names)

    def prepare(self, image: NDArray[np.uint8]) -> dict[str, Any]:
        """Turn a picture into a dataset dict for the model's ``batched_inputs``.

        Args:
            image: (H, W, 3), BGR, 0..255.

        Returns:
            ``image`` (3, h, w) resized and in the model's channel order, ``height`` H, ``width`` W.

        Raises:
            ValueError: ``image`` is not such an array.
        """
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            raise ValueError(
                "expected a picture of shape (H, W, 3) and type uint8, found one of shape "
                f"{image.shape} and type {image.dtype}"
            )
        height, width = image.shape[:2]
        ordered = image[:, :, ::-1] if self.image_format == "RGB" else image
        resized = self.resize.get_transform(ordered).apply_image(ordered)
        tensor = torch.as_tensor(np.ascontiguousarray(resized.transpose(2, 0, 1)))
        return {"image": tensor, "height": height, "width": width}

    @torch.no_grad()
    def __call__(self, image: NDArray[np.uint8]) -> Instances:
        """Detect.

        Args:
            image: (H, W, 3), BGR, 0..255.

        Returns:
            Instances on the CPU, best first, with ``pred_boxes`` (XYXY, pixels of ``image``),
            ``scores`` and ``pred_classes`` (positions in :attr:`vocabulary`).
        """
        (output,) = self.model([self.prepare(image)])
        return output["instances"].to("cpu")


def resolve_vocabulary(text: str) -> list[str]:
    """Read class names as a user types them.

    Args:
        text: Names separated by commas, or the name of a registered dataset.

    Returns:
        The class names, or the dataset's vocabulary.

    Raises:
        ValueError: No names, a blank name between commas, a repeated name, or one that is no
            name (:func:`hierkd.modeling.text_embeddings.check_names`).
    """
    if text in DatasetCatalog.list():
        return list(MetadataCatalog.get(text).thing_classes)
    names = [name.strip() for name in text.split(",")]
    if not any(names):
        raise ValueError("the vocabulary is empty: give class names separated by commas")
    check_names(names, "the vocabulary")
    return names
