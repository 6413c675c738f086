"""Pictures as callers have them - paths, bytes, Pillow images, arrays, tensors - in one form."""

from __future__ import annotations

import io
import os
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from hierkd.data.mapper import problem_of_picture, read_picture

__all__ = ["ImageInput", "as_bgr", "check_channels", "decode_picture"]

ImageInput: TypeAlias = "str | os.PathLike[str] | Image.Image | NDArray[np.uint8] | Tensor"
"""A picture: see :func:`as_bgr` for what each kind has to look like."""


def check_channels(channels: str) -> None:
    """Raise ValueError unless ``channels`` is "BGR" or "RGB"."""
    if channels not in ("BGR", "RGB"):
        raise ValueError(f"channels must be 'BGR' or 'RGB', got {channels!r}")


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
    check_channels(channels)
    if isinstance(image, str | os.PathLike):
        path = os.fspath(image)
        if not os.path.exists(path):
            raise FileNotFoundError(f"no picture {path!r} (looked from {os.getcwd()!r})")
        return read_picture(path)
    if isinstance(image, Image.Image):
        return _from_pillow(image)
    if isinstance(image, Tensor):
        if image.dim() != 3 or image.shape[0] != 3 or image.dtype != torch.uint8:
            raise ValueError(
                f"a tensor must have shape (3, H, W) and type torch.uint8 with values 0 to 255, "
                f"got shape {tuple(image.shape)} and type {image.dtype}"
                + _advice(str(image.dtype), tuple(image.shape), channels_last=False)
            )
        array: NDArray[np.uint8] = image.detach().cpu().permute(1, 2, 0).numpy()
    elif isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(
                f"an array must have shape (H, W, 3) and type uint8 with values 0 to 255, "
                f"got shape {image.shape} and type {image.dtype}"
                + _advice(str(image.dtype), image.shape, channels_last=True)
            )
        array = image
    else:
        raise TypeError(
            "an image must be a path, a Pillow image, an array (H, W, 3) or a tensor (3, H, W), "
            f"got {type(image).__name__}"
        )
    if 0 in array.shape:
        raise ValueError(f"the image has no pixels: {array.shape[1]} x {array.shape[0]}")
    return array if channels == "BGR" else array[:, :, ::-1]


def _from_pillow(image: Image.Image) -> NDArray[np.uint8]:
    if 0 in image.size:
        raise ValueError(f"the image has no pixels: {image.width} x {image.height}")
    problem = problem_of_picture(image)
    if not problem:
        try:
            return np.asarray(image.convert("RGB"), np.uint8)[:, :, ::-1]
        except Exception as error:  # Pillow decodes only now; its decoders raise what they like
            problem = f"{type(error).__name__}: {error}"
    name = getattr(image, "filename", "")
    raise ValueError(
        f"{f'Image {name!r}' if name else 'the picture'} cannot be decoded ({problem})."
    )


def decode_picture(content: bytes) -> NDArray[np.uint8]:
    """Decode the bytes of a picture file.

    Returns:
        (H, W, 3), BGR, 0..255, upright: what :func:`as_bgr` makes of the file's path.

    Raises:
        ValueError: They cannot be decoded, or have more than 8 bits a channel.
    """
    what = f"the picture of {len(content)} bytes cannot be decoded"
    try:
        with Image.open(io.BytesIO(content)) as opened:
            problem = problem_of_picture(opened)
            if not problem:
                return as_bgr(ImageOps.exif_transpose(opened))
    except UnidentifiedImageError as error:
        raise ValueError(f"{what} (no known format)") from error
    except Exception as error:  # as above
        raise ValueError(f"{what} ({error})") from error
    raise ValueError(f"{what} ({problem})")


def _advice(dtype: str, shape: tuple[int, ...], *, channels_last: bool) -> str:
    if "float" in dtype:
        return "; for values of 0 to 1, multiply by 255, round, and convert"
    if channels_last and len(shape) == 3 and shape[0] == 3:
        return "; put the channels last: array.transpose(1, 2, 0)"
    if channels_last and len(shape) == 3 and shape[2] == 4:
        return "; leave out the fourth channel: array[:, :, :3]"
    if channels_last and (len(shape) == 2 or shape[2:] == (1,)):
        return "; of a grey picture, repeat it: numpy.dstack([array] * 3)"
    if not channels_last and len(shape) == 3 and shape[2] == 3:
        return "; put the channels first: tensor.permute(2, 0, 1)"
    return ""
