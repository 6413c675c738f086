"""Resizing pictures of any shape, however long and thin."""

from __future__ import annotations

from typing import Any

from detectron2.data import transforms as T
from numpy.typing import NDArray

__all__ = ["ResizeShortestEdge"]


class ResizeShortestEdge(T.ResizeShortestEdge):  # type: ignore[misc]  # detectron2 is untyped
    """detectron2's, with sides of at least one pixel.

    The limit on the longer side makes a picture of 20,000 x 1 pixels 0.07 pixels high, which
    detectron2 rounds to none. All other pictures are resized as by detectron2.
    """

    def get_transform(self, image: NDArray[Any]) -> T.Transform:
        """Choose a size for ``image``, (H, W, C)."""
        transform = super().get_transform(image)
        if isinstance(transform, T.ResizeTransform) and min(transform.new_h, transform.new_w) < 1:
            height, width = max(transform.new_h, 1), max(transform.new_w, 1)
            return T.ResizeTransform(transform.h, transform.w, height, width, transform.interp)
        return transform
