"""Classification against text: cosine similarity to class embeddings plus a learned background.

Letters: D embedding size · K classes of the current vocabulary, index K = background.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["LOGIT_SCALE_RANGE", "TextClassifier"]

# Of tau_c and tau_m. Below 1 a softmax over cosines is flat, and below 0 it prefers what is least
# alike; from 1000 on a hundredth of cosine decides everything. [ours; the release has no limit,
# CLIP's upper one, 100, is where tau_c starts]
LOGIT_SCALE_RANGE = (1.0, 1000.0)


class TextClassifier(nn.Module):
    """Cosine classifier over a vocabulary that is data, not weights (§3.1, Eq. 1).

    ``logits = tau_c * [f . T_1, ..., f . T_K, f . T_bg / ||T_bg||]``

    The class embeddings sit in a non-persistent buffer: they are in no checkpoint, so any
    checkpoint runs with any vocabulary. The background embedding starts from CLIP's embedding of
    "a photo of background." and is learned; it is normalised in use.

    Attributes:
        text_embeddings: (K, D) buffer, L2-normalised; (0, D) before :meth:`set_vocabulary`.
        background_embedding: (D,) parameter, T_bg.
        logit_scale: scalar parameter tau_c; multiplies the cosines.
        start_embedding: (D,) where the background started, L2-normalised: what the teacher says of
            a text, and so a trace of the teacher. On the CPU, in no state_dict.
    """

    text_embeddings: Tensor

    def __init__(
        self,
        background_embedding: Tensor,
        *,
        logit_scale: float = 100.0,
        project_background: bool = False,
    ) -> None:
        """Start from a background embedding.

        Args:
            background_embedding: (D,) initial T_bg.
            logit_scale: initial tau_c.
            project_background: set the parameter itself back to unit length before every training
                step, as the release does, instead of normalising it in use.
        """
        super().__init__()
        background = F.normalize(background_embedding.detach().float(), dim=0)
        self.background_embedding = nn.Parameter(background)
        self.start_embedding = background.cpu().clone()
        self.logit_scale = nn.Parameter(torch.tensor(float(logit_scale)))
        self.project_background = project_background
        self.register_buffer("text_embeddings", torch.zeros(0, len(background)), persistent=False)

    @property
    def embed_dim(self) -> int:
        """D, the width of the embedding space."""
        return self.background_embedding.shape[0]

    @property
    def num_classes(self) -> int:
        """K, the size of the current vocabulary."""
        return self.text_embeddings.shape[0]

    def set_vocabulary(self, text_embeddings: Tensor) -> None:
        """Replace the vocabulary.

        Args:
            text_embeddings: (K, D) class embeddings, K >= 1; need not be normalised.

        Raises:
            ValueError: if the shape is wrong or a row is zero or not finite.
        """
        if text_embeddings.dim() != 2 or text_embeddings.shape[1] != self.embed_dim:
            raise ValueError(
                f"class embeddings must have shape (K, {self.embed_dim}) for this detector, "
                f"got {tuple(text_embeddings.shape)}"
            )
        if len(text_embeddings) == 0:
            raise ValueError("the vocabulary is empty: it needs at least one class")
        norms = text_embeddings.float().norm(dim=1)
        bad = (~torch.isfinite(norms) | (norms == 0)).nonzero().flatten().tolist()
        if bad:
            raise ValueError(f"class embeddings of rows {bad[:10]} are zero or not finite")
        # On the background's device: the classifier may have moved since it was built.
        embeddings = text_embeddings.detach().to(self.background_embedding.device).float()
        self.text_embeddings = F.normalize(embeddings, dim=1)

    @torch.no_grad()
    def limit_logit_scale(self) -> None:
        """Bring tau_c back into its range; inside of it nothing changes."""
        self.logit_scale.clamp_(*LOGIT_SCALE_RANGE)

    def background(self) -> Tensor:
        """(D,) the background's embedding as it is used, L2-normalised."""
        if self.project_background and self.training:
            with torch.no_grad():
                self.background_embedding.copy_(F.normalize(self.background_embedding, dim=0))
            return self.background_embedding
        return F.normalize(self.background_embedding, dim=0)

    def weight(self) -> Tensor:
        """What embeddings are compared with.

        Returns:
            (K+1, D), L2-normalised; the background last.
        """
        if self.num_classes == 0:
            raise RuntimeError("no vocabulary is set: call set_vocabulary first")
        return torch.cat([self.text_embeddings, self.background()[None]])

    def forward(self, embeddings: Tensor, weight: Tensor | None = None) -> Tensor:
        """Logits of L2-normalised embeddings.

        Args:
            embeddings: (..., D), L2-normalised.
            weight: :meth:`weight`, where it serves several calls; by default it is made anew.

        Returns:
            (..., K+1) logits, background last.
        """
        weight = self.weight() if weight is None else weight
        return self.logit_scale * F.linear(embeddings, weight)
