"""The dense head: convolutions only, no ground truth and no text.

Letters: N images · L levels · D embedding size · H_l, W_l size of level l.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, CycleBatchNormList, get_norm
from torch import Tensor, nn

__all__ = ["ATSSHead"]


class ATSSHead(nn.Module):
    """Two towers over every level; an embedding, a box and a box quality per point (§3.1, Fig. 2).

    Classification tower -> 3x3 conv -> D-dimensional embedding, L2-normalised: the one value that
    is classified, distilled per point (IKD) and distilled globally (GKD).
    Box tower -> 3x3 conv -> 4 deltas (times a learned scale per level), and, if there is a quality
    branch, 3x3 conv -> 1 logit (IoU, or centre-ness in the baseline).
    """

    def __init__(
        self,
        *,
        in_channels: int,
        embed_dim: int,
        num_levels: int,
        num_convs: int = 4,
        norm: str = "GN",
        with_quality: bool = True,
    ) -> None:
        """Build the head.

        Args:
            in_channels: channels of the feature maps.
            embed_dim: D.
            num_levels: L, the number of learned box scales.
            num_convs: 3x3 convolutions per tower (4 in RetinaNet, FCOS and ATSS).
            norm: a detectron2 norm name. Of "BN" and "SyncBN" each level has statistics of its own,
                as in detectron2's RetinaNet: those of the levels differ, and a mixture of them at
                test time misplaces the boxes.
            with_quality: build the IoU / centre-ness branch.
        """
        super().__init__()
        self.cls_tower = self._tower(in_channels, num_convs, norm, num_levels)
        self.box_tower = self._tower(in_channels, num_convs, norm, num_levels)
        self.embedding = nn.Conv2d(in_channels, embed_dim, kernel_size=3, padding=1)
        self.anchor_deltas = nn.Conv2d(in_channels, 4, kernel_size=3, padding=1)
        self.quality = nn.Conv2d(in_channels, 1, kernel_size=3, padding=1) if with_quality else None
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(())) for _ in range(num_levels)])
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # The N(0, 0.01) of RetinaNet and ATSS. The embedding's bias stays at zero: the
                # prior-probability bias of those detectors has no meaning for an embedding.
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @staticmethod
    def _tower(channels: int, num_convs: int, norm: str, num_levels: int) -> nn.Sequential:
        batch_norms = {"BN": nn.BatchNorm2d, "SyncBN": nn.SyncBatchNorm}

        def make_norm() -> Any:
            if norm in batch_norms:
                return CycleBatchNormList(num_levels, batch_norms[norm], num_features=channels)
            return get_norm(norm, channels)

        return nn.Sequential(
            *[
                Conv2d(
                    channels,
                    channels,
                    kernel_size=3,
                    padding=1,
                    bias=not norm,
                    norm=make_norm(),
                    activation=F.relu,
                )
                for _ in range(num_convs)
            ]
        )

    @property
    def embed_dim(self) -> int:
        """D."""
        return self.embedding.out_channels

    def forward(
        self, features: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor] | None]:
        """Run the head on all levels.

        Args:
            features: L maps (N, in_channels, H_l, W_l), finest first.

        Returns:
            pred_embeddings: L maps (N, D, H_l, W_l), float32, L2-normalised over D.
            pred_anchor_deltas: L maps (N, 4, H_l, W_l), float32.
            pred_qualities: L maps (N, 1, H_l, W_l) of logits, float32; None without the branch.
        """
        embeddings, deltas, qualities = [], [], []
        for feature, scale in zip(features, self.scales, strict=True):
            embeddings.append(F.normalize(self.embedding(self.cls_tower(feature)).float(), dim=1))
            box_feature = self.box_tower(feature)
            deltas.append(self.anchor_deltas(box_feature).float() * scale)
            if self.quality is not None:
                qualities.append(self.quality(box_feature).float())
        return embeddings, deltas, qualities if self.quality is not None else None
