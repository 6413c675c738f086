"""Parts of the reports: curves, pictures, tables. All texts are escaped here."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from hierkd.reports.drawing import Color
from hierkd.reports.gallery import (
    CORRECT,
    CORRECT_COLOR,
    UNCOUNTED_COLOR,
    WRONG_COLOR,
    Sample,
    draw_sample,
)
from hierkd.reports.metrics import Curve
from hierkd.reports.page import data_uri, escape, figure, img, jpeg_uri

__all__ = [
    "BASE_LEGEND",
    "NOVEL_LEGEND",
    "TITLES",
    "bar",
    "curve_figure",
    "curve_grid",
    "details",
    "facts",
    "legend",
    "loss_names",
    "number",
    "pairs",
    "table",
]

NOVEL_LEGEND = (
    (CORRECT_COLOR, "novel class, correct"),
    (WRONG_COLOR, "novel class, wrong"),
)
BASE_LEGEND = ((UNCOUNTED_COLOR, "base class"),)

# What a scalar of metrics.json is; docs/monitoring.md says more.
TITLES = {
    "total_loss": "all losses together",
    "loss_cls": "classification (Eq. 1)",
    "loss_box_reg": "boxes (GIoU)",
    "loss_iou": "box quality (IoU branch)",
    "loss_centerness": "box quality (centre-ness)",
    "loss_ikd": "instance-level distillation (Eq. 2)",
    "loss_gkd": "global-level distillation",
    "loss_gkd_image": "global-level distillation, by image (Eq. 5)",
    "loss_gkd_caption": "global-level distillation, by caption (Eq. 5)",
    "lr": "learning rate",
    "tau_c": "τ_c, factor of the class cosines (Eq. 1)",
    "tau_m": "τ_m, factor of the match scores (Eq. 4)",
    "cls_weight": "learned weight of the classification loss",
    "background_start_cosine": "background: cosine with its start",
    "background_class_cosine": "background: cosine with the nearest class",
    "num_pos_anchors": "positive points per image",
    "iou_pos_anchors": "IoU of the positives' boxes with their objects",
    "num_distilled_regions": "distilled points per image (§3.2)",
    "iou_distilled_regions": "IoU of the boxes good enough to distil",
    "time": "seconds per iteration",
    "data_time": "seconds per iteration spent waiting for data",
    "rank_data_time": "seconds waiting for data, slowest process",
    "eta_seconds": "seconds to the end, as estimated",
}

# Of these the change matters, not the distance from zero.
_FITTED = {
    *("tau_c", "tau_m", "cls_weight", "background_start_cosine", "background_class_cosine"),
    *("iou_pos_anchors", "iou_distilled_regions"),
}

# Of curves side by side, distinct with common colour-blindness (Okabe and Ito). [ours]
_LINE_COLORS = ("#0b5cad", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#444444")
# A positive curve whose values differ by more than this factor gets a logarithmic axis. [ours]
_LOG_FACTOR = 30.0
_FEW_POINTS = 15  # below this each point is marked. [ours]
_MAX_POINTS = 1000  # of a curve that is drawn: more than its pixels. [ours]


def loss_names(curves: Iterable[str]) -> list[str]:
    """Pick the losses among the scalars' names, ``total_loss`` first."""
    losses = {name for name in curves if name == "total_loss" or name.startswith("loss_")}
    known = [name for name in TITLES if name in losses]
    return [*known, *sorted(losses - set(known))]


def legend(entries: Iterable[tuple[Color, str]]) -> str:
    """Explain colours."""
    return " ".join(
        f'<span class="key"><i style="background:{_css(color)}"></i>{escape(name)}</span>'
        for color, name in entries
    )


def _css(color: Color) -> str:
    return "#" + "".join(f"{round(255 * channel):02x}" for channel in color)


def number(value: float | None, digits: int = 1) -> str:
    """Write a figure; what cannot be computed is a dash."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def facts(entries: Mapping[str, Any]) -> str:
    """Lay names and values out as a table of two columns."""
    rows = "".join(
        f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>" for key, value in entries.items()
    )
    return f'<table class="facts"><tbody>{rows}</tbody></table>'


def table(
    headers: Sequence[str],
    rows: Iterable[Sequence[Any]],
    *,
    num_texts: int = 2,
    escaped: bool = False,
) -> str:
    """Lay rows out under headers.

    Args:
        headers: One per column.
        rows: From top to bottom.
        num_texts: The first columns, which hold texts; numbers are set flush right.
        escaped: Whether the cells are HTML already.
    """
    head = "".join(f"<th>{escape(each)}</th>" for each in headers)
    body = "".join(
        "<tr>" + "".join(f"<td>{cell if escaped else escape(cell)}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    style = f"wide texts{num_texts}"
    return (
        f'<div class="scroll"><table class="{style}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def bar(percent: float | None, *, novel: bool) -> str:
    """Show a figure in percent as a bar in the colour of novel or of base classes."""
    text = number(percent)
    if text == "–" or percent is None:
        return text
    width = min(max(percent, 0.0), 100.0)
    color = _css(CORRECT_COLOR if novel else UNCOUNTED_COLOR)
    strip = f'<i style="width:{width:.1f}%;background:{color}"></i>'
    return f'<span class="bar">{strip}</span><span class="number">{text}</span>'


def details(summary: str, content: str) -> str:
    """Fold something away; ``summary`` is plain text, ``content`` HTML."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def pairs(examples: Sequence[Sample], *, label_uncounted: bool = False) -> str:
    """Show pictures twice, with their objects and with what was detected, and name both.

    Args:
        examples: The pictures.
        label_uncounted: Whether classes that are not judged are labelled, too.
    """
    found = []
    for sample in examples:
        truth, detected = (
            jpeg_uri(draw_sample(sample, boxes, label_uncounted=label_uncounted))
            for boxes in (sample.truth, sample.detections)
        )
        names = sorted({box.class_name for box in sample.truth if box.verdict == CORRECT})
        found.append(
            f'<figure class="pair"><div>{img(truth, "ground truth")}<span>ground truth</span></div>'
            f"<div>{img(detected, 'detections')}<span>detected</span></div>"
            f"<figcaption>{escape(Path(sample.file_name).name)}: {escape(', '.join(names))}"
            f"</figcaption></figure>"
        )
    return f'<div class="grid two">{"".join(found)}</div>'


def curve_grid(curves: Mapping[str, Mapping[str, Curve]], runs: Sequence[str] | None = None) -> str:
    """Draw a figure per scalar; in each a line per run.

    Args:
        curves: Name of the scalar to name of the run to the curve.
        runs: Names of all runs, so that each has one colour in all figures, also in those where
            others are missing; None means that there is only one.
    """
    figures = [
        curve_figure(
            TITLES.get(name, name), lines, name, names=runs or (), from_zero=name not in _FITTED
        )
        for name, lines in curves.items()
    ]
    return f'<div class="grid three">{"".join(figures)}</div>'


def curve_figure(
    title: str,
    lines: Mapping[str, Curve],
    alternative: str = "",
    *,
    names: Sequence[str] = (),
    from_zero: bool = True,
) -> str:
    """Draw curves into one figure, with a legend if they are several.

    Args:
        title: Below it.
        lines: Name to curve. NaN and infinities are gaps.
        alternative: Text in place of the picture; the title if there is none.
        names: All names that there are, also in other figures; by default those of ``lines``.
        from_zero: Whether the axis of values begins at zero, if none is negative.
    """
    return figure(
        _svg(lines, list(names) or list(lines), from_zero), escape(title), alternative or title
    )


def _svg(lines: Mapping[str, Curve], names: Sequence[str], from_zero: bool) -> str:
    rows = -(-len(lines) // 2) if len(names) > 1 else 0  # of the legend
    height = 2.2 + 0.17 * rows
    plot = Figure(figsize=(3.6, height))
    # places by hand: matplotlib's computed layouts cost more than half as much again
    axes = plot.add_axes((0.13, 0.22 / height, 0.85, (height - 0.3 - 0.17 * rows) / height))
    values = [v for _, ys in lines.values() for v in ys if math.isfinite(v)]
    for name, (xs, ys) in lines.items():
        color = _LINE_COLORS[names.index(name) % len(_LINE_COLORS)]
        step = -(-len(xs) // _MAX_POINTS) or 1
        kept = [y if math.isfinite(y) else math.nan for y in ys[::step]]
        marker = "o" if len(kept) < _FEW_POINTS else None
        axes.plot(xs[::step], kept, color=color, lw=1.6, marker=marker, ms=3.5, label=_plain(name))
    logarithmic = bool(values) and 0 < min(values) < max(values) / _LOG_FACTOR
    if logarithmic:
        axes.set_yscale("log")
    elif from_zero and values and min(values) >= 0:
        axes.set_ylim(bottom=0)
    axes.margins(x=0.03 if any(len(xs) < _FEW_POINTS for xs, _ in lines.values()) else 0)
    axes.locator_params(axis="x", nbins=5)
    if not logarithmic:
        axes.locator_params(axis="y", nbins=5)
    axes.grid(axis="y", color="#e3e6ea", linewidth=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(colors="#444", labelsize=8, length=0, which="both")
    if len(names) > 1:
        plot.legend(loc="upper left", fontsize=7, frameon=False, ncols=2, borderaxespad=0.1)
    buffer = io.BytesIO()
    plot.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return data_uri("image/svg+xml", buffer.getvalue())


def _plain(text: str) -> str:
    """A text that matplotlib neither typesets as a formula nor leaves out of a legend."""
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
