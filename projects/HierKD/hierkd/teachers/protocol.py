"""The seam between the detector and CLIP: what a teacher answers, and what it needs of a CLIP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["LoadedCLIP", "Teacher"]


class Teacher(Protocol):
    """What the detector needs of a vision-language model with D-dim embeddings.

    All embeddings are float32, L2-normalised, without gradient, and may be used in losses.
    """

    @property
    def embed_dim(self) -> int:
        """D, the size of an embedding."""

    @property
    def logit_scale(self) -> float:
        """The model's own factor on cosines, for classifying with it directly."""

    def encode_regions(
        self, images: Sequence[Tensor], boxes: Sequence[Tensor], crop_scale: float
    ) -> Tensor:
        """Embed regions: N raw images (3, H_i, W_i) and N x (P_i, 4) XYXY pixels -> (P, D)."""

    def encode_captions(self, captions: Sequence[str]) -> Tensor:
        """Embed C texts as they are -> (C, D)."""

    def encode_classes(self, names: Sequence[str]) -> Tensor:
        """Embed K class names, each put into the prompt template(s) -> (K, D)."""


@dataclass(frozen=True)
class LoadedCLIP:
    """A CLIP in memory: evaluation mode, no parameter trainable.

    Attributes:
        model: has ``encode_image``, (P, 3, S, S) -> (P, D), and ``encode_text``, of the tokens of C
            texts -> (C, D); neither needs to normalise.
        tokenize: C texts -> tokens, cut off where they are longer than its context.
        embed_dim: D.
        logit_scale: its own factor on cosines.
        input_size: S, px.
        pixel_mean: of RGB in [0, 1].
        pixel_std: likewise.
        dtype: that ``encode_image`` expects.
    """

    model: Any
    tokenize: Callable[[Sequence[str]], Tensor]
    embed_dim: int
    logit_scale: float
    input_size: int
    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]
    dtype: torch.dtype
