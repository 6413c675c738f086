"""Transfer to other datasets: which of their names training knew, and a table of the figures.

A detector that is evaluated on a dataset it was not trained on is zero-shot only for the classes
whose names it was not trained with. So the figures of such a dataset come in three groups: "base",
its classes that are in the training vocabulary, "novel", the others, and "all". The tables of ViLD
(Gu et al., ICLR 2022) and Detic (Zhou et al., ECCV 2022) report "all" alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate  # type: ignore[import-untyped]

from hierkd.data.coco_json import some
from hierkd.teachers.texts import comparable_name

__all__ = [
    "Overlap",
    "detection_limit",
    "find_overlap",
    "transfer_record",
    "transfer_table",
]

_COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_FREQUENCIES = {"rare": "APr", "common": "APc", "frequent": "APf"}


@dataclass(frozen=True)
class Overlap:
    """How a vocabulary relates to that of training.

    Attributes:
        known: Its names that training had boxes of -> what they are called there.
        new: All names but the known ones, in order.
    """

    known: Mapping[str, str]
    new: tuple[str, ...]

    def __str__(self) -> str:
        text = f"{len(self.known)} of {len(self.known) + len(self.new)} names are in the training "
        return f"{text}vocabulary ({some(self.known, 12)})" if self.known else f"{text}vocabulary"


def find_overlap(vocabulary: Sequence[str], training: Sequence[str]) -> Overlap:
    """Compare names by spelling: capitals, "_", "-", parentheses and a plural s do not count.

    Synonyms ("sofa" and "couch") are not noticed.
    """
    trained = {comparable_name(name): name for name in training}
    plain = {name: comparable_name(name) for name in vocabulary}
    known = {name: trained[each] for name, each in plain.items() if each in trained}
    return Overlap(known, tuple(name for name in vocabulary if name not in known))


@contextmanager
def detection_limit(detector: Any, limit: int | None) -> Iterator[None]:
    """Let a detector return up to ``limit`` detections per image; None leaves it as it is."""
    settings = getattr(detector, "inference_settings", None)  # an RPN has none
    if limit is None or settings is None:
        yield
        return
    detector.inference_settings = dataclasses.replace(settings, max_detections=limit)
    try:
        yield
    finally:
        detector.inference_settings = settings


def transfer_record(
    results: Mapping[str, Mapping[str, float]],
    overlaps: Mapping[str, Overlap],
    **provenance: Any,
) -> dict[str, Any]:
    """Arrange figures ("<group>/<metric>", percent) and overlaps by dataset for a JSON file."""
    return {
        **provenance,
        "figures": {
            dataset: {key: None if math.isnan(v) else round(v, 3) for key, v in figures.items()}
            for dataset, figures in results.items()
        },
        "overlap": {dataset: dataclasses.asdict(each) for dataset, each in overlaps.items()},
    }


def transfer_table(
    results: Mapping[str, Mapping[str, float]], overlaps: Mapping[str, Overlap]
) -> str:
    """Lay the figures out as a Markdown table: one row per dataset and group of classes."""
    headers = ["dataset", "group", "classes", *_COLUMNS]
    if any(f"{each}/AP" in figures for figures in results.values() for each in _FREQUENCIES):
        headers += _FREQUENCIES.values()
    rows = []
    for dataset, figures in results.items():
        base, novel = len(overlaps[dataset].known), len(overlaps[dataset].new)
        frequencies = [_cell(figures.get(f"{each}/AP", math.nan)) for each in _FREQUENCIES]
        for group, number in (("all", base + novel), ("novel", novel), ("base", base)):
            if f"{group}/AP" in figures:
                cells = [_cell(figures[f"{group}/{metric}"]) for metric in _COLUMNS]
                row = [dataset, group, str(number), *cells, *frequencies]
                rows.append(row[: len(headers)])
                frequencies = ["–"] * len(frequencies)  # they belong to the whole vocabulary
    alignment = ("left", "left", *("right" for _ in headers[2:]))
    return str(
        tabulate(rows, headers, tablefmt="github", disable_numparse=True, colalign=alignment)
    )


def _cell(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.1f}"
