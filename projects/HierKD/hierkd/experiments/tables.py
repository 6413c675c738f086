"""The tables of the paper: their rows as configs, and the figures that the paper prints.

Figures are in percent, on COCO, as far as they are known from the paper; a cell that is not here
is not known to this project, and no figure here comes from this project's own runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["TABLES", "Column", "Row", "Table", "Training"]


@dataclass(frozen=True)
class Training:
    """A training that a row needs: ``train_net.py`` with a config.

    Attributes:
        name: of its folder; rows that share the name share the training.
        config: the YAML.
        opts: KEY VALUE ... on top of it.
    """

    name: str
    config: str
    opts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Column:
    """A figure: the part of the split that is evaluated (its vocabulary), and the metric."""

    label: str
    part: str
    metric: str


@dataclass(frozen=True)
class Row:
    """A row: what it is called, what is trained for it at each scale, what the paper found."""

    label: str
    coco: Training | None
    miniature: Training | None
    paper: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        number: in the paper.
        title: one line.
        columns: of figures; the first one is plotted beside the paper's.
        rows: in the paper's order.
        evaluation: what turns a trained checkpoint into figures: ``"train_net"`` (training ends
            with it), ``"direct_inference"`` or ``"upper_bound"`` (no training at all).
        seeds: of the miniature study.
    """

    number: int
    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    evaluation: str = "train_net"
    seeds: tuple[int, ...] = (0,)


_ZSD_AR = Column("ZSD novel AR50", "novel", "novel/AR50")
_ZSD_AP = Column("ZSD novel AP50", "novel", "novel/AP50")
_BASE_AR = Column("base AR50", "base", "base/AR50")
_BASE_AP = Column("base AP50", "base", "base/AP50")
_GZSD = (
    Column("GZSD novel AP50", "all", "novel/AP50"),
    Column("GZSD base AP50", "all", "base/AP50"),
    Column("GZSD all AP50", "all", "all/AP50"),
)

# What a row changes on top of configs/miniature/{atss,ikd,gkd,hierkd}.yaml. The weights of the
# losses are the miniature's own; what the paper varies is varied as the paper does.
_CENTERNESS = ("MODEL.ATSS.QUALITY", "centerness")
_CROP_1 = ("MODEL.IKD.CROP_SCALE", "1.0")
_SHORT = (
    *("SOLVER.MAX_ITER", "400", "SOLVER.WARMUP_ITERS", "60", "SOLVER.CHECKPOINT_PERIOD", "400"),
)
_HALF_BATCH = (  # as many pictures as _SHORT
    *("SOLVER.MAX_ITER", "800", "SOLVER.WARMUP_ITERS", "120", "SOLVER.CHECKPOINT_PERIOD", "800"),
    *("SOLVER.IMS_PER_BATCH", "8", "SOLVER.BASE_LR", "0.0015"),
)
_ALL_NEGATIVES = ("MODEL.ATSS.NEGATIVE_AMOUNT", "1.0")
_PER_POSITIVE = ("MODEL.ATSS.NEGATIVE_SAMPLING", "per_positive", *_ALL_NEGATIVES)


def _ablation(name: str) -> Training:
    return Training(name, f"configs/ablations/{name}.yaml")


def _miniature(name: str, config: str, *opts: str) -> Training:
    return Training(name, f"configs/miniature/{config}.yaml", opts)


def _ikd(name: str, *opts: str) -> Training:
    return _miniature(name, "ikd", *_CENTERNESS, *_CROP_1, *opts, *_SHORT)


def _gkd(name: str, *opts: str) -> Training:
    return _miniature(name, "gkd", *_CENTERNESS, *opts, *_SHORT)


_IKD_ROW = _ablation("table2_predicted_l1"), _ikd("table2_predicted_l1")
_GKD_ROW = _ablation("table3_max_3x3"), _gkd("table3_max_3x3")


def _table_1() -> Table:
    columns = tuple(
        Column(f"{group} AR{iou}@{limit}", "all", f"{group}/AR{iou}@{limit}")
        for group in ("novel", "base")
        for iou in (50, 75)
        for limit in (100, 300, 1000)
    )
    row = Row(
        "class-agnostic RPN trained on base boxes",
        _ablation("table1_rpn_R50_1x"),
        _miniature("table1_rpn", "rpn"),
    )
    return Table(1, "Recall of proposals", columns, (row,))


def _table_2() -> Table:
    rows = (
        Row("predicted boxes, L1, 1.0x", *_IKD_ROW, {"ZSD novel AP50": 14.6}),
        Row(
            "ground-truth boxes, L1, 1.0x",
            _ablation("table2_gt_l1"),
            _ikd("table2_gt_l1", "MODEL.IKD.BOXES", "gt"),
            {"ZSD novel AP50": 14.5},
        ),
        Row(
            "predicted boxes, L2, 1.0x",
            _ablation("table2_predicted_l2"),
            _ikd("table2_predicted_l2", "MODEL.IKD.LOSS_TYPE", "l2"),
        ),
        Row(
            "predicted boxes, L2 with 10 times the weight, 1.0x",
            _ablation("table2_predicted_l2_x10"),
            _ikd(
                "table2_predicted_l2_x10",
                *("MODEL.IKD.LOSS_TYPE", "l2", "MODEL.IKD.LOSS_WEIGHT", "5.0"),
            ),
        ),
        Row(
            "predicted boxes, L1, 1.5x",
            _ablation("table2_predicted_l1_1.5x"),
            _miniature("table2_predicted_l1_1.5x", "ikd", *_CENTERNESS, *_SHORT),
            {"ZSD novel AP50": 15.3},
        ),
    )
    return Table(2, "Instance-level distillation", (_ZSD_AP, _ZSD_AR, _BASE_AP), rows, seeds=(0, 1))


def _table_3() -> Table:
    half = _miniature("table3_half_batch", "gkd", *_CENTERNESS, *_HALF_BATCH)

    def row(label: str, name: str, paper: float, *opts: str) -> Row:
        return Row(label, _ablation(name), _gkd(name, *opts), {"ZSD novel AP50": paper})

    rows = (
        Row("max pooling, 3x3 patches", *_GKD_ROW, {"ZSD novel AP50": 20.7}),
        row("4x4 patches", "table3_max_4x4", 20.1, "MODEL.GKD.GRID_SIZE", "4"),
        row("8x8 patches", "table3_max_8x8", 13.7, "MODEL.GKD.GRID_SIZE", "8"),
        row("average pooling", "table3_avg_3x3", 12.0, "MODEL.GKD.POOLING", "avg"),
        row(
            "positive pairs only", "table3_positive_only", 17.9,
            "MODEL.GKD.LOSS_TYPE", "positive_only",
        ),
        Row("half as many pairs", _ablation("table3_4_per_gpu"), half, {"ZSD novel AP50": 20.5}),
    )  # fmt: skip
    return Table(3, "Global-level distillation", (_ZSD_AP, _ZSD_AR, _BASE_AP), rows, seeds=(0, 1))


def _table_4() -> Table:
    def row(label: str, name: str, config: str, opts: tuple[str, ...], ar: float, ap: float) -> Row:
        coco = {"table4_ikd": _IKD_ROW[0], "table4_gkd": _GKD_ROW[0]}.get(name, _ablation(name))
        paper = {"ZSD novel AR50": ar, "ZSD novel AP50": ap}
        if name == "table4_ikd_gkd_iou":
            paper |= {"base AR50": 74.8, "base AP50": 44.7}
        return Row(label, coco, _miniature(name, config, *opts), paper)

    rows = (
        row("no distillation", "table4_none", "atss", _CENTERNESS, 52.4, 10.2),
        row("IKD", "table4_ikd", "ikd", (*_CENTERNESS, *_CROP_1), 62.4, 14.6),
        row("GKD", "table4_gkd", "gkd", _CENTERNESS, 61.1, 20.7),
        row("IKD + GKD", "table4_ikd_gkd", "hierkd", (*_CENTERNESS, *_CROP_1), 70.1, 20.7),
        row("IKD + GKD + IoU branch", "table4_ikd_gkd_iou", "hierkd", _CROP_1, 71.3, 21.6),
    )
    columns = (_ZSD_AP, _ZSD_AR, _BASE_AP, _BASE_AR, *_GZSD)
    return Table(4, "What each part brings", columns, rows, seeds=(0, 1, 2))


def _table_5() -> Table:
    rows = []
    for kind, first, build, figures in (
        ("ikd", _IKD_ROW, _ikd, (14.6, 9.0, 37.0)),
        ("gkd", _GKD_ROW, _gkd, (20.7, 18.7, 34.9)),
    ):
        everything, one_to_one = f"table5_{kind}_all", f"table5_{kind}_per_positive"
        label = kind.upper()
        rows += [
            Row(f"{label}, 10 % of the negatives", *first, {"ZSD novel AP50": figures[0]}),
            Row(
                f"{label}, all negatives",
                _ablation(everything),
                build(everything, *_ALL_NEGATIVES),
                {"ZSD novel AP50": figures[1]},
            ),
            Row(
                f"{label}, one negative per positive",
                _ablation(one_to_one),
                build(one_to_one, *_PER_POSITIVE),
                {"base AP50": figures[2]},
            ),
        ]
    columns = (_ZSD_AP, _BASE_AP, *_GZSD)
    return Table(5, "How many negatives", columns, tuple(rows), seeds=(0, 1))


def _table_6() -> Table:
    table_4 = {row.label: row for row in _table_4().rows}
    rows = tuple(
        Row(label, table_4[of].coco, table_4[of].miniature, {"ZSD novel AP50": paper})
        for label, of, paper in (
            ("IKD", "IKD", 24.9),
            ("GKD", "GKD", 23.3),
            ("HierKD", "IKD + GKD + IoU branch", 22.8),
        )
    )
    return Table(
        6,
        "CLIP names what the detector finds (Algorithm 1)",
        (_ZSD_AP, _ZSD_AR, *_GZSD),
        rows,
        evaluation="direct_inference",
        seeds=(0, 1, 2),
    )


def _table_7() -> Table:
    def row(label: str, name: str, **paper: float) -> Row:
        figures = {key.replace("_", " "): value for key, value in paper.items()}
        return Row(label, Training(name.replace("/", "_"), f"configs/{name}.yaml"), None, figures)

    rows = (
        row(
            "48/17", "COCO-48-17/hierkd_R50_3x",
            ZSD_novel_AP50=25.3, GZSD_novel_AP50=20.3, GZSD_base_AP50=51.3, GZSD_all_AP50=43.2,
        ),
        row(
            "65/15", "COCO-65-15/hierkd_R50_3x",
            ZSD_novel_AP50=27.4, GZSD_novel_AP50=20.4, GZSD_base_AP50=48.9, GZSD_all_AP50=43.6,
        ),
    )  # fmt: skip
    return Table(7, "Both splits, ZSD and GZSD (3x)", (_ZSD_AP, *_GZSD), rows)


def _table_8() -> Table:
    def row(label: str, name: str, novel: float, base: float) -> Row:
        training = Training(f"COCO-48-17_{name}", f"configs/COCO-48-17/{name}.yaml")
        return Row(label, training, None, {"ZSD novel AP50": novel, "base AP50": base})

    rows = (
        row("R50, 1x", "hierkd_R50_1x", 21.6, 44.7),
        row("R50, 2x", "hierkd_R50_2x", 23.1, 49.0),
        row("R50, 3x, sides of 480-800", "hierkd_R50_3x", 25.3, 51.8),
        row("R101, 3x, sides of 480-800", "hierkd_R101_3x", 27.3, 53.5),
    )
    return Table(8, "Schedules and backbones", (_ZSD_AP, _ZSD_AR, _BASE_AP, _BASE_AR), rows)


def _table_9() -> Table:
    columns = (
        _ZSD_AP,
        *(Column(f"ZSD novel {m}", "novel", f"novel/{m}") for m in ("APs", "APm", "APl")),
        _ZSD_AR,
    )
    rows = (Row("CLIP on ground-truth boxes", None, None, {"ZSD novel AP50": 68.0}),)
    return Table(9, "Upper bound", columns, rows, evaluation="upper_bound")


TABLES: Mapping[int, Table] = {
    table.number: table
    for table in (
        _table_1(), _table_2(), _table_3(), _table_4(), _table_5(), _table_6(), _table_7(),
        _table_8(), _table_9(),
    )
}  # fmt: skip
"""Table number -> table."""
