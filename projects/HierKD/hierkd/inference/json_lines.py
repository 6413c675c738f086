"""Detecting on request: a line of JSON in, a line of JSON out.

A request is an object with

``image``           path of a picture, or a ``data:image/...;base64,`` URL, or instead
``image_base64``    the bytes of a picture file, in base64
``vocabulary``      list of class names; optional, as all that follow
``score_threshold`` 0 to 1
``top_k``           the most detections
``id``              anything; comes back in the answer

and its answer has ``id`` (if given), ``height``, ``width``, ``vocabulary`` and ``detections``, or
``id``, ``line`` and ``error``.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hierkd.inference.detections import DetectionFilter, as_records
from hierkd.inference.images import as_bgr, decode_picture
from hierkd.inference.predictor import OpenVocabularyPredictor

__all__ = ["answer", "answer_lines", "decode_base64_picture"]

_KEYS = {"image", "image_base64", "vocabulary", "score_threshold", "top_k", "id"}


def answer_lines(
    predictor: OpenVocabularyPredictor, lines: Iterable[str], keep: DetectionFilter
) -> Iterator[str]:
    """Answer requests, one a line, in their order; a wrong one is answered with its error.

    Args:
        predictor: Detects; its vocabulary serves requests without one.
        lines: Requests; blank lines are passed over.
        keep: Which detections are told, unless a request says otherwise.

    Yields:
        An answer per request: JSON without line breaks.
    """
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        request: Any = None
        try:
            request = json.loads(line)
            found = answer(predictor, request, keep)
        except json.JSONDecodeError as error:
            found = {"line": number, "error": f"not JSON: {error.msg} at column {error.colno}"}
        except RecursionError:
            found = {"line": number, "error": "not JSON that can be read: too deeply nested"}
        except (OSError, ValueError, TypeError) as error:
            found = {"line": number, "error": str(error)}
        if isinstance(request, dict) and "id" in request:
            found = {"id": request["id"], **found}
        yield json.dumps(found)


def answer(
    predictor: OpenVocabularyPredictor, request: Any, keep: DetectionFilter
) -> dict[str, Any]:
    """Answer one request.

    Args:
        predictor: Detects.
        request: See the top of this file.
        keep: Which detections are told, unless the request says otherwise. Thresholds for classes
            that the request's own vocabulary lacks are passed over.

    Returns:
        The answer, without ``id``.

    Raises:
        FileNotFoundError: There is no such picture.
        ValueError: The request, the picture or the vocabulary is wrong.
    """
    _check_request(request)
    image = (
        decode_base64_picture(request["image_base64"])
        if "image_base64" in request
        else _read(request["image"])
    )
    vocabulary = request.get("vocabulary")
    names = predictor.vocabulary if vocabulary is None else tuple(vocabulary)
    keep = replace(
        keep,
        score_threshold=request.get("score_threshold", keep.score_threshold),
        top_k=request.get("top_k", keep.top_k),
        class_thresholds={k: v for k, v in keep.class_thresholds.items() if k in names},
    )
    instances = predictor.predict(
        image,
        vocabulary=vocabulary,
        score_threshold=keep.score_threshold,
        top_k=keep.top_k,
        class_thresholds=keep.class_thresholds,
    )
    return {
        "height": image.shape[0],
        "width": image.shape[1],
        "vocabulary": list(names),
        "detections": as_records(instances, names),
    }


def _check_request(request: Any) -> None:
    if not isinstance(request, Mapping):
        raise ValueError(f"a request is an object, got a {type(request).__name__}")
    if unknown := sorted(set(request) - _KEYS):
        raise ValueError(f"a request has no {unknown}; it has {sorted(_KEYS)}")
    if ("image" in request) == ("image_base64" in request):
        raise ValueError("a request has either 'image' or 'image_base64'")
    for key in {"image", "image_base64"} & set(request):
        if not isinstance(request[key], str):
            raise ValueError(f"{key!r} must be a text, got a {type(request[key]).__name__}")
    names = request.get("vocabulary")
    if names is not None and not isinstance(names, list):
        raise ValueError(f"'vocabulary' must be a list of names, got a {type(names).__name__}")


def _read(text: str) -> NDArray[np.uint8]:
    if not text.startswith("data:"):
        return as_bgr(text)
    head, comma, content = text.partition(",")
    if not comma or not head.endswith(";base64"):
        raise ValueError(f"'image': a data URL must be base64: data:image/...;base64,...: {head!r}")
    return decode_base64_picture(content)


def decode_base64_picture(text: str) -> NDArray[np.uint8]:
    """Decode a picture file in base64 -> (H, W, 3), BGR, upright.

    Raises:
        ValueError: It is no base64, or no picture.
    """
    try:
        content = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"the picture is no base64: {error}") from error
    return decode_picture(content)
