"""The tables of the paper: their rows as configs, and the figures that the paper prints.

All of it is data, in ``tables.yaml``. Figures are in percent, on COCO; none comes from this
project's own runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import yaml

__all__ = ["TABLES", "Column", "Row", "Table", "Training"]


@dataclass(frozen=True)
class Training:
    """A training that a row needs; rows that share the name (of its folder) share the training."""

    name: str
    config: str
    opts: tuple[str, ...] = ()  # KEY VALUE ... on top of the config


@dataclass(frozen=True)
class Column:
    """A figure: the part of the split that is evaluated (its vocabulary), and the metric."""

    label: str
    part: str
    metric: str


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        label: what it is called.
        coco: what is trained for it on COCO; None: nothing.
        miniature: likewise in the miniature.
        paper: column label to what the paper prints; a dash of the paper's is left out.
        evaluation: what gives the figures: ``"train_net"`` (training ends with it),
            ``"direct_inference"`` of the trained checkpoint, or ``"upper_bound"`` (no training).
    """

    label: str
    coco: Training | None = None
    miniature: Training | None = None
    paper: Mapping[str, float] = field(default_factory=dict)
    evaluation: str = "train_net"


@dataclass(frozen=True)
class Table:
    """A table: its columns are the paper's in its order, then what is ours alone."""

    number: int
    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    seeds: tuple[int, ...] = (0,)  # of the miniature study

    @property
    def printed(self) -> set[str]:
        """Labels of the columns that the paper prints."""
        return {label for row in self.rows for label in row.paper}


def _read_tables() -> dict[int, Table]:
    text = resources.files(__package__).joinpath("tables.yaml").read_text(encoding="utf-8")
    content = yaml.safe_load(text)
    return {
        number: Table(
            number,
            table["title"],
            tuple(
                Column(label, *content["columns"][label])
                for label in [*table["paper"], *table.get("ours", ())]
            ),
            tuple(_row(row, table["paper"], content["settings"]) for row in table["rows"]),
            tuple(table.get("seeds", (0,))),
        )
        for number, table in content["tables"].items()
    }


def _row(row: Mapping[str, Any], columns: Sequence[str], settings: Mapping[str, Any]) -> Row:
    def training(name: str, config: str, changes: Sequence[Any]) -> Training:
        pairs = [settings[each] if isinstance(each, str) else each for each in changes]
        opts = [str(word) for mapping in pairs for pair in mapping.items() for word in pair]
        return Training(name, f"configs/{config}.yaml", tuple(opts))

    trainings: dict[str, Training] = {}
    if "coco" in row:
        config, *changes = [row["coco"]] if isinstance(row["coco"], str) else row["coco"]
        name = config.removeprefix("ablations/").replace("/", "_")
        trainings["coco"] = training(name, config, changes)
    for name, (config, *changes) in row.get("miniature", {}).items():
        trainings["miniature"] = training(name, f"miniature/{config}", changes)
    figures = zip(columns, row["paper"], strict=True)
    paper = {label: value for label, value in figures if value is not None}
    return Row(
        row["label"], **trainings, paper=paper, evaluation=row.get("evaluation", "train_net")
    )


TABLES: Mapping[int, Table] = _read_tables()
"""Table number -> table."""
