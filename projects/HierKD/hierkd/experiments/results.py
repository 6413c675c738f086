"""Figures as JSON files and as tables: those of a whole run, and those of one measurement."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate  # type: ignore[import-untyped]

from hierkd.files import replacing

__all__ = [
    "Figures",
    "Results",
    "collect_record",
    "collect_results",
    "figures_table",
    "summary_rows",
    "write_results",
]

Results = dict[str, Any]

# Dataset to name of a row ("crop 1.5") to "<group>/<metric>" to percent.
Figures = Mapping[str, Mapping[str, Mapping[str, float]]]

# Protocols of ``results.json`` and the groups of classes whose AP50 and AR50 they report.
_GROUPS = {"zsd": ("novel",), "gzsd": ("novel", "base", "all")}


def collect_results(
    figures: Mapping[str, Mapping[str, float]],
    upper_bounds: Mapping[str, Mapping[str, float]],
    **provenance: Any,
) -> Results:
    """Arrange the figures of a run as ``results.json`` holds them, to two decimals, NaN as None.

    Args:
        figures: "zsd" (novel vocabulary) and "gzsd" (all classes) to an evaluator's, in percent.
        upper_bounds: CLIP's on the ground-truth boxes, likewise.
        provenance: Config, seed, commit and the like, by name.
    """

    def pick(of_protocols: Mapping[str, Mapping[str, float]]) -> Results:
        return {
            protocol: {
                group: {
                    name: _rounded(of_protocols[protocol][f"{group}/{name}"])
                    for name in ("AP50", "AR50")
                }
                for group in groups
            }
            for protocol, groups in _GROUPS.items()
        }

    return {**pick(figures), "upper_bound": pick(upper_bounds), **provenance}


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 2)  # JSON knows no NaN


def write_results(path: str | os.PathLike[str], results: Results) -> None:
    """Write ``results.json``, whole or not at all."""
    text = json.dumps(results, indent=2, allow_nan=False) + "\n"
    with replacing(path) as making:
        making.write_text(text, encoding="utf-8")


def summary_rows(
    results: Results,
) -> list[tuple[str, str, float | None, float | None, float | None]]:
    """List (protocol, classes, AP50, AR50, upper bound's AP50) for a table."""
    return [
        (
            protocol.upper(),
            group,
            results[protocol][group]["AP50"],
            results[protocol][group]["AR50"],
            results["upper_bound"][protocol][group]["AP50"],
        )
        for protocol, groups in _GROUPS.items()
        for group in groups
    ]


def collect_record(*, rows: Figures, main_row: str, **provenance: Any) -> Results:
    """Arrange a measurement for :func:`write_results`, to two decimals, NaN as None.

    ``figures`` is added: dataset to the figures of ``main_row``, the one that a table takes.
    """
    rounded = {
        name: {
            row: {metric: _rounded(value) for metric, value in of_row.items()}
            for row, of_row in of_dataset.items()
        }
        for name, of_dataset in rows.items()
    }
    figures = {name: of_dataset[main_row] for name, of_dataset in rounded.items()}
    return {**provenance, "figures": figures, "main_row": main_row, "rows": rounded}


def figures_table(rows: Figures, metrics: Sequence[str]) -> str:
    """Lay figures out in Markdown: a line per dataset, row and group; a dash for NaN."""
    lines = [
        [dataset, row, group, *(_cell(of_row[f"{group}/{metric}"]) for metric in metrics)]
        for dataset, of_dataset in rows.items()
        for row, of_row in of_dataset.items()
        for group in dict.fromkeys(key.split("/")[0] for key in of_row if "/" in key)
    ]
    headers = ["dataset", "row", "classes", *metrics]
    alignment = ("left", "left", "left", *("right" for _ in metrics))
    return str(
        tabulate(lines, headers, tablefmt="github", disable_numparse=True, colalign=alignment)
    )


def _cell(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.1f}"
