"""The look of the pages that are written: one style, and small pieces of HTML."""

from __future__ import annotations

import base64
import html
import io
from typing import Any

from PIL import Image as PILImage

from hierkd.reports.drawing import Image

__all__ = ["data_uri", "escape", "figure", "img", "jpeg_uri", "page"]


def escape(value: Any) -> str:
    """Write a value as text in HTML, also inside an attribute's quotes."""
    return html.escape(str(value))


def img(source: str, alternative: str) -> str:
    """Assemble a picture; ``source`` is a URL, ``alternative`` plain text."""
    return f'<img src="{source}" alt="{escape(alternative)}" loading="lazy">'


def figure(source: str, caption: str, alternative: str) -> str:
    """Assemble a figure; ``caption`` is HTML."""
    return f"<figure>{img(source, alternative)}<figcaption>{caption}</figcaption></figure>"


def data_uri(kind: str, content: bytes) -> str:
    """Put a file's content of a MIME type into a URL."""
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def jpeg_uri(image: Image) -> str:
    """Put a picture (H, W, 3), RGB, into a URL, as JPEG."""
    buffer = io.BytesIO()
    PILImage.fromarray(image).save(buffer, format="JPEG", quality=88)
    return data_uri("image/jpeg", buffer.getvalue())


STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: #1b1f24;
  font: 17px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 2.2rem 1.2rem 4rem; }
h1 { font-size: clamp(1.9rem, 5vw, 2.9rem); line-height: 1.12; margin: 0 0 .6rem;
  letter-spacing: -.02em; }
h2 { font-size: 1.45rem; margin: 3.2rem 0 .8rem; letter-spacing: -.01em; }
p { max-width: 46rem; margin: .6rem 0 1rem; }
.lead { font-size: 1.16rem; color: #3a424c; margin-bottom: 1.4rem; }
.caption, figcaption { font-size: .86rem; line-height: 1.45; color: #56606b; }
figure { margin: 0; min-width: 0; }
figcaption { margin-top: .3rem; }
figcaption b { color: #1b1f24; font-size: .98rem; }
img { display: block; width: 100%; height: auto; border-radius: 6px; }
.grid { display: grid; gap: 1rem; }
.four { grid-template-columns: repeat(4, minmax(0, 1fr)); }
.three { grid-template-columns: repeat(3, minmax(0, 1fr)); }
.two { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 1.6rem 2rem; }
.heat { margin: 0 0 1.3rem; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .3rem .5rem; }
.pair figcaption { grid-column: 1 / -1; margin: 0; }
.pair span { font-size: .78rem; color: #56606b; }
.key { white-space: nowrap; margin-right: .5rem; }
.key i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .3em;
  vertical-align: -.05em; }
.ramp { display: inline-block; width: 5.5em; height: .75em; border-radius: 2px;
  vertical-align: -.05em;
  background: linear-gradient(90deg, #000004, #420a68, #932667, #dd513a, #fca50a, #fcffa4); }
.cards { display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 1rem;
  margin: 1rem 0 1.4rem; }
.card { border: 1px solid #dfe3e8; border-radius: 10px; padding: .8rem 1rem; }
.card span, .card small { display: block; font-size: .84rem; color: #56606b; line-height: 1.35; }
.card strong { display: block; font-size: 2.1rem; line-height: 1.25; letter-spacing: -.02em; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%;
  max-width: 46rem; margin: 1rem 0; font-size: .95rem; }
th, td { text-align: left; padding: .42rem .9rem .42rem 0; border-bottom: 1px solid #e6e9ed;
  overflow-wrap: anywhere; }
thead th { border-bottom: 2px solid #1b1f24; }
td:nth-child(n+3), th:nth-child(n+3) { text-align: right; }
.facts th { font-weight: 500; color: #56606b; width: 13rem; }
.scroll { overflow-x: auto; }
table.wide { max-width: none; font-size: .9rem; }
table.texts3 td:nth-child(3), table.texts3 th:nth-child(3) { text-align: left; }
.bar { display: inline-block; width: 7em; height: .62em; margin-right: .6em; background: #f1f3f5;
  border-radius: 2px; overflow: hidden; }
.bar i { display: block; height: 100%; }
.number { display: inline-block; min-width: 3.2em; }
.notes { color: #7a4100; font-size: .92rem; padding-left: 1.2rem; }
details { margin: .8rem 0; }
summary { cursor: pointer; color: #0b5cad; }
pre { background: #f6f8fa; border-radius: 6px; padding: .8rem 1rem; overflow-x: auto;
  font-size: .8rem; line-height: 1.45; }
@media (max-width: 760px) {
  body { font-size: 16px; }
  main { padding-top: 1.4rem; }
  .four, .cards, .three { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .7rem; }
  .two { grid-template-columns: minmax(0, 1fr); }
  .facts th { width: 9rem; }
}
"""


def page(title: str, body: str) -> str:
    """Assemble a page that needs no other file; ``title`` is plain text, ``body`` HTML."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""
