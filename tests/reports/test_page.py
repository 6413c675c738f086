"""What a page becomes: HTML that needs no other file, in which every text is text."""

import dataclasses
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from hierkd.reports.charts import draw_curves
from hierkd.reports.page import (
    Bar,
    Card,
    Figure,
    Page,
    Picture,
    Section,
    Table,
    data_uri,
    embedded,
    write_page,
)

HOSTILE = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>\"'$_{"
GREY = np.full((8, 9, 3), 128, np.uint8)


class Html(HTMLParser):
    """Collects what a page would fetch, its texts, and whether its tags pair up."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.sources, self.open, self.texts = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for key, value in attrs if key in {"src", "href"}]
        assert not [key for key, _ in attrs if key.startswith("on")]
        if tag not in {"meta", "img", "br", "input"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def everything(text, source):
    """A page with all parts that there are, in which each text is ``text``."""
    svg = data_uri("image/svg+xml", draw_curves({text: ([1], [2.0]), "b": ([1], [3.0])}))
    cells = [Bar(each, (0.0, 0.0, 1.0)) for each in (33.3, 250.0, -1.0, float("nan"), None)]
    section = Section(
        title=text,
        text=text,
        legend=[((1.0, 0.5, 0.0), text)],
        cards=[Card(text, 1.0, text)],
        facts={text: text},
        notes=[text],
        table=Table([text, text, text], [[text, 12.345, None, *cells]]),
        figures=[
            Figure([Picture(source, text, text), Picture(svg, text, link=source)], text, text),
            Figure([Picture(source, text, video=True)]),
            Figure([Picture("", text, link=source)]),
        ],
        columns=3,
        code=text,
        caption=text,
    )
    assert all(getattr(section, each.name) for each in dataclasses.fields(Section)[:-1])
    folded = dataclasses.replace(section, folded=[section])
    return Page(text, [folded], lead=text)


@pytest.fixture
def write(tmp_path):
    def _write(page):
        write_page(tmp_path / "new" / "page.html", page)
        return (tmp_path / "new" / "page.html").read_text(encoding="utf-8")

    return _write


def test_hostile_texts_are_only_written(write):
    harmless = Html(write(everything("harmless", embedded(GREY, "").source)))
    found = Html(write(everything(HOSTILE, embedded(GREY, "").source)))
    times = "".join(found.texts).count(HOSTILE)
    assert times == "".join(harmless.texts).count("harmless") > 30
    assert found.tags == harmless.tags


def test_a_page_needs_no_other_file(write):
    html = write(everything("plain", embedded(GREY, "").source))
    found = Html(html)
    assert len(found.sources) == 10
    assert all(each.startswith("data:image/") for each in found.sources)
    assert {"script", "link", "iframe"}.isdisjoint(found.tags)
    assert not re.search(r"url\(|@import|https?:", html)
    widths = re.findall(r'<i style="width:([\d.]+)%;background:#0000ff">', html)
    assert widths == ["33.3", "100.0", "0.0"] * 2
    assert [t.strip() for t in found.texts if t.strip() in ("12.3", "–", "250.0")] == (
        ["12.3", "–", "250.0", "–", "–"] * 2
    )


def test_what_is_empty_is_left_out(write):
    found = Html(write(Page("a title", [Section(text="alone")])))
    assert found.tags.count("p") == 1
    assert {"table", "div", "details", "h2", "ul", "pre"}.isdisjoint(found.tags)
