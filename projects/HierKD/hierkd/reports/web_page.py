"""What ``tools/web_demo.py`` does behind its page: check what comes in, detect once, show often.

Nothing here knows the library that the page is made with. What a visitor does wrong is a
:class:`PageError`, whose text is meant for them: it names what was found and what is expected, and
no path of the server. Texts of visitors are never taken for paths.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
from detectron2.structures import Instances
from numpy.typing import NDArray
from PIL import Image as PILImage
from PIL import UnidentifiedImageError

from hierkd.data.mapper import read_picture
from hierkd.inference.detections import (
    DetectionFilter,
    as_records,
    read_class_thresholds,
    scale_boxes,
)
from hierkd.inference.predictor import OpenVocabularyPredictor
from hierkd.reports.drawing import (
    Image,
    SheetRow,
    class_color,
    draw_instances,
    draw_sheet,
    enlarge,
    fit,
)
from hierkd.reports.page import escape
from hierkd.teachers.texts import check_names, repeated_names

__all__ = [
    "Found",
    "Limits",
    "PageError",
    "Shown",
    "detect",
    "make_filter",
    "parse_names",
    "read_upload",
    "safe_name",
    "show",
]

logger = logging.getLogger(__name__)

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")  # as Pillow calls them; browsers show all of them
# Longer side of the picture that boxes are drawn on: labels can be read, and drawing takes a
# fraction of a second. [ours]
_VIEW_PX = (640, 1280)
_LABELS_PER_SIDE = 32  # heights of a label that make up the longer side. [ours]
_MAX_SIDE = 20_000  # pixels; longer ones are no pictures. [ours]


class PageError(ValueError):
    """Something a visitor can put right; the text is for them."""


@dataclass(frozen=True)
class Limits:
    """What a visitor may send. All [ours].

    Attributes:
        max_bytes: Size of a picture file.
        max_pixels: Width times height of a picture; decoding takes some 3 bytes for each.
        max_names: Class names in a vocabulary.
        max_name_length: Characters of a class name.

    Raises:
        ValueError: One is less than 1.
    """

    max_bytes: int = 20 * 1024**2
    max_pixels: int = 25_000_000
    max_names: int = 200
    max_name_length: int = 80

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


@dataclass(frozen=True, eq=False)
class Found:
    """All detections in one picture, of one detector or of several, before any is left out.

    Attributes:
        file_name: As the visitor called it, without folders.
        size: Height and width, pixels.
        vocabulary: K names that ``pred_classes`` index.
        view: (h, w, 3), RGB: the picture in the size it is drawn in.
        factor: By which the sides of ``view`` are larger than the picture's.
        instances: Title of the detector to its detections, best first, ``pred_boxes`` XYXY in
            pixels of the picture.
    """

    file_name: str
    size: tuple[int, int]
    vocabulary: tuple[str, ...]
    view: Image = field(repr=False)
    factor: float
    instances: Mapping[str, Instances] = field(repr=False)


@dataclass(frozen=True, eq=False)
class Shown:
    """What the page shows of :class:`Found`.

    Attributes:
        panels: Title of the detector to the annotated picture, (h, w, 3), RGB.
        tables: Title of the detector to its detections as HTML.
        summary: How many are shown, plain text.
        content: The same as plain values, for JSON.
    """

    panels: Mapping[str, Image] = field(repr=False)
    tables: Mapping[str, str] = field(repr=False)
    summary: str
    content: Mapping[str, Any] = field(repr=False)

    def sheet(self) -> Image:
        """Give the picture to be downloaded, RGB: the panel, or the panels side by side."""
        if len(self.panels) == 1:
            return next(iter(self.panels.values()))
        panels = list(self.panels.values())
        width = max(panel.shape[1] for panel in panels)
        return draw_sheet([SheetRow(panels, list(self.panels))], panel_px=width)


# --- What comes in --------------------------------------------------------------------------------


def parse_names(text: str | None, limits: Limits) -> tuple[str, ...]:
    """Read class names as a visitor types them: between commas, semicolons or line breaks.

    Args:
        text: As typed. It is never taken for a path or for the name of a dataset.
        limits: How many and how long they may be.

    Returns:
        The names; white space in them is one blank each, empty ones are left out.

    Raises:
        PageError: None, too many, one that is too long, repeated (capitals do not make a
            difference to CLIP), or holds characters that cannot be seen.
    """
    pieces = (" ".join(piece.split()) for piece in re.split(r"[,;\r\n]", text or ""))
    names = [piece for piece in pieces if piece]
    if not names:
        raise PageError("Type the classes to look for, separated by commas: cat, traffic cone.")
    if len(names) > limits.max_names:
        raise PageError(f"{len(names)} classes are too many: at most {limits.max_names}.")
    if long := [name for name in names if len(name) > limits.max_name_length]:
        raise PageError(
            f"A class name of {len(long[0])} characters is too long: at most "
            f"{limits.max_name_length}. It begins “{long[0][:30]}…”; separate names by commas."
        )
    for _, name in repeated_names(names):
        raise PageError(f"The class “{name}” is named twice: each one once, please.")
    try:
        check_names(names, "the classes")
    except ValueError as error:
        raise PageError(
            f"A class name holds characters that cannot be seen or read ({error})."
        ) from error
    return tuple(names)


def make_filter(
    score_threshold: float | None,
    top_k: float | None,
    class_thresholds: str | None,
    vocabulary: Sequence[str],
) -> DetectionFilter:
    """Read what a visitor sets about the detections to show.

    Args:
        score_threshold: 0..1.
        top_k: Most detections of each detector.
        class_thresholds: ``NAME=SCORE`` between commas or line breaks; never taken for a path.
        vocabulary: Names that may have a threshold of their own.

    Raises:
        PageError: Something is not a number, out of range, or no class of the vocabulary.
    """
    entries = [each for each in re.split(r"[,;\r\n]", class_thresholds or "") if each.strip()]
    try:
        if score_threshold is None or top_k is None or int(top_k) != top_k:
            raise ValueError(
                f"expected numbers, got the threshold {score_threshold!r} and at most {top_k!r}"
            )
        keep = DetectionFilter(score_threshold, int(top_k), read_class_thresholds(entries))
        keep.check_vocabulary(vocabulary)
    except (TypeError, ValueError, OverflowError) as error:
        raise PageError(f"Cannot tell which detections to show: {error}.") from error
    return keep


def read_upload(path: str | os.PathLike[str], limits: Limits) -> NDArray[np.uint8]:
    """Read a picture that a visitor sent; its size is checked before it is decoded.

    Args:
        path: Of the file.
        limits: How large it may be.

    Returns:
        (H, W, 3), BGR, upright.

    Raises:
        PageError: It is too large, of another format or broken.
    """
    size = Path(path).stat().st_size
    if size == 0:
        raise PageError("The file is empty.")
    if size > limits.max_bytes:
        raise PageError(
            f"The file is too large: {_megabytes(size)}, at most {_megabytes(limits.max_bytes)}."
        )
    try:
        with PILImage.open(path, formats=_FORMATS) as header:
            width, height = header.size
    except UnidentifiedImageError as error:
        raise PageError(
            "The file is not a picture that can be read: expected JPEG, PNG, WebP, GIF or BMP."
        ) from error
    except PILImage.DecompressionBombError as error:
        raise PageError(
            f"The picture is too large: at most {limits.max_pixels / 1e6:g} million pixels."
        ) from error
    except Exception as error:  # anything may come out of Pillow's decoders
        raise _broken(error) from error
    if width * height > limits.max_pixels or max(width, height) > _MAX_SIDE:
        raise PageError(
            f"The picture is too large: {width} × {height} pixels, at most "
            f"{limits.max_pixels / 1e6:g} million, and {_MAX_SIDE} along a side."
        )
    try:
        return read_picture(os.fspath(path))
    except ValueError as error:
        raise _broken(error) from error


def _broken(error: Exception) -> PageError:
    logger.info("an upload cannot be decoded: %s", error)
    return PageError("The picture is broken: it cannot be decoded. Try to save it anew.")


def _megabytes(count: int) -> str:
    return f"{count / 1024**2:.3g} MB"


def safe_name(name: str | None, extension: str = "", limit: int = 60) -> str:
    """Turn a visitor's file name into one that is harmless as a file's name and as text.

    Args:
        name: Of the upload; may hold folders.
        extension: Takes the place of the name's own; "" keeps it.
        limit: Most characters before the extension.

    Returns:
        Letters, digits, dots, dashes, underscores and blanks alone; it begins with none of the
        dots. ``picture`` if nothing is left.
    """
    last = PureWindowsPath(PurePosixPath(name or "").name).name
    stem, dot, own = last.rpartition(".")
    if not dot or not re.fullmatch(r"\w{1,5}", own):
        stem, own = last, ""
    stem = re.sub(r"[^\w. -]", "_", stem).strip(". ")[:limit] or "picture"
    return stem + (extension or (f".{own}" if own else ""))


# --- Detecting and showing ------------------------------------------------------------------------


def detect(
    predictors: Mapping[str, OpenVocabularyPredictor],
    path: str | os.PathLike[str],
    names: str | None,
    limits: Limits,
    *,
    file_name: str | None = None,
) -> Found:
    """Detect in an upload with each detector; no vocabulary outlasts the call.

    Args:
        predictors: By title; threads may share them.
        path: Of the picture.
        names: Class names as typed; see :func:`parse_names`.
        limits: What is accepted.
        file_name: What the visitor calls the picture.

    Returns:
        All detections.

    Raises:
        PageError: The picture or the names cannot be used.
    """
    vocabulary = parse_names(names, limits)
    image = read_upload(path, limits)
    instances = {
        title: predictor.predict(image, vocabulary=vocabulary)
        for title, predictor in predictors.items()
    }
    rgb = image[:, :, ::-1]
    least, most = _VIEW_PX
    view, factor = fit(rgb, most) if max(rgb.shape[:2]) > most else enlarge(rgb, least)
    return Found(
        safe_name(file_name or os.fspath(path)),
        (image.shape[0], image.shape[1]),
        vocabulary,
        np.ascontiguousarray(view),
        factor,
        instances,
    )


def show(found: Found, keep: DetectionFilter) -> Shown:
    """Choose and draw detections; no detector is asked.

    Args:
        found: All of them.
        keep: Which ones to show.

    Returns:
        Pictures, tables, and the same as plain values: the keys are those of ``demo.py``'s
        detections.json.
    """
    kept = {title: keep(each, found.vocabulary) for title, each in found.instances.items()}
    records = {title: as_records(each, found.vocabulary) for title, each in kept.items()}
    height, width = found.view.shape[:2]
    panels = {
        title: draw_instances(
            found.view,
            scale_boxes(each, found.factor, (height, width)),
            found.vocabulary,
            min_long_side=1,
            font_px=max(height, width) / _LABELS_PER_SIDE,
        )
        for title, each in kept.items()
    }
    main, *others = records
    content = {
        "file_name": found.file_name,
        "height": found.size[0],
        "width": found.size[1],
        "vocabulary": list(found.vocabulary),
        "detectors": list(records),
        "confidence_threshold": keep.score_threshold,
        "class_thresholds": dict(keep.class_thresholds),
        "top_k": keep.top_k,
        "detections": records[main],
    }
    if others:
        content["compared"] = {title: records[title] for title in others}
    tables = {
        title: _table(records[title], found.vocabulary) or _nothing(found, title)
        for title in records
    }
    counts = ", ".join(
        (f"{title}: " if others else "") + f"{len(kept[title])} of {len(found.instances[title])}"
        for title in kept
    )
    summary = (
        f"{found.file_name}, {found.size[1]} × {found.size[0]} pixels, "
        f"{len(found.vocabulary)} class{'es' * (len(found.vocabulary) > 1)}. "
        f"Detections shown: {counts}."
    )
    return Shown(panels, tables, summary, content)


def _table(records: Sequence[Mapping[str, Any]], vocabulary: Sequence[str]) -> str:
    """Write detections as HTML, with the colours that their boxes have; "" if there are none."""
    rows = []
    for record in records:
        red, green, blue = (round(255 * c) for c in class_color(vocabulary.index(record["class"])))
        box = ", ".join(f"{value:.0f}" for value in record["box_xyxy"])
        rows.append(
            f'<tr><td><i style="background:rgb({red},{green},{blue})"></i>'
            f"{escape(record['class'])}</td><td>{record['score']:.1%}</td><td>{box}</td></tr>"
        )
    if not rows:
        return ""
    head = '<th>Class</th><th>Score</th><th title="x0, y0, x1, y1 in pixels">Box</th>'
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _nothing(found: Found, title: str) -> str:
    instances = found.instances[title]
    if not len(instances):
        return "<p>Nothing found.</p>"
    best = as_records(instances[:1], found.vocabulary)[0]
    return (
        f"<p>Nothing reaches the threshold. The best detection: {escape(best['class'])}, "
        f"{best['score']:.1%}.</p>"
    )
