"""Figures as JSON files and as tables: those of a whole run, and those of one measurement."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from tabulate import tabulate  # type: ignore[import-untyped]

from hierkd.files import replacing

__all__ = ["Figures", "collect_results", "figures_table", "rounded_figures", "summary_rows"]
__all__ += ["write_results"]

Figures = Mapping[str, Mapping[str, float]]
"""Dataset to "<group>/<metric>" to percent."""

# Protocols of ``results.json`` and the groups of classes whose AP50 and AR50 they report.
_GROUPS = {"zsd": ("novel",), "gzsd": ("novel", "base", "all")}


def collect_results(
    figures: Mapping[str, Mapping[str, float]],
    upper_bounds: Mapping[str, Mapping[str, float]],
    **provenance: Any,
) -> dict[str, Any]:
    """Arrange the figures of a run as ``results.json`` holds them, to two decimals, NaN as None.

    Args:
        figures: "zsd" (novel vocabulary) and "gzsd" (all classes) to an evaluator's, in percent.
        upper_bounds: CLIP's on the ground-truth boxes, likewise.
        provenance: config, seed, commit and the like, by name.
    """
    ours, bounds = (
        {
            protocol: {
                group: {m: _rounded(found[protocol][f"{group}/{m}"]) for m in ("AP50", "AR50")}
                for group in groups
            }
            for protocol, groups in _GROUPS.items()
        }
        for found in (figures, upper_bounds)
    )
    return {**ours, "upper_bound": bounds, **provenance}


def _rounded(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 2)  # JSON knows no NaN


def write_results(path: str | os.PathLike[str], results: dict[str, Any]) -> None:
    """Write a JSON file for people to read, whole or not at all."""
    with replacing(path) as making:
        making.write_text(json.dumps(results, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def summary_rows(
    results: dict[str, Any],
) -> list[tuple[str, str, float | None, float | None, float | None]]:
    """List (protocol, classes, AP50, AR50, upper bound's AP50) of ``results.json``, in percent."""
    bounds = results["upper_bound"]
    return [
        (protocol.upper(), group, found["AP50"], found["AR50"], bounds[protocol][group]["AP50"])
        for protocol in _GROUPS
        for group, found in results[protocol].items()
    ]


def rounded_figures(figures: Figures) -> dict[str, dict[str, float | None]]:
    """The figures of a measurement for :func:`write_results`, to two decimals, NaN as None."""
    return {
        dataset: {metric: _rounded(value) for metric, value in of_dataset.items()}
        for dataset, of_dataset in figures.items()
    }


def figures_table(figures: Figures, metrics: Sequence[str]) -> str:
    """Lay figures out in Markdown: a line per dataset and group; a dash for NaN."""
    lines = [
        [dataset, group, *(_rounded(found[f"{group}/{metric}"]) for metric in metrics)]
        for dataset, found in figures.items()
        for group in dict.fromkeys(key.split("/")[0] for key in found if "/" in key)
    ]
    headers = ["dataset", "classes", *metrics]
    style = {"tablefmt": "github", "floatfmt": ".1f", "missingval": "–", "numalign": "right"}
    return str(tabulate(lines, headers, **style))
