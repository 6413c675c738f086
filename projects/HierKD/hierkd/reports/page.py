"""What a page of a report shows, and its one template: a file that needs no other.

A page is plain data, so that it can be looked at without HTML. ``templates/page.html.j2`` writes
it; every text is escaped there.
"""

from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image as PILImage

from hierkd.files import replacing
from hierkd.inference.drawing import Color, Image

__all__ = [
    "Bar",
    "Card",
    "Cell",
    "Figure",
    "Page",
    "Picture",
    "Section",
    "Table",
    "data_uri",
    "embedded",
    "write_page",
]


@dataclass(frozen=True)
class Picture:
    """A picture or a video."""

    source: str = field(repr=False)  # URL: data, or a file beside the page; "" is a link alone
    alternative: str  # for those who cannot see it; the text of a link alone
    label: str = ""  # below it
    link: str = ""  # where a click leads; without, it enlarges the picture
    video: bool = False
    size: tuple[int, int] | None = None  # width and height in pixels, so that nothing jumps


@dataclass(frozen=True)
class Figure:
    """Pictures that belong together; two stand side by side, more one below the other."""

    pictures: Sequence[Picture]
    title: str = ""
    caption: str = ""


@dataclass(frozen=True)
class Card:
    """A figure that catches the eye."""

    name: str
    value: float | None
    note: str = ""


@dataclass(frozen=True)
class Bar:
    """A cell of a table that shows percent, as a strip of a colour, too."""

    percent: float | None
    color: Color


Cell = str | float | None | Bar  # None or NaN: what cannot be computed, a dash


@dataclass(frozen=True)
class Table:
    """Rows under headers; the first ``num_texts`` columns hold words, the others figures."""

    headers: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    num_texts: int = 2


@dataclass(frozen=True)
class Section:
    """Part of a page. What is empty is left out; the rest comes in this order."""

    title: str = ""  # or what a folded section is opened by
    text: str = ""
    legend: Sequence[tuple[Color, str]] = ()
    cards: Sequence[Card] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    table: Table | None = None
    figures: Sequence[Figure] = ()
    columns: int = 2  # of the figures, 1 to 4
    code: str = ""
    caption: str = ""
    folded: Sequence[Section] = ()  # a click opens them


@dataclass(frozen=True)
class Page:
    """Sections from top to bottom, below a heading and a paragraph."""

    title: str
    sections: Sequence[Section]
    lead: str = ""


def write_page(path: str | os.PathLike[str], page: Page) -> None:
    """Write a page as HTML without scripts, whole or not at all."""
    text = _ENVIRONMENT.get_template("page.html.j2").render(page=page)
    with replacing(path) as making:
        making.write_text(text, encoding="utf-8")


def data_uri(kind: str, content: bytes) -> str:
    """Put a file's content of a MIME type into a URL."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def embedded(image: Image, alternative: str, label: str = "") -> Picture:
    """A picture (H, W, 3), RGB, that lies in the page, as JPEG."""
    buffer = io.BytesIO()
    PILImage.fromarray(image).save(buffer, format="JPEG", quality=88)
    source, size = data_uri("image/jpeg", buffer.getvalue()), (image.shape[1], image.shape[0])
    return Picture(source, alternative, label, size=size)


def _number(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.1f}"


def _css(color: Color) -> str:
    return "#" + "".join(f"{round(255 * channel):02x}" for channel in color)


_ENVIRONMENT = Environment(
    loader=PackageLoader("hierkd.reports"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters |= {"css": _css, "number": _number}
