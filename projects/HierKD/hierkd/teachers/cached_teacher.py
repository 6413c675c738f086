"""A teacher that looks up what CLIP said of the training boxes and texts before training.

Training on ground-truth boxes (``MODEL.IKD.BOXES "gt"``, Table 2) then runs without CLIP.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from torch import Tensor

from hierkd.teachers.region_cache import TeacherCache
from hierkd.teachers.teacher import Teacher, build_teacher, encode_prompts, known_weights_sha256

__all__ = ["CachedTeacher", "build_cached_teacher"]

logger = logging.getLogger(__name__)


class CachedTeacher:
    """Regions and texts from a cache, everything else from another teacher; a ``Teacher``.

    Args:
        cache: what is known already.
        build_inner: builds the teacher for what is not, on the first call that needs it.
        templates: prompts of classes; empty = the inner teacher embeds classes (from a file).
        device: where embeddings are returned.
    """

    def __init__(
        self,
        cache: TeacherCache,
        build_inner: Callable[[], Teacher],
        *,
        templates: Sequence[str],
        device: str | torch.device,
    ) -> None:
        self.cache = cache
        self.templates = tuple(templates)
        self.device = torch.device(device)
        self._build_inner = build_inner
        self._inner: Teacher | None = None

    def __repr__(self) -> str:
        return f"CachedTeacher({str(self.cache.folder)!r})"

    @property
    def embed_dim(self) -> int:
        """D, of the cache."""
        return self.cache.contents.embed_dim

    @property
    def logit_scale(self) -> float:
        """CLIP's own factor on cosines."""
        return self.cache.contents.logit_scale

    def encode_annotations(
        self, annotation_ids: Sequence[Tensor], flipped: Sequence[bool]
    ) -> Tensor:
        """Look up annotated regions.

        Args:
            annotation_ids: N tensors (M_i,) int64, of the boxes of each image.
            flipped: N, whether the image is mirrored.

        Returns:
            (M, D) float32 on the teacher's device, L2-normalised, in the order of the images, then
            of the boxes.

        Raises:
            ValueError: an annotation is not in the cache.
        """
        ids = np.concatenate([each.cpu().numpy() for each in annotation_ids])
        mirrored = np.repeat(np.array(flipped, bool), [len(each) for each in annotation_ids])
        return torch.from_numpy(self.cache.regions(ids, mirrored)).to(self.device)

    def encode_regions(
        self, images: Sequence[Tensor], boxes: Sequence[Tensor], crop_scale: float
    ) -> Tensor:
        """Embed any regions with the inner teacher: the cache knows those with an annotation."""
        return self._teacher("regions").encode_regions(images, boxes, crop_scale)

    def encode_captions(self, captions: Sequence[str]) -> Tensor:
        """Embed C texts -> (C, D): from the cache, those that it lacks with the inner teacher.

        Raises:
            FileNotFoundError: CLIP is needed, and its weights are not there.
        """
        if isinstance(captions, str):
            raise ValueError(f"expected a sequence of texts, found the single text {captions!r}")
        if len(captions) == 0:
            return torch.zeros((0, self.embed_dim), device=self.device)
        found = self.cache.texts(captions)
        rows = {text: torch.from_numpy(row) for text, row in found.items()}
        if missing := [text for text in dict.fromkeys(captions) if text not in rows]:
            needing = repr(missing[0]) if len(missing) == 1 else f"{len(missing)} texts"
            try:
                encoded = self._teacher(needing).encode_captions(missing).cpu()
            except FileNotFoundError as error:
                raise self._needs_clip(needing, error) from error
            rows |= dict(zip(missing, encoded, strict=True))
        return torch.stack([rows[text] for text in captions]).to(self.device)

    def encode_classes(self, names: Sequence[str]) -> Tensor:
        """Embed K class names -> (K, D), from the cache where it holds their prompts."""
        if not self.templates:
            return self._teacher("class names").encode_classes(names)
        return encode_prompts(self.encode_captions, self.templates, names)

    def _teacher(self, needing: str) -> Teacher:
        if self._inner is None:
            try:
                self._inner = self._build_inner()
            except FileNotFoundError as error:
                raise self._needs_clip(needing, error) from error
        return self._inner

    def _needs_clip(self, needing: str, error: FileNotFoundError) -> FileNotFoundError:
        return FileNotFoundError(
            f"{self.cache.folder} does not hold {needing}, which therefore needs CLIP: {error}"
        )


def build_cached_teacher(cfg: Any) -> CachedTeacher:
    """Build the teacher of a config with MODEL.TEACHER.CACHE; CLIP only when something is missing.

    Regions are checked only where they are used, that is, with instance-level distillation.

    Raises:
        FileNotFoundError: there is no complete cache.
        ValueError: the cache is of another CLIP, other annotations or other crops, or
            MODEL.IKD.BOXES are not the ground truth's.
    """
    with_regions = cfg.MODEL.IKD.LOSS_WEIGHT > 0
    if with_regions and cfg.MODEL.IKD.BOXES != "gt":
        raise ValueError(
            "MODEL.TEACHER.CACHE holds embeddings of ground-truth boxes, but MODEL.IKD.BOXES is "
            f"{cfg.MODEL.IKD.BOXES!r}: set MODEL.IKD.BOXES gt, or MODEL.TEACHER.CACHE ''"
        )
    cache = TeacherCache(cfg.MODEL.TEACHER.CACHE)
    text, weights = cfg.MODEL.TEXT_CLASSIFIER, cfg.MODEL.TEACHER.WEIGHTS
    unknown = cache.check_source(
        weights=weights,
        weights_sha256=known_weights_sha256(weights, cfg.MODEL.TEACHER.DOWNLOAD_ROOT),
        embed_dim=text.EMBED_DIM,
    )
    if with_regions:
        unknown += cache.check_regions(
            crop_scale=cfg.MODEL.IKD.CROP_SCALE,
            pixel_statistics=cfg.MODEL.TEACHER.PIXEL_STATISTICS,
            annotation_files={
                name: MetadataCatalog.get(name).json_file for name in cfg.DATASETS.TRAIN
            },
        )
    if unknown:
        logger.warning("%s is used unchecked: %s", cache.folder, "; ".join(unknown))
    return CachedTeacher(
        cache,
        lambda: build_teacher(cfg),
        templates=() if text.EMBEDDINGS else text.TEMPLATES or (text.TEMPLATE,),
        device=cfg.MODEL.DEVICE,
    )
