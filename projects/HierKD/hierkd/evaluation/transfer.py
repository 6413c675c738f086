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

from hierkd.teachers.texts import comparable_name

__all__ = [
    "COLUMNS",
    "Overlap",
    "detection_limit",
    "find_overlap",
    "transfer_record",
    "transfer_table",
]

COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
FREQUENCIES = {"rare": "APr", "common": "APc", "frequent": "APf"}
_GROUPS = ("all", "novel", "base")
_MAX_NAMED = 12


@dataclass(frozen=True)
class Overlap:
    """How a vocabulary relates to that of training.

    Attributes:
        known: Its names that training had boxes of -> what they are called there.
        related: Other names that end in a name of training, or the other way round ("sports car"
            and "car") -> that name. They count as novel.
        new: All names but the known ones, in order.
    """

    known: Mapping[str, str]
    related: Mapping[str, str]
    new: tuple[str, ...]

    def __str__(self) -> str:
        total = len(self.known) + len(self.new)
        text = f"{len(self.known)} of {total} names are in the training vocabulary"
        if self.known:
            text += f" ({_some(list(self.known))})"
        if self.related:
            pairs = [f"{name} ~ {other}" for name, other in self.related.items()]
            text += f"; {len(pairs)} others are related to one of its names ({_some(pairs)})"
        return text


def _some(names: Sequence[str]) -> str:
    more = len(names) - _MAX_NAMED
    return ", ".join(names[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


def find_overlap(vocabulary: Sequence[str], training: Sequence[str]) -> Overlap:
    """Compare names by spelling: capitals, "_", "-", parentheses and a plural s do not count.

    Synonyms ("sofa" and "couch") are not noticed.

    Args:
        vocabulary: Of the dataset to evaluate on.
        training: Names that training had boxes of.
    """
    trained = {comparable_name(name): name for name in training}
    known, related = {}, {}
    for name in vocabulary:
        plain = comparable_name(name)
        if plain in trained:
            known[name] = trained[plain]
            continue
        for other, original in trained.items():
            if plain.endswith(f" {other}") or other.endswith(f" {plain}"):
                related[name] = original
                break
    return Overlap(known, related, tuple(name for name in vocabulary if name not in known))


@contextmanager
def detection_limit(detector: Any, limit: int | None) -> Iterator[None]:
    """Let a detector return up to ``limit`` detections per image inside a ``with`` block.

    Args:
        detector: With ``inference_settings``; others are left as they are.
        limit: None leaves the detector as it is.
    """
    settings = getattr(detector, "inference_settings", None)
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
    """Arrange figures and overlaps for a JSON file.

    Args:
        results: Dataset -> an evaluator's figures ("<group>/<metric>", percent).
        overlaps: Dataset -> its overlap with the training vocabulary.
        **provenance: Whatever else belongs to them: config, weights, command.
    """
    return {
        **provenance,
        "figures": {
            dataset: {key: None if math.isnan(v) else round(v, 3) for key, v in figures.items()}
            for dataset, figures in results.items()
        },
        "overlap": {
            dataset: {
                "known": dict(overlap.known),
                "related": dict(overlap.related),
                "new": list(overlap.new),
            }
            for dataset, overlap in overlaps.items()
        },
    }


def transfer_table(
    results: Mapping[str, Mapping[str, float]], overlaps: Mapping[str, Overlap]
) -> str:
    """Lay the figures out as a Markdown table: one row per dataset and group of classes.

    Args:
        results: As for :func:`transfer_record`.
        overlaps: Likewise; they give the numbers of classes.
    """
    with_frequencies = any(
        f"{group}/AP" in figures for figures in results.values() for group in FREQUENCIES
    )
    rows = []
    for dataset, figures in results.items():
        overlap = overlaps[dataset]
        number = {"base": len(overlap.known), "novel": len(overlap.new)}
        number["all"] = sum(number.values())
        for group in _GROUPS:
            if f"{group}/AP" not in figures:
                continue
            cells = [_cell(figures[f"{group}/{metric}"]) for metric in COLUMNS]
            if with_frequencies:
                is_whole = group == "all" or "all/AP" not in figures
                cells += [
                    _cell(figures.get(f"{each}/AP", math.nan) if is_whole else math.nan)
                    for each in FREQUENCIES
                ]
            rows.append([dataset, group, str(number[group]), *cells])
    headers = ["dataset", "group", "classes", *COLUMNS]
    headers += FREQUENCIES.values() if with_frequencies else ()
    alignment = ("left", "left", *("right" for _ in headers[2:]))
    return str(
        tabulate(rows, headers, tablefmt="github", disable_numparse=True, colalign=alignment)
    )


def _cell(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.1f}"
