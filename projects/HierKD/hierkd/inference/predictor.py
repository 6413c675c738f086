"""Detect any named classes in pictures: the model, its weights and the test-time resize in one.

::

    from hierkd import OpenVocabularyPredictor

    predictor = OpenVocabularyPredictor("output/demo/hierkd")
    predictor.set_vocabulary(["cat", "traffic cone"])
    predictor.predict("street.jpg", score_threshold=0.3).save("found.jpg")
"""

from __future__ import annotations

import glob
import logging
import os
import re
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Instances
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from hierkd.checkpoint import HierKDCheckpointer
from hierkd.data.coco_json import some
from hierkd.data.resizing import ResizeShortestEdge
from hierkd.inference.detections import DetectionFilter, Detections
from hierkd.inference.examples import Examples, embed_examples
from hierkd.inference.images import ImageInput, as_bgr
from hierkd.inference.video import find_inputs, is_video
from hierkd.load_config import load_config
from hierkd.teachers.region_cache import MANIFEST
from hierkd.teachers.texts import check_names, each_once, read_text_lines

__all__ = ["OpenVocabularyPredictor", "find_checkpoint", "for_inference", "resolve_vocabulary"]

logger = logging.getLogger(__name__)

CONFIG_NAME = "config.yaml"  # what a training leaves in its folder
FINAL_WEIGHTS = "model_final.pth"  # what detectron2's trainer calls its last checkpoint
LAST_CHECKPOINT = "last_checkpoint"  # and where it notes the name of the latest
COMMAS = "[,\uff0c\u3001]"  # as a pattern: of Latin, full-width and ideographic script
# What people put around and between names who think of Python, of a shell, or of Grounding DINO.
_LIST_MARKS = re.compile(r"""[][{}|"`\u201c\u201d]|^['\u2018].*['\u2019]$|\s\.\s|\.$""")
MINIATURE_PREFIX = "miniature_ovd_"  # what the names of the miniature's datasets begin with

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
        path: str | os.PathLike[str] | None = None,
        config_file: str | os.PathLike[str] | None = None,
        *,
        device: str | torch.device | None = None,
        opts: Sequence[Any] = (),
        model: nn.Module | None = None,
        min_size: int = 800,
        max_size: int = 1333,
        image_format: str = "BGR",
        trained_on: Sequence[str] = (),
        weights: str = "",
    ) -> None:
        """Load a trained detector; ``OpenVocabularyPredictor(cfg)`` does so by a config in memory.

        Its vocabulary is the largest among those of the config's datasets.

        Args:
            path: A training's folder, a checkpoint with its config.yaml beside it, or, with
                ``config_file``, any checkpoint or URL that ``MODEL.WEIGHTS`` takes.
            config_file: Config of the checkpoint.
            device: "cpu", "cuda", "cuda:1", ...; None is the config's. Where there is no CUDA
                device, the CPU is used, and a warning logged.
            opts: Config overrides: KEY, VALUE, KEY, VALUE, ...; the last word on everything.
            model: In place of a path and its options, a :class:`hierkd.modeling.detector.HierKD`;
                put into eval mode.
            min_size: What the shorter side is resized to, in pixels.
            max_size: Limit of the longer side, in pixels.
            image_format: Channel order the model was trained with, "RGB" or "BGR".
            trained_on: Names of the datasets it was trained on; none are not known.
            weights: Where they are from, for people to read.

        Raises:
            FileNotFoundError: There is no such folder, checkpoint, config or CLIP.
            ValueError: The config or an override is wrong, or the file holds no such detector.
        """
        if model is None:
            if path is None:
                raise TypeError("a predictor needs a training's folder, a checkpoint or a config")
            config, found = find_checkpoint(path, config_file)
            overrides = ["MODEL.WEIGHTS", found, *map(str, opts)]
            if device is not None:
                overrides += ["MODEL.DEVICE", str(device)]
            self.__init__(load_config(config, overrides))  # type: ignore[misc]
            return
        self.model: Any = model.eval()
        self.resize: Any = ResizeShortestEdge([min_size, min_size], max_size)
        self.image_format = image_format
        self.trained_on = tuple(trained_on)
        self.weights = weights
        self._lock = threading.RLock()

    @classmethod
    def from_checkpoint(cls, *args: Any, **options: Any) -> OpenVocabularyPredictor:
        """Do the same as ``OpenVocabularyPredictor(path, ...)``."""
        predictor: OpenVocabularyPredictor = cls(*args, **options)
        return predictor

    @classmethod
    def from_config(cls, cfg: Any) -> dict[str, Any]:
        """Build the model with its weights and the largest vocabulary of the test datasets."""
        if not cfg.MODEL.WEIGHTS:  # the checkpointer takes it for random weights
            raise ValueError("MODEL.WEIGHTS is empty: detecting needs trained weights")
        model: Any = build_model(for_inference(cfg))
        HierKDCheckpointer(model).load_detector(cfg.MODEL.WEIGHTS)
        vocabularies = [MetadataCatalog.get(n).get("thing_classes", []) for n in cfg.DATASETS.TEST]
        largest: list[str] = max(vocabularies, key=len, default=[])
        stored: Any = getattr(model.teacher, "stored", None)
        if largest or stored:
            model.set_vocabulary(largest or stored.names)
        return {
            "model": model,
            "min_size": cfg.INPUT.MIN_SIZE_TEST,
            "max_size": cfg.INPUT.MAX_SIZE_TEST,
            "image_format": cfg.INPUT.FORMAT,
            "trained_on": tuple(cfg.DATASETS.TRAIN),
            "weights": cfg.MODEL.WEIGHTS,
        }

    def __repr__(self) -> str:
        names = some(self.vocabulary)
        return (
            f"OpenVocabularyPredictor({self.weights!r} on {str(self.device)!r}, trained on "
            f"{', '.join(self.trained_on) or 'unknown'}, {len(self.vocabulary)} classes: {names})"
        )

    @property
    def vocabulary(self) -> tuple[str, ...]:
        """Class names that ``pred_classes`` index."""
        return tuple(self.model.vocabulary_names)

    @property
    def knows_icons_only(self) -> bool:
        """Whether it was trained on the miniature alone: what it finds in photographs is noise."""
        return bool(self.trained_on) and all(
            n.startswith(MINIATURE_PREFIX) for n in self.trained_on
        )

    @property
    def device(self) -> torch.device:
        """Where the model runs; detections come back on the CPU."""
        return torch.device(self.model.device)

    def set_vocabulary(self, names: Sequence[str] = (), examples: Examples | None = None) -> None:
        """Detect these classes, each named once, from now on; CLIP is loaded if one is new.

        Args:
            names: Class names.
            examples: Class name to a list of pictures of the object, or of (picture, box) pairs
                with the object's box, XYXY in pixels of the picture; arrays and tensors are BGR. A
                class that is among ``names``, too, is the mean of what CLIP says of both; the
                others follow, and nothing is made of their names.

        Raises:
            ValueError: They are no names, ``MODEL.TEXT_CLASSIFIER.EMBEDDINGS`` lacks one, or an
                example cannot be used (:func:`hierkd.inference.examples.embed_examples`).
            FileNotFoundError: An example is missing, or CLIP is needed and its weights are.
        """
        with self._lock:
            self.model.set_vocabulary(*self._classes(names, examples))

    def _classes(
        self, names: Sequence[str], examples: Examples | None
    ) -> tuple[Sequence[str], Tensor | None]:
        """All class names and their embeddings (K, D); no embeddings if names are all there is."""
        if not examples:
            return names, None
        new = [] if isinstance(names, str) else [name for name in examples if name not in names]
        check_names([*names, *new] if new else names, "the vocabulary")
        seen = {name: embed_examples(self, name, each) for name, each in examples.items()}
        texts = self.model.teacher.encode_classes(names) if names else ()
        rows = dict(zip(names, texts, strict=True))
        for name, row in seen.items():
            rows[name] = F.normalize(rows[name].to(row) + row, dim=0) if name in rows else row
        return list(rows), torch.stack(list(rows.values()))

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
        examples: Examples | None = None,
        score_threshold: float = 0.0,
        top_k: int | None = None,
        class_thresholds: Mapping[str, float] | None = None,
        channels: str = "BGR",
        batch_size: int = _BATCH_SIZE,
    ) -> Any:
        """Detect in one picture or in several.

        Args:
            images: A path, a Pillow image, an array (H, W, 3) uint8 or a tensor (3, H, W) uint8;
                or several: a folder, a glob such as "photos/*.jpg", a list or tuple of the former,
                or an array or tensor with one more dimension in front.
            vocabulary: Class names for this call alone; None, without ``examples``, is the current
                vocabulary.
            examples: Classes for this call alone, as in :meth:`set_vocabulary`.
            score_threshold: Detections below this score, 0..1, are left out.
            top_k: Of the others, the best ones of each image; None is all of them.
            class_thresholds: Class name to a threshold that takes the place of ``score_threshold``.
            channels: Order of the channels of arrays and tensors: "BGR", as of OpenCV, or "RGB".
            batch_size: Most images in one forward pass. Only images that the model sees in one size
                share a pass, so that no padding touches the scores.

        Returns:
            :class:`hierkd.inference.detections.Detections` of the one picture, or a list of them,
            on the CPU, best first: detectron2's ``Instances`` with ``pred_boxes`` (XYXY, pixels of
            the picture), ``scores`` and ``pred_classes`` (positions in the vocabulary), which can
            be drawn and saved. At most ``TEST.DETECTIONS_PER_IMAGE`` each.

        Raises:
            FileNotFoundError, ValueError, TypeError: Something is no picture (see :func:`as_bgr`;
                in a list, its position is named), or an option is wrong.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        keep = DetectionFilter(score_threshold, top_k, dict(class_thresholds or {}))
        images = _listed(images)
        several = _is_several(images)
        pictures: Any = images if several else [images]
        found: dict[int, Instances] = {}
        with self._lock, ExitStack() as stack:
            if vocabulary is not None or examples:
                classes = self._classes(vocabulary or (), examples)
                stack.enter_context(self.model.vocabulary(*classes))
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
                        kept = keep(output["instances"].to("cpu"), names)
                        found[i] = Detections(kept, names, pictures[i], channels)
        return [found[i] for i in range(len(pictures))] if several else found[0]


def for_inference(cfg: Any) -> Any:
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


def _listed(images: Any) -> Any:
    """The pictures of a folder or a glob; anything else as it is."""
    if not isinstance(images, str | os.PathLike) or os.path.isfile(images):
        return images
    text = os.fspath(images)
    if not os.path.isdir(text) and not glob.has_magic(text):
        return images
    return [path for path in find_inputs([text]) if not is_video(path)]


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
        numbered = all(re.match(r"\d+[.:)]?\s", name) for name in names)
        for name in names:
            if numbered or re.match(r"[-*#]\s", name):
                raise ValueError(f"{text}: {name!r}: expected a name alone on each line")
        if len(names) == 1:
            _warn_of_a_list(names[0])
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
    if len(names) == 1:
        _warn_of_a_list(names[0])
    return names


def _each_once(names: Sequence[str]) -> list[str]:
    """Leave out names that CLIP reads as an earlier one."""
    kept, repeated = each_once(names)
    if repeated:
        logger.warning(
            "the vocabulary repeats %s: each counts once", ", ".join(map(repr, repeated))
        )
    return kept


def _warn_of_a_list(name: str) -> None:
    """Log it if a name has commas, or if it is no registered dataset's, but each word of it is."""
    words = [word for word in name.split() if word not in ("and", "or")]
    known = registered_names()
    if re.search(COMMAS, name) or (
        len(words) > 1 and known.issuperset(words) and name not in known
    ):
        logger.warning(
            "the vocabulary is one class, %r; commas, in a file line breaks, would make it several",
            name,
        )


def registered_names(prefix: str = "") -> set[str]:
    """Class names of all registered datasets whose own name begins with ``prefix``."""
    datasets = [name for name in DatasetCatalog.list() if name.startswith(prefix)]
    return {
        each for name in datasets for each in MetadataCatalog.get(name).get("thing_classes", ())
    }


def check_typed(names: Sequence[str], names_from: str) -> None:
    """Refuse names that still wear the marks of a list, and what ``check_names`` refuses.

    Raises:
        ValueError: A name holds a bracket, a double quote, ``|`` or half a pair of parentheses, is
            between single quotes, or has a full stop behind it.
    """
    for name in names:
        if _LIST_MARKS.search(name) or name.count("(") != name.count(")"):
            raise ValueError(
                f"{names_from}: {name!r} has brackets, quotes, '|' or '.': expected names between "
                "commas, such as: cat, traffic cone"
            )
    check_names(names, names_from)
