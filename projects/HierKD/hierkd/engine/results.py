"""The figures of a run as ``results.json`` and as a table."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

from hierkd.atomic_files import replacing

__all__ = ["Results", "collect_results", "summary_rows", "write_results"]

Results = dict[str, Any]

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
