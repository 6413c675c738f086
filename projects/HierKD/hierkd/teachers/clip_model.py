"""What the teacher needs of a CLIP, whichever package it comes from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["LONGEST_TEXT", "CLIPFiles", "LoadedCLIP", "TokenCounter"]

LONGEST_TEXT = 1024
"""Tokens that a `TokenCounter` counts; a longer text counts as this long."""


@dataclass(frozen=True)
class TokenCounter:
    """What a CLIP's tokeniser, which needs no weights, says of texts.

    Attributes:
        count: C texts -> the tokens of each; one that holds nothing has as many as "".
        context_length: tokens that the text encoder reads; the rest of a text is cut off.
    """

    count: Callable[[Sequence[str]], Sequence[int]]
    context_length: int


@dataclass(frozen=True)
class LoadedCLIP:
    """A CLIP in memory: evaluation mode, no parameter trainable.

    Attributes:
        model: has ``encode_image``, (P, 3, S, S) -> (P, D), and ``encode_text``, of the tokens of C
            texts -> (C, D); neither needs to normalise.
        tokenize: C texts -> tokens (C, `context_length`), cut off where they are longer.
        embed_dim: D.
        logit_scale: its own factor on cosines.
        input_size: S, px.
        context_length: tokens that the text encoder reads.
        pixel_mean: of RGB in [0, 1].
        pixel_std: likewise.
        dtype: that ``encode_image`` expects.
    """

    model: Any
    tokenize: Callable[[Sequence[str]], Tensor]
    embed_dim: int
    logit_scale: float
    input_size: int
    context_length: int
    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]
    dtype: torch.dtype


class CLIPFiles(Protocol):
    """A CLIP on disk, or one that can be downloaded.

    Attributes:
        title: its name without folders of this machine.
        digest: hex digits that change whenever an embedding would: of its weights at least.
    """

    title: str
    digest: str

    @property
    def embed_dim(self) -> int | None:
        """D where it is known without the weights."""

    def load(self, device: torch.device, half: bool) -> LoadedCLIP:
        """Load it; the first time this may download it.

        Args:
            device: where it is to run.
            half: in half precision.

        Raises:
            FileNotFoundError: the weights are not there and cannot be downloaded.
            ValueError: they are broken, or not those of such a model.
        """
