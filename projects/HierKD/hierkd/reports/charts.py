"""Curves of a training, and sheets of pictures in the manner of the paper's Figures 4 and 5."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
from detectron2.structures import Instances
from matplotlib.figure import Figure

from hierkd.evaluation.heat_maps import HeatMap, overlay_heat_map
from hierkd.inference.detections import scale_boxes
from hierkd.inference.drawing import Image, SheetRow, draw_instances, draw_sheet, fit
from hierkd.reports.gallery import Sample, draw_sample, legend_of
from hierkd.reports.metrics import Curve

__all__ = [
    "draw_comparison",
    "draw_curves",
    "draw_heat_map_sheet",
    "draw_side_by_side",
]

# Of curves side by side, distinct with common colour-blindness (Okabe and Ito). [ours]
_LINE_COLORS = ("#0b5cad", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#444444")
# A positive curve whose values differ by more than this factor gets a logarithmic axis. [ours]
_LOG_FACTOR = 30.0
_FEW_POINTS = 15  # below this each point is marked. [ours]
_MAX_POINTS = 1000  # of a curve that is drawn: more than its pixels. [ours]
# Bright end of a heat map's colours where every score is tiny, so that noise stays dark. [ours]
_MIN_HEAT_RANGE = 0.05


def draw_curves(lines: Mapping[str, Curve], *, from_zero: bool = True) -> bytes:
    """Draw curves into one SVG with a clear ground, with a legend if they are several.

    Args:
        lines: Name to curve. NaN and infinities are gaps.
        from_zero: Whether the axis of values begins at zero, if none is negative.
    """
    rows = -(-len(lines) // 2) if len(lines) > 1 else 0  # of the legend
    height = 2.2 + 0.17 * rows
    plot = Figure(figsize=(3.6, height))
    # places by hand: matplotlib's computed layouts cost more than half as much again
    axes = plot.add_axes((0.16, 0.22 / height, 0.82, (height - 0.3 - 0.17 * rows) / height))
    for (name, (xs, ys)), color in zip(lines.items(), cycle(_LINE_COLORS)):
        step = -(-len(xs) // _MAX_POINTS) or 1
        kept = [y if math.isfinite(y) else math.nan for y in ys[::step]]
        axes.plot(
            xs[::step],
            kept,
            color=color,
            lw=1.6,
            marker="o" if len(kept) < _FEW_POINTS else None,
            ms=3.5,
            label=name,
        )
    values = [v for _, ys in lines.values() for v in ys if math.isfinite(v)]
    axes.locator_params(axis="both", nbins=5)
    axes.ticklabel_format(axis="y", useOffset=False)  # its sum would stand above the picture
    if values and 0 < min(values) < max(values) / _LOG_FACTOR:
        axes.set_yscale("log")
    elif from_zero and values and min(values) >= 0:
        axes.set_ylim(0, 1.08 * max(values) or 1)
    axes.margins(x=0.03 if any(len(xs) < _FEW_POINTS for xs, _ in lines.values()) else 0)
    axes.grid(axis="y", color="#e3e6ea", linewidth=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(colors="#444", labelsize=8, length=0, which="both")
    if len(lines) > 1:
        plot.legend(loc="upper left", fontsize=7, frameon=False, ncols=2, borderaxespad=0.1)
    buffer = io.BytesIO()
    plot.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue()


def draw_heat_map_sheet(
    image: Image, maps: Sequence[Sequence[HeatMap]], *, panel_px: int = 400
) -> Image:
    """Draw heat maps over an RGB picture (Fig. 4): a row per class, a panel per level.

    The colours of a row run from 0 to its highest score, or to 0.05 if that is higher.
    """
    picture, _ = fit(image, panel_px)
    rows = []
    for of_class in maps:
        titles = [
            f"{m.class_name} · {m.level.upper()}, stride {m.stride} · max {m.scores.max():.2g}"
            for m in of_class
        ]
        top = max(_MIN_HEAT_RANGE, *(float(m.scores.max()) for m in of_class))
        panels = [picture, *(overlay_heat_map(picture, m.scores, top) for m in of_class)]
        rows.append(SheetRow(panels, [of_class[0].class_name, *titles]))
    ramp = np.tile(np.linspace(0, 1, 240, dtype=np.float32), (22, 1))
    swatch = overlay_heat_map(np.full((22, 240, 3), 127, np.uint8), ramp, 1.0)
    text = (
        "score (class probability × predicted IoU) from 0 to the highest of the row, "
        f"at least {_MIN_HEAT_RANGE}"
    )
    return draw_sheet(rows, panel_px=panel_px, legend=[(swatch, text)], title_px=20)


def draw_comparison(
    columns: Mapping[str, Sequence[Sample]],
    captions: Sequence[str],
    *,
    panel_px: int = 480,
) -> Image:
    """Draw what detectors find in the same pictures (Fig. 5): ground truth, a panel per detector.

    Args:
        columns: Title of a detector to its samples; all of the same pictures, in the same order.
        captions: A line above each picture.
        panel_px: Longer side of each panel.
    """
    rows: list[SheetRow] = []
    for index, of_picture in enumerate(zip(*columns.values(), strict=True)):
        panels = [draw_sample(of_picture[0], of_picture[0].truth, side=panel_px)]
        panels += [draw_sample(each, each.detections, side=panel_px) for each in of_picture]
        titles = ["ground truth", *columns] if index == 0 else [""] * len(panels)
        rows.append(SheetRow(panels, titles, captions[index]))
    legend = [
        (np.tile(np.rint(255 * np.array(color)).astype(np.uint8), (22, 34, 1)), text)
        for color, text in legend_of(sample for each in columns.values() for sample in each)
    ]
    return draw_sheet(rows, panel_px=panel_px, legend=legend, title_px=28)


def draw_side_by_side(
    image: Image,
    found: Mapping[str, Instances],
    vocabulary: Sequence[str],
    *,
    panel_px: int = 640,
) -> Image:
    """Draw what several detectors find in one RGB picture: a titled column for each.

    ``vocabulary`` are the names that ``pred_classes`` index, in all of them.
    """
    fitted, factor = fit(image, panel_px)
    panels = []
    for instances in found.values():
        scaled = scale_boxes(instances, factor, fitted.shape[:2])
        panels.append(draw_instances(fitted, scaled, vocabulary, min_long_side=1, font_px=16))
    return draw_sheet([SheetRow(panels, list(found))], panel_px=panel_px)
