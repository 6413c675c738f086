"""Pictures in the manner of the paper's Figures 4 and 5, as sheets of labelled panels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from detectron2.structures import Instances

from hierkd.evaluation.heat_maps import HeatMap, overlay_heat_map
from hierkd.inference.detections import scale_boxes
from hierkd.reports.drawing import Color, Image, SheetRow, draw_instances, draw_sheet, fit
from hierkd.reports.gallery import (
    CORRECT_COLOR,
    UNCOUNTED,
    UNCOUNTED_COLOR,
    WRONG_COLOR,
    Sample,
    draw_sample,
)

__all__ = [
    "draw_comparison",
    "draw_heat_map_sheet",
    "draw_side_by_side",
    "draw_truth_and_detections",
    "keep_best",
]

# Bright end of a heat map's colours where every score is tiny, so that noise stays dark. [ours]
_MIN_HEAT_RANGE = 0.05


def draw_heat_map_sheet(
    image: Image, maps: Sequence[Sequence[HeatMap]], *, panel_px: int = 400
) -> Image:
    """Draw the heat maps of some classes over a picture (Fig. 4): a row per class.

    Args:
        image: (H, W, 3), RGB, 0..255.
        maps: As from :func:`hierkd.evaluation.heat_maps.score_heat_maps`.
        panel_px: Longer side of each panel.

    Returns:
        RGB sheet: the picture, then a panel per level. The colours of a row run from 0 to its
        highest score, or to 0.05 if that is higher.

    Raises:
        ValueError: There are no maps.
    """
    if not maps or not all(maps):
        raise ValueError("no heat maps to draw: expected at least one class and one level")
    picture, _ = fit(image, panel_px)
    rows = []
    for of_class in maps:
        top = max(_MIN_HEAT_RANGE, *(float(m.scores.max()) for m in of_class))
        panels = [overlay_heat_map(picture, m.scores, top) for m in of_class]
        titles = [
            f"{m.class_name} · {m.level.upper()}, stride {m.stride} · max {m.scores.max():.2g}"
            for m in of_class
        ]
        rows.append(SheetRow([picture, *panels], [of_class[0].class_name, *titles]))
    ramp = np.tile(np.linspace(0, 1, 240, dtype=np.float32), (22, 1))
    swatch = overlay_heat_map(np.full((22, 240, 3), 127, np.uint8), ramp, 1.0)
    text = (
        "score (class probability × predicted IoU) from 0 to the highest of the row, "
        f"at least {_MIN_HEAT_RANGE}"
    )
    return draw_sheet(rows, panel_px=panel_px, legend=[(swatch, text)], title_px=20)


def keep_best(samples: Sequence[Sample], threshold: float | None = None) -> list[Sample]:
    """Leave out weak detections.

    Args:
        samples: Pictures with their detections, best first.
        threshold: Lowest score. Without one, each picture keeps as many detections as it has
            objects, its best, so that detectors whose scores differ in scale can be compared.

    Returns:
        The samples with fewer detections.
    """
    return [
        replace(
            sample,
            detections=sample.detections[: len(sample.truth)]
            if threshold is None
            else tuple(box for box in sample.detections if (box.score or 0.0) >= threshold),
        )
        for sample in samples
    ]


def draw_comparison(
    runs: Mapping[str, Sequence[Sample]], captions: Sequence[str], *, panel_px: int = 480
) -> Image:
    """Draw what several detectors find in the same pictures (Fig. 5): a row per picture.

    Args:
        runs: Title of a column to its samples; all of the same pictures, in the same order.
        captions: A line above each picture's row.
        panel_px: Longer side of each panel.

    Returns:
        RGB sheet: the ground truth, then a column per detector.

    Raises:
        ValueError: There are no detectors or no pictures, or they differ in number.
    """
    counts = {len(samples) for samples in runs.values()} | {len(captions)}
    if not runs or counts == {0} or len(counts) > 1:
        found = {name: len(samples) for name, samples in runs.items()}
        raise ValueError(f"expected the same pictures for all, got {found}, {len(captions)} lines")
    columns = [[_fit_sample(sample, panel_px) for sample in samples] for samples in runs.values()]
    rows = []
    for index, caption in enumerate(captions):
        of_picture = [column[index] for column in columns]
        panels = [_draw(of_picture[0], truth=True), *(_draw(s, truth=False) for s in of_picture)]
        titles = ["ground truth", *runs] if index == 0 else [""] * len(panels)
        rows.append(SheetRow(panels, titles, caption))
    legend = [(_swatch(CORRECT_COLOR), "object, or correct detection (IoU ≥ 0.5)")]
    legend.append((_swatch(WRONG_COLOR), "wrong detection"))
    if any(b.verdict == UNCOUNTED for s in columns[0] for b in (*s.truth, *s.detections)):
        legend.append((_swatch(UNCOUNTED_COLOR), "class that is not judged"))
    return draw_sheet(rows, panel_px=panel_px, legend=legend, title_px=28)


def draw_truth_and_detections(
    sample: Sample, caption: str, *, judged: str = "novel", panel_px: int = 480
) -> Image:
    """Draw a picture twice: its objects, and what was detected.

    Args:
        sample: The picture; its boxes are labelled, also those of classes that are not judged.
        caption: A line above it.
        judged: What the classes that are judged are called in the legend; "" for all of them.
        panel_px: Longer side of each of the two, in pixels.

    Returns:
        RGB sheet.
    """
    fitted = _fit_sample(sample, panel_px)
    panels = [_draw(fitted, truth=True), _draw(fitted, truth=False)]
    kind = f"{judged} class" if judged else "object"
    legend = [(_swatch(CORRECT_COLOR), kind), (_swatch(WRONG_COLOR), f"{kind}, wrong")]
    if judged:
        legend.append((_swatch(UNCOUNTED_COLOR), "base class"))
    row = SheetRow(panels, ["ground truth", "detected"], caption)
    return draw_sheet([row], panel_px=panel_px, legend=legend)


def draw_side_by_side(
    image: Image,
    found: Mapping[str, Instances],
    vocabulary: Sequence[str],
    *,
    panel_px: int = 640,
) -> Image:
    """Draw what several detectors find in one picture: a column per detector, a colour per class.

    Args:
        image: (H, W, 3), RGB, 0..255.
        found: Title of a column to the detections, as for
            :func:`hierkd.reports.drawing.draw_instances`.
        vocabulary: Names that ``pred_classes`` index, in all of them.
        panel_px: Longer side of each panel.

    Returns:
        RGB sheet.

    Raises:
        ValueError: There are no detectors.
    """
    if not found:
        raise ValueError("no detectors to compare: expected at least one")
    fitted, factor = fit(image, panel_px)
    panels = []
    for instances in found.values():
        scaled = scale_boxes(instances, factor, fitted.shape[:2])
        panels.append(draw_instances(fitted, scaled, vocabulary, min_long_side=1, font_px=16))
    return draw_sheet([SheetRow(panels, list(found))], panel_px=panel_px)


def _draw(sample: Sample, *, truth: bool) -> Image:
    boxes = sample.truth if truth else sample.detections
    return draw_sample(sample, boxes, min_long_side=1, font_px=21, label_uncounted=True)


def _fit_sample(sample: Sample, side: int) -> Sample:
    """Bring a sample's picture, and its boxes with it, to a size."""
    image, factor = fit(sample.image, side)
    truth, detections = (
        tuple(
            replace(
                box,
                xyxy=(
                    factor * box.xyxy[0],
                    factor * box.xyxy[1],
                    factor * box.xyxy[2],
                    factor * box.xyxy[3],
                ),
            )
            for box in boxes
        )
        for boxes in (sample.truth, sample.detections)
    )
    return replace(sample, image=image, truth=truth, detections=detections)


def _swatch(color: Color) -> Image:
    return np.tile(np.rint(255 * np.array(color)).astype(np.uint8), (22, 34, 1))
