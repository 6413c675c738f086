"""Pictures as callers have them - paths, Pillow images, arrays, tensors - in one form."""

from __future__ import annotations

import os
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from hierkd.data.mapper import problem_of_picture, read_picture

__all__ = ["ImageInput", "as_bgr"]

ImageInput: TypeAlias = "str | os.PathLike[str] | Image.Image | NDArray[np.uint8] | Tensor"
"""A picture: see :func:`as_bgr` for what each kind has to look like."""


def as_bgr(image: ImageInput, channels: str = "BGR") -> NDArray[np.uint8]:
    """Bring a picture to the form that detectron2's tools use.

    Args:
        image: One of

            - the path of a picture; turned upright as its EXIF orientation says;
            - a Pillow image of any mode of 8 bits, its pixels taken as they lie;
            - an array (H, W, 3) uint8, its channels in the order of ``channels``;
            - a tensor (3, H, W) uint8 on any device, likewise.
        channels: "BGR", as OpenCV and detectron2 have it, or "RGB", as torchvision and matplotlib
            do. Without effect on paths and Pillow images, which know their own.

    Returns:
        (H, W, 3), BGR, 0..255.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The picture cannot be decoded or has more than 8 bits a channel, the array or
            tensor has another shape or type, or there are no pixels.
        TypeError: It is nothing of the above.
    """
    if channels not in ("BGR", "RGB"):
        raise ValueError(f"channels must be 'BGR' or 'RGB', got {channels!r}")
    if isinstance(image, str | os.PathLike):
        path = os.fspath(image)
        if not os.path.exists(path):
            raise FileNotFoundError(f"no picture {path!r} (looked from {os.getcwd()!r})")
        return read_picture(path)
    if isinstance(image, Image.Image):
        return _from_pillow(image)
    expected, given = "an array of shape (H, W, 3)", image
    if isinstance(image, Tensor):
        expected = "a tensor of shape (3, H, W)"
        image = image.detach().cpu().numpy()
        image = np.moveaxis(image, 0, -1) if image.ndim else image
    if not isinstance(image, np.ndarray):
        raise TypeError(
            "an image must be a path, a Pillow image, an array (H, W, 3) or a tensor (3, H, W), "
            f"got {type(image).__name__}"
        )
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
        raise ValueError(
            f"an image must be {expected} and type uint8 with values 0 to 255, got shape "
            f"{tuple(given.shape)} and type {given.dtype}"
        )
    return image if channels == "BGR" else image[:, :, ::-1]


def _from_pillow(image: Image.Image) -> NDArray[np.uint8]:
    problem = problem_of_picture(image) if all(image.size) else "no pixels"
    if not problem:
        try:
            return np.asarray(image.convert("RGB"), np.uint8)[:, :, ::-1]
        except Exception as error:  # Pillow decodes only now; its decoders raise what they like
            problem = f"{type(error).__name__}: {error}"
    name = getattr(image, "filename", "")
    raise ValueError(
        f"{f'Image {name!r}' if name else 'the picture'} cannot be decoded ({problem})."
    )
