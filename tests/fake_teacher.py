"""A teacher without CLIP: every text and every region has a fixed random embedding."""

import hashlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


class FakeTeacher:
    """Behaves as the ``Teacher`` protocol demands; records what it was asked."""

    logit_scale = 10.0

    def __init__(self, embed_dim: int) -> None:
        self.embed_dim = embed_dim
        self.regions: list[tuple[list[Tensor], list[Tensor], float]] = []
        self.captions: list[list[str]] = []

    def _embed(self, keys: Sequence[str]) -> Tensor:
        rows = []
        for key in keys:
            seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big")
            generator = torch.Generator().manual_seed(seed)
            rows.append(torch.randn(self.embed_dim, generator=generator, device="cpu"))
        return F.normalize(torch.stack(rows), dim=1) if rows else torch.zeros(0, self.embed_dim)

    def encode_regions(
        self, images: Sequence[Tensor], boxes: Sequence[Tensor], crop_scale: float
    ) -> Tensor:
        self.regions.append((list(images), list(boxes), crop_scale))
        return self._embed([f"region {i}" for i in range(sum(len(b) for b in boxes))])

    def encode_captions(self, captions: Sequence[str]) -> Tensor:
        self.captions.append(list(captions))
        return self._embed(captions)

    def encode_classes(self, names: Sequence[str]) -> Tensor:
        return self._embed([f"a photo of a {name}." for name in names])
