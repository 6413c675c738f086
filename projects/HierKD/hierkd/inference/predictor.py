"""Detect any named classes in pictures: the model, its weights and the test-time resize in one.

::

    from hierkd import OpenVocabularyPredictor

    predictor = OpenVocabularyPredictor.from_checkpoint("output/demo/hierkd")
    predictor.set_vocabulary(["cat", "traffic cone"])
    instances = predictor.predict("street.jpg", score_threshold=0.3)
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import configurable
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Instances
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from hierkd.checkpoint import HierKDCheckpointer
from hierkd.data.resizing import ResizeShortestEdge
from hierkd.inference.detections import DetectionFilter
from hierkd.inference.images import ImageInput, as_bgr
from hierkd.load_config import load_config
from hierkd.teachers.region_cache import MANIFEST
from hierkd.teachers.texts import as_read, check_names, read_text_lines

__all__ = ["OpenVocabularyPredictor", "find_checkpoint", "resolve_vocabulary"]

logger = logging.getLogger(__name__)

CONFIG_NAME = "config.yaml"  # what a training leaves in its folder
FINAL_WEIGHTS = "model_final.pth"  # what detectron2's trainer calls its last checkpoint
LAST_CHECKPOINT = "last_checkpoint"  # and where it notes the name of the latest
COMMAS = "[,\uff0c\u3001]"  # as a pattern: of Latin, full-width and ideographic script
_MINIATURE = "miniature_ovd_"  # what the names of the miniature's datasets begin with

# Images per forward pass of a list, where they have one size. [ours] Video frames and tiles gain on
# a GPU; photographs of many sizes go one by one, as in detectron2's own predictor.
_BATCH_SIZE = 8


class OpenVocabularyPredictor:
    """Pictures in, detections of the current vocabulary out.

    In the manner of :class:`detectron2.engine.DefaultPredictor`, with a vocabulary that can be
    changed between calls. Threads may share a predictor: calls take turns. Where other threads
    change the vocabulary, pass ``vocabulary`` to :meth:`predict`.
    """

    @configurable
    def __init__(
        self,
        *,
        model: nn.Module,
        min_size: int,
        max_size: int,
        image_format: str = "BGR",
        trained_on: Sequence[str] = (),
    ) -> None:
        """Wrap a model; ``OpenVocabularyPredictor(cfg)`` builds one and loads its weights.

        Args:
            model: A :class:`hierkd.modeling.detector.HierKD`; put into eval mode.
            min_size: What the shorter side is resized to, in pixels.
            max_size: Limit of the longer side, in pixels.
            image_format: Channel order the model was trained with, "RGB" or "BGR".
            trained_on: Names of the datasets it was trained on; none are not known.
        """
        self.model: Any = model.eval()
        self.resize = ResizeShortestEdge([min_size, min_size], max_size)
        self.image_format = image_format
        self.trained_on = tuple(trained_on)
        self._lock = threading.RLock()

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike[str],
        config_file: str | os.PathLike[str] | None = None,
        *,
        device: str | torch.device | None = None,
        opts: Sequence[Any] = (),
    ) -> OpenVocabularyPredictor:
        """Load a trained detector.

        Its vocabulary is the largest among those of the config's datasets.

        Args:
            path: A training's folder, a checkpoint with its config.yaml beside it, or, with
                ``config_file``, any checkpoint or URL that ``MODEL.WEIGHTS`` takes.
            config_file: Config of the checkpoint.
            device: "cpu", "cuda", "cuda:1", ...; None is the config's. Where there is no CUDA
                device, the CPU is used, and a warning logged.
            opts: Config overrides: KEY, VALUE, KEY, VALUE, ...; the last word on everything.

        Raises:
            FileNotFoundError: There is no such folder, checkpoint, config or CLIP.
            ValueError: The config or an override is wrong, or the file holds no such detector.
        """
        config, weights = find_checkpoint(path, config_file)
        overrides = ["MODEL.WEIGHTS", weights, *map(str, opts)]
        if device is not None:
            overrides += ["MODEL.DEVICE", str(device)]
        predictor: OpenVocabularyPredictor = cls(load_config(config, overrides))
        return predictor

    @classmethod
    def from_config(cls, cfg: Any) -> dict[str, Any]:
        """Build the model with its weights and the largest vocabulary of the test datasets."""
        if not cfg.MODEL.WEIGHTS:  # the checkpointer takes it for random weights
            raise ValueError("MODEL.WEIGHTS is empty: detecting needs trained weights")
        model: Any = build_model(_for_inference(cfg))
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
            "trained_on": tuple(cfg.DATASETS.TRAIN),
        }

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Class names that ``pred_classes`` index."""
        return tuple(self.model.vocabulary_names)

    @property
    def knows_icons_only(self) -> bool:
        """Whether it was trained on the miniature alone: what it finds in photographs is noise."""
        return bool(self.trained_on) and all(n.startswith(_MINIATURE) for n in self.trained_on)

    @property
    def device(self) -> torch.device:
        """Where the model runs; detections come back on the CPU."""
        return torch.device(self.model.device)

    def set_vocabulary(self, names: Sequence[str]) -> None:
        """Detect these classes, each named once, from now on; CLIP is loaded if a name is new.

        Raises:
            ValueError: They are no names, or ``MODEL.TEXT_CLASSIFIER.EMBEDDINGS`` lacks one.
            FileNotFoundError: CLIP is needed, and its weights are not there.
        """
        with self._lock:
            self.model.set_vocabulary(names)

    def prepare(self, image: ImageInput, channels: str = "BGR") -> dict[str, Any]:
        """Turn a picture into one of the model's ``batched_inputs``; see :func:`as_bgr`.

        Returns:
            ``image`` (3, h, w) resized and in the model's channel order, ``height`` H, ``width`` W.
        """
        array = as_bgr(image, channels)
        height, width = array.shape[:2]
        ordered = array[:, :, ::-1] if self.image_format == "RGB" else array
        resized = self.resize.get_transform(ordered).apply_image(ordered)
        tensor = torch.as_tensor(np.ascontiguousarray(resized.transpose(2, 0, 1)))
        return {"image": tensor, "height": height, "width": width}

    def __call__(self, image: NDArray[np.uint8]) -> Instances:
        """Detect in one picture (H, W, 3), BGR, 0..255, as detectron2's predictor does."""
        return self.predict(image)

    @torch.no_grad()
    def predict(
        self,
        images: ImageInput | Sequence[ImageInput],
        *,
        vocabulary: Sequence[str] | None = None,
        score_threshold: float = 0.0,
        top_k: int | None = None,
        class_thresholds: Mapping[str, float] | None = None,
        channels: str = "BGR",
        batch_size: int = _BATCH_SIZE,
    ) -> Any:
        """Detect in one picture or in several.

        Args:
            images: A path, a Pillow image, an array (H, W, 3) uint8 or a tensor (3, H, W) uint8;
                or a list or tuple of these, or an array or tensor with one more dimension in front.
            vocabulary: Class names for this call alone; None is the current vocabulary.
            score_threshold: Detections below this score, 0..1, are left out.
            top_k: Of the others, the best ones of each image; None is all of them.
            class_thresholds: Class name to a threshold that takes the place of ``score_threshold``.
            channels: Order of the channels of arrays and tensors, "BGR" or "RGB".
            batch_size: Most images in one forward pass. Only images that the model sees in one size
                share a pass, so that no padding touches the scores.

        Returns:
            Instances of the one picture, or a list of them, on the CPU, best first, with
            ``pred_boxes`` (XYXY, pixels of the picture), ``scores`` and ``pred_classes`` (positions
            in the vocabulary). At most ``TEST.DETECTIONS_PER_IMAGE`` each.

        Raises:
            FileNotFoundError, ValueError, TypeError: Something is no picture (see :func:`as_bgr`;
                in a list, its position is named), or an option is wrong.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        keep = DetectionFilter(score_threshold, top_k, dict(class_thresholds or {}))
        several = _is_several(images)
        pictures: Any = images if several else [images]
        with_names = self.model.vocabulary if vocabulary is not None else nullcontext
        found: dict[int, Instances] = {}
        with self._lock, with_names(vocabulary):
            names = self.vocabulary
            keep.check_vocabulary(names)
            for start in range(0, len(pictures), batch_size):
                by_size: dict[Any, dict[int, Any]] = defaultdict(dict)
                for i in range(start, min(start + batch_size, len(pictures))):
                    try:
                        one = self.prepare(pictures[i], channels)
                    except (FileNotFoundError, ValueError, TypeError) as error:
                        raise type(error)(
                            f"image {i}: {error}" if several else str(error)
                        ) from error
                    by_size[one["image"].shape][i] = one
                for inputs in by_size.values():
                    outputs = self.model(list(inputs.values()))
                    for i, output in zip(inputs, outputs, strict=True):
                        found[i] = keep(output["instances"].to("cpu"), names)
        return [found[i] for i in range(len(pictures))] if several else found[0]


def _for_inference(cfg: Any) -> Any:
    """The config without what training alone needs; CLIP takes the place of a missing cache."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.IKD.LOSS_WEIGHT = 0.0  # no look at the regions, nor at the annotations they are of
    folder = cfg.MODEL.TEACHER.CACHE
    if folder and not Path(folder, MANIFEST).is_file():
        logger.warning("MODEL.TEACHER.CACHE: %r is not there, class names go to CLIP", folder)
        cfg.MODEL.TEACHER.CACHE = ""
    cfg.freeze()
    return cfg


def _is_several(images: Any) -> bool:
    if isinstance(images, str | bytes | os.PathLike | Image.Image):
        return False
    if isinstance(images, np.ndarray | Tensor):
        return images.ndim == 4
    return isinstance(images, Sequence)


def find_checkpoint(
    path: str | os.PathLike[str], config_file: str | os.PathLike[str] | None = None
) -> tuple[str, str]:
    """Find the config and the weights that one path stands for.

    Args:
        path: A training's folder - the checkpoint that its last_checkpoint names, or else its
            model_final.pth - or a checkpoint. May be a URL, if ``config_file`` is given.
        config_file: The config; None is the config.yaml in the folder, or beside the checkpoint.

    Raises:
        FileNotFoundError: One of them does not exist.
        ValueError: ``path`` is a YAML file.
    """
    text = os.fspath(path)
    if text.lower().endswith((".yaml", ".yml")):
        raise ValueError(f"{text!r} is a config: give the checkpoint, and this as config_file")
    folder = Path(text)
    weights = text
    if folder.is_dir():
        last = folder / LAST_CHECKPOINT
        # It names model_final.pth, unless a training went on or began anew after it.
        noted = last.read_text(encoding="utf-8", errors="replace").strip() if last.is_file() else ""
        there = [n for n in (noted, FINAL_WEIGHTS) if n and (folder / n).is_file()]
        if not there:
            raise FileNotFoundError(
                f"{folder}: there is no {noted or FINAL_WEIGHTS}: is it a training's folder?"
            )
        weights = str(folder / there[0])
    elif not folder.is_file() and "://" not in text:
        raise FileNotFoundError(
            f"no checkpoint and no training's folder {text!r} (looked from {os.getcwd()!r})"
        )
    config = Path(weights).parent / CONFIG_NAME if config_file is None else Path(config_file)
    if not config.is_file():
        raise FileNotFoundError(
            f"no config {str(config)!r}: give the one that {text} was trained with as config_file"
        )
    return str(config), weights


def resolve_vocabulary(text: str, *, merge_repeated: bool = True) -> list[str]:
    """Read class names as a user types them.

    Args:
        text: Names separated by commas of any script, or the name of a registered dataset, or the
            path of a file with one name a line (or, in a .json, a list of names).
        merge_repeated: Names that are one to CLIP become one, with a note.

    Raises:
        ValueError: They are no names (:func:`hierkd.teachers.texts.check_names`), or look like
            something else: a folder, a path, names between other marks, a misspelt dataset.
        FileNotFoundError: A .txt or .json is named that does not exist.
    """
    if text in DatasetCatalog.list():
        return list(MetadataCatalog.get(text).thing_classes)
    if os.path.isfile(text) or text.endswith((".txt", ".json")):
        names = read_text_lines(text)
        return _each_once(names) if merge_repeated else names
    names = [name.strip() for name in re.split(COMMAS, text)]
    if not any(names):
        raise ValueError("the vocabulary is empty: give class names separated by commas")
    if os.path.isdir(text) or any(mark in text for mark in ";/"):
        raise ValueError(
            f"the vocabulary {text!r} is neither a file nor names between commas; names with ';' "
            "or '/' go into a text file"
        )
    if "_" in text and (near := get_close_matches(text, DatasetCatalog.list(), cutoff=0.8)):
        raise ValueError(
            f"the vocabulary {text!r} is no registered dataset; did you mean {near[0]!r}? A class "
            "of this name goes into a text file"
        )
    if merge_repeated:
        names = _each_once(names)
    check_typed(names, "the vocabulary")
    if len(names) == 1 and _is_a_list(names[0]):
        logger.warning("the vocabulary is one class, %r; commas would make it several", names[0])
    return names


def _each_once(names: Sequence[str]) -> list[str]:
    """Leave out names that CLIP reads as an earlier one."""
    first: dict[str, str] = {}
    repeated = [name for name in names if first.setdefault(as_read(name), name) is not name]
    if repeated:
        logger.warning(
            "the vocabulary repeats %s: each counts once", ", ".join(map(repr, repeated))
        )
    return list(first.values())


def _is_a_list(name: str) -> bool:
    """Whether a name of several words is no registered dataset's, but each of its words is."""
    words = name.split()
    if len(words) < 2:
        return False
    known = {
        each
        for dataset in DatasetCatalog.list()
        for each in MetadataCatalog.get(dataset).get("thing_classes", ())
    }
    return known.issuperset(words) and name not in known


def check_typed(names: Sequence[str], names_from: str) -> None:
    """Refuse names that still wear the marks of a list, and what ``check_names`` refuses.

    Raises:
        ValueError: A name holds a bracket, a double quote or ``|``, or is between single quotes.
    """
    for name in names:
        if set(name) & set('[]{}|"\u201c\u201d') or (name[:1] + name[-1:]) in (
            "''",
            "\u2018\u2019",
        ):
            raise ValueError(
                f"{names_from}: {name!r} has brackets, quotes or '|': expected names between "
                "commas, such as: cat, traffic cone"
            )
    check_names(names, names_from)
