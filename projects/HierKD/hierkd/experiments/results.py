"""Figures as JSON files and as tables: those of a whole run, and those of one measurement."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
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

_REPORTED = ("AP50", "AR50")


def collect_results(
    *,
    zsd: Mapping[str, float],
    gzsd: Mapping[str, float],
    upper_bound_zsd: Mapping[str, float],
    upper_bound_gzsd: Mapping[str, float],
    config: str,
    seed: int,
    commit: str,
    seconds: Mapping[str, float],
) -> Results:
    """Arrange the figures of a run as ``results.json`` holds them.

    Args:
        zsd: :class:`SplitCOCOEvaluator`'s figures on the novel vocabulary.
        gzsd: Its figures on the vocabulary of all classes.
        upper_bound_zsd: CLIP's on the ground-truth boxes of the first.
        upper_bound_gzsd: And of the second.
        config: Path of the config.
        seed: Of the run.
        commit: Of the code.
        seconds: Wall time of each stage.

    Returns:
        ``{"zsd": {"novel": {"AP50", "AR50"}}, "gzsd": {"novel", "base", "all"}, "upper_bound":
        {"zsd", "gzsd"}, "config", "seed", "commit", "seconds"}``.
    """
    return {
        "zsd": _pick(zsd, ("novel",)),
        "gzsd": _pick(gzsd, ("novel", "base", "all")),
        "upper_bound": {
            "zsd": _pick(upper_bound_zsd, ("novel",)),
            "gzsd": _pick(upper_bound_gzsd, ("novel", "base", "all")),
        },
        "config": config,
        "seed": seed,
        "commit": commit,
        "seconds": {stage: round(value, 1) for stage, value in seconds.items()},
    }


def _pick(metrics: Mapping[str, float], groups: Iterable[str]) -> dict[str, dict[str, float]]:
    """Take AP50 and AR50 of the groups, to two decimals; what cannot be computed is None."""
    return {
        group: {name: _rounded(metrics[f"{group}/{name}"]) for name in _REPORTED}
        for group in groups
    }


def _rounded(value: float) -> Any:
    return None if math.isnan(value) else round(value, 2)  # JSON knows no NaN


def write_results(path: str | os.PathLike[str], results: Results) -> None:
    """Write ``results.json``, whole or not at all."""
    text = json.dumps(results, indent=2, allow_nan=False) + "\n"
    with replacing(path) as making:
        making.write_text(text, encoding="utf-8")


def summary_rows(results: Results) -> list[tuple[Any, ...]]:
    """List (protocol, classes, AP50, AR50, upper bound's AP50) for a table."""
    return [
        (
            protocol.upper(),
            group,
            metrics["AP50"],
            metrics["AR50"],
            results["upper_bound"][protocol][group]["AP50"],
        )
        for protocol in ("zsd", "gzsd")
        for group, metrics in results[protocol].items()
    ]


def collect_record(
    *,
    command: str,
    config: str,
    weights: str,
    dataset: Sequence[str],
    options: Mapping[str, Any],
    rows: Figures,
    main_row: str,
    commit: str | None,
) -> Results:
    """Arrange what a measurement found for :func:`write_results`.

    Args:
        command: The command line.
        config: Path of the config.
        weights: Path of the checkpoint; "" where no detector was measured.
        dataset: Names of the datasets.
        options: Whatever else decides the figures.
        rows: What was found; NaN, which JSON does not know, becomes None.
        main_row: The row that a table of results takes.
        commit: Of the code; None if unknown.

    Returns:
        The arguments by name, and ``figures``: dataset to the figures of the main row.
    """
    rounded = {
        name: {
            row: {metric: _rounded(value) for metric, value in of_row.items()}
            for row, of_row in of_dataset.items()
        }
        for name, of_dataset in rows.items()
    }
    return {
        "command": command,
        "config": config,
        "weights": weights,
        "dataset": list(dataset),
        "options": dict(options),
        "figures": {name: of_dataset[main_row] for name, of_dataset in rounded.items()},
        "main_row": main_row,
        "rows": rounded,
        "commit": commit,
    }


def figures_table(rows: Figures, metrics: Sequence[str]) -> str:
    """Lay figures out as a Markdown table, one line per dataset, row and group of classes.

    Args:
        rows: As for :func:`collect_record`.
        metrics: The columns, e.g. "AP50".

    Returns:
        Markdown; what cannot be computed is a dash.
    """
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
