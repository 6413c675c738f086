"""Classes given by examples: pictures, or boxes in pictures, in place of a name or beside it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from hierkd.inference.images import ImageInput

if TYPE_CHECKING:
    from hierkd.inference.predictor import OpenVocabularyPredictor

__all__ = ["Example", "Examples", "embed_examples", "parse_examples"]

Example: TypeAlias = "ImageInput | tuple[ImageInput, Sequence[float]]"
"""A picture of an object, or a picture and the object's box in it: XYXY, pixels of the picture."""
Examples: TypeAlias = "Mapping[str, Sequence[Example]]"
"""Class names to a list of examples each."""


def parse_examples(texts: Iterable[str]) -> dict[str, list[Example]]:
    """Read ``NAME=PICTURE[@X0:Y0:X1:Y1],...`` texts, one a class; opens no file.

    Raises:
        ValueError: A text is no such thing, or a class comes twice.
    """
    found: dict[str, list[Example]] = {}
    for text in texts:
        name, _, listed = (part.strip() for part in text.partition("="))
        if not name or not all(paths := [path.strip() for path in listed.split(",")]):
            raise ValueError(f"examples: expected NAME=PICTURE,PICTURE,..., got {text!r}")
        if name in found:
            raise ValueError(f"examples: {name!r} comes twice; put its pictures behind one NAME=")
        found[name] = []
        for path in paths:
            boxed = re.fullmatch(r"(.+)@([^@/\\]*:[^@/\\]*)", path)
            try:
                box = [float(side) for side in boxed[2].split(":")] if boxed else []
            except ValueError as error:
                raise ValueError(
                    f"examples: expected PICTURE@X0:Y0:X1:Y1, four numbers of pixels, got {path!r}"
                ) from error
            found[name].append((boxed[1], box) if boxed else path)
    return found


@torch.no_grad()
def embed_examples(
    predictor: OpenVocabularyPredictor, name: str, examples: Sequence[Example]
) -> Tensor:
    """What the teacher sees in the examples of a class, on average.

    It looks at each as at the regions of the training, ``MODEL.IKD.CROP_SCALE`` times as large as
    the box and not beyond the picture, and at its mirror image. [ours: docs/lab/miniature.md]

    Args:
        predictor: Whose teacher is asked.
        name: Of the class, for errors.
        examples: A list of at least one; arrays and tensors are BGR.

    Returns:
        (D,) L2-normalised.

    Raises:
        FileNotFoundError, ValueError, TypeError: There are none, one is no picture
            (:func:`hierkd.inference.images.as_bgr`), or a box is not within its picture.
    """
    if not isinstance(examples, list) or not examples:
        raise ValueError(
            f"examples of {name!r}: expected a list of pictures or of (picture, box) pairs, got "
            f"{str(examples)[:100]!r}"
        )
    model, inputs, boxes = predictor.model, [], []
    for number, example in enumerate(examples):
        picture, box = example if isinstance(example, tuple) else (example, None)
        try:
            given = predictor.prepare(picture)
        except (FileNotFoundError, ValueError, TypeError) as error:
            raise type(error)(f"examples of {name!r}, number {number}: {error}") from error
        image, (height, width) = given["image"], (given["height"], given["width"])
        sides = (0, 0, width, height) if box is None else tuple(box)
        x0, y0, x1, y1 = sides if len(sides) == 4 else (-1, -1, -1, -1)
        if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
            file = f", {picture}" if isinstance(picture, str | os.PathLike) else ""
            raise ValueError(
                f"examples of {name!r}, number {number}{file}: expected a box x0, y0, x1, y1 "
                f"within the picture's {width} x {height} pixels, got {box}"
            )
        wide, high = image.shape[2] / width, image.shape[1] / height
        for left, right, view in ((x0, x1, image), (width - x1, width - x0, image.flip(2))):
            inputs.append({"image": view})
            boxes.append(torch.tensor([[left * wide, y0 * high, right * wide, y1 * high]]))
    seen = model.embed_boxes(inputs, boxes, model.inference_settings.teacher_crop_scale)
    return F.normalize(torch.cat(seen).mean(dim=0), dim=0)
