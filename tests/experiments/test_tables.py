"""Rows of the paper as configs, and every figure that the paper prints, typed off the paper."""

from pathlib import Path

import pytest
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer

from hierkd.experiments.tables import TABLES
from hierkd.load_config import load_config

ROOT = Path(__file__).resolve().parents[2]
NA = None  # a dash of the paper's

# Table -> metrics as (vocabulary, classes, metric), rows in the paper's order, figures.
ZSD = [("novel", "novel", metric) for metric in ("AR50", "AP50", "APs", "APm", "APl")]
BASE = [("base", "base", metric) for metric in ("AR50", "AP50")]
PAPER = {
    1: (
        [("all", "novel", f"AR{iou}@{n}") for iou in (50, 75) for n in (100, 300, 1000)],
        [(61.9, 76.9, 87.5, 37.4, 48.1, 57.4)],
    ),
    2: (ZSD[:2], [(62.4, 14.6), (65.1, 12.8), (63.6, 14.6), (62.8, 14.5), (64.5, 15.3)]),
    3: (
        ZSD[:2],
        [(59.2, 12.0), (64.2, 20.1), (61.1, 20.7), (60.8, 13.7), (60.9, 17.9), (65.6, 20.5)],
    ),
    4: (
        ZSD,
        [
            (52.4, 10.2, 8.8, 12.5, 12.8),
            (62.4, 14.6, 10.1, 13.2, 19.1),
            (61.1, 20.7, 10.1, 28.5, 27.5),
            (70.1, 20.7, 11.5, 30.2, 27.0),
            (71.3, 21.6, 11.6, 30.7, 28.1),
        ],
    ),
    5: (
        BASE + ZSD[:2],
        [
            (71.0, 37.0, 63.0, 16.8),
            (75.9, 44.3, 62.4, 14.6),
            (74.5, 44.4, 60.3, 9.0),
            (69.2, 34.9, 60.2, 19.3),
            (74.0, 42.7, 61.1, 20.7),
            (72.4, 42.6, 56.4, 18.7),
        ],
    ),
    6: (
        ZSD,
        [
            (62.4, 14.6, 10.1, 13.2, 19.1),
            (66.6, 24.9, 18.3, 28.3, 32.3),
            (61.1, 20.7, 10.1, 28.5, 27.5),
            (64.5, 23.3, 18.2, 27.9, 30.3),
            (70.1, 20.7, 11.5, 30.2, 27.0),
            (65.8, 22.8, 18.8, 27.4, 29.9),
        ],
    ),
    7: (
        [("novel", "novel", "AP50"), *(("all", g, "AP50") for g in ("base", "novel", "all"))],
        [
            (0.70, 29.2, 0.31, 24.9),
            (0.27, 20.8, 0.22, 18.0),
            (0.54, 26.7, 0.27, 22.1),
            (9.9, 42.1, 4.50, 32.3),
            (11.4, 46.5, 4.83, 35.6),
            (16.7, NA, NA, 34.3),
            (NA, 59.5, 27.6, 51.3),
            (10.0, 35.9, 4.12, 27.9),
            (7.6, 13.8, 3.41, 13.0),
            (13.4, 31.7, 13.6, 27.0),
            (25.3, 51.3, 20.3, 43.2),
            (13.1, 36.0, 13.1, 31.7),
            (13.6, 38.7, 13.6, 34.0),
            (12.4, 34.1, 12.4, 30.0),
            (18.3, 31.7, 17.9, 29.2),
            (27.4, 48.9, 20.4, 43.6),
        ],
    ),
    8: (
        BASE + ZSD[:2],
        [
            (74.8, 44.7, 71.3, 21.6),
            (77.5, 49.0, 69.8, 23.1),
            (80.0, 51.8, 70.0, 25.3),
            (80.8, 53.5, 71.4, 27.3),
        ],
    ),
    9: (ZSD, [(71.4, 27.3, 11.4, 39.5, 37.3), (70.7, 68.0, 36.3, 74.5, 87.4)]),
}  # fmt: skip


@pytest.mark.parametrize("number", PAPER)
def test_the_record_is_what_the_paper_prints(number):
    metrics, figures = PAPER[number]
    table = TABLES[number]
    first = table.columns[: len(metrics)]
    assert [(c.part, c.metric) for c in first] == [(p, f"{group}/{m}") for p, group, m in metrics]
    assert table.printed == {column.label for column in first}
    assert [tuple(row.paper.get(c.label) for c in first) for row in table.rows] == figures


def test_every_row_has_one_name_and_every_config_a_file():
    assert set(TABLES) == set(PAPER)
    for table in TABLES.values():
        assert len({row.label for row in table.rows}) == len(table.rows)
        for training in (t for row in table.rows for t in (row.coco, row.miniature)):
            assert training is None or (ROOT / training.config).is_file()


def leaves(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def difference(config, base="configs/Base-ATSS.yaml", opts=()):
    """What a config changes on top of another one, without the folder of its output."""
    before = dict(leaves(load_config(str(ROOT / base))))
    after = dict(leaves(load_config(str(ROOT / config), opts)))
    return {k: v for k, v in after.items() if before[k] != v and k != "OUTPUT_DIR"}


SIXTEEN = {
    "SOLVER.IMS_PER_BATCH": 16,
    "SOLVER.MAX_ITER": 80832,
    "SOLVER.STEPS": (53888, 74096),
    "SOLVER.CHECKPOINT_PERIOD": 6736,
    "TEST.EVAL_PERIOD": 26944,
}
CENTERNESS = {"MODEL.ATSS.QUALITY": "centerness"}
NONE = {**SIXTEEN, **CENTERNESS, "MODEL.IKD.CROP_SCALE": 1.0}
IKD = {**NONE, "MODEL.IKD.LOSS_WEIGHT": 1.0}
GKD = {**CENTERNESS, "MODEL.GKD.LOSS_WEIGHT": 1.0}
BOTH = {**GKD, "MODEL.IKD.LOSS_WEIGHT": 1.0, "MODEL.IKD.CROP_SCALE": 1.0}
ALL = {"MODEL.ATSS.NEGATIVE_AMOUNT": 1.0}
ONE_TO_ONE = {**ALL, "MODEL.ATSS.NEGATIVE_SAMPLING": "per_positive"}
WITHOUT_CROPS = {k: v for k, v in IKD.items() if k != "MODEL.IKD.CROP_SCALE"}  # 1.5 is the default
WITH_IOU = {k: v for k, v in BOTH.items() if k != "MODEL.ATSS.QUALITY"}  # "iou" is the default
TWO_X = {
    "SOLVER.MAX_ITER": 80832,
    "SOLVER.STEPS": (53888, 74096),
    "TEST.EVAL_PERIOD": 26944,
}
THREE_X = {
    "INPUT.MIN_SIZE_TRAIN": (480, 800),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": "range",
    "SOLVER.MAX_ITER": 121248,
    "SOLVER.STEPS": (90936, 111144),
    "TEST.EVAL_PERIOD": 40416,
}
R101 = {
    "MODEL.WEIGHTS": "detectron2://ImageNetPretrained/MSRA/R-101.pkl",
    "MODEL.PIXEL_MEAN": [103.53, 116.28, 123.675],
    "MODEL.PIXEL_STD": [1.0, 1.0, 1.0],
    "MODEL.RESNETS.DEPTH": 101,
    "MODEL.RESNETS.STRIDE_IN_1X1": True,
    "INPUT.FORMAT": "BGR",
}
OTHER_SPLIT = {
    "DATASETS.TRAIN": ("coco_ovd_65_15_train_base",),
    "DATASETS.TEST": tuple(f"coco_ovd_65_15_val_{p}" for p in ("novel", "base", "all")),
}

# Table -> what each row with a training of its own changes on top of Base-ATSS.yaml, in order.
ROWS = {
    2: [
        IKD,
        {**IKD, "MODEL.IKD.LOSS_TYPE": "l2"},
        {**IKD, "MODEL.IKD.LOSS_TYPE": "l2", "MODEL.IKD.LOSS_WEIGHT": 10.0},
        {**IKD, "MODEL.IKD.BOXES": "gt"},
        WITHOUT_CROPS,
    ],
    3: [
        {**GKD, "MODEL.GKD.GRID_SIZE": 4, "MODEL.GKD.POOLING": "avg"},
        {**GKD, "MODEL.GKD.GRID_SIZE": 4},
        GKD,
        {**GKD, "MODEL.GKD.GRID_SIZE": 8},
        {**GKD, "MODEL.GKD.LOSS_TYPE": "positive_only"},
        {**GKD, **SIXTEEN},
    ],
    4: [NONE, IKD, GKD, BOTH, WITH_IOU],
    5: [
        *({**IKD, **ONE_TO_ONE}, IKD, {**IKD, **ALL}),
        *({**GKD, **ONE_TO_ONE}, GKD, {**GKD, **ALL}),
    ],
    6: [IKD, IKD, GKD, GKD, BOTH, BOTH],
    7: [{**WITH_IOU, **THREE_X}, {**WITH_IOU, **THREE_X, **OTHER_SPLIT}],
    8: [
        *(WITH_IOU, {**WITH_IOU, **TWO_X}),
        *({**WITH_IOU, **THREE_X}, {**WITH_IOU, **THREE_X, **R101}),
    ],
    9: [{**WITH_IOU, **THREE_X, **R101}],
}


@pytest.mark.parametrize("number", ROWS)
def test_the_rows_of_a_table_change_this_and_nothing_else(number):
    trainings = [row.coco for row in TABLES[number].rows if row.coco is not None]
    assert [difference(t.config, opts=t.opts) for t in trainings] == ROWS[number]


def test_every_ablation_is_the_config_of_a_row_or_the_same_training():
    used = {r.coco.config for t in TABLES.values() for r in t.rows if r.coco is not None}
    twins = {"table4_ikd": IKD, "table4_gkd": GKD}
    twins |= {"table5_ikd_10_percent": IKD, "table5_gkd_10_percent": GKD}
    for path in (ROOT / "configs" / "ablations").glob("table*.yaml"):
        config = str(path.relative_to(ROOT))
        assert config in used or difference(config) == twins[path.stem]


def test_one_row_is_one_training():
    """The 21.6 of the paper is one training's, as are the 25.3 and the 27.3."""
    row = {number: TABLES[number].rows for number in TABLES}
    assert row[4][4].coco == row[8][0].coco
    assert row[4][3].coco == row[6][4].coco == row[6][5].coco
    assert row[7][10].coco == row[8][2].coco
    assert row[9][0].coco == row[8][3].coco
    for scale in ("coco", "miniature"):
        found = {}
        for training in (getattr(r, scale) for t in TABLES.values() for r in t.rows):
            if training is not None:
                assert found.setdefault(training.name, training) == training


def test_what_makes_the_figures_of_a_row():
    special = {
        (table.number, row.label): row.evaluation
        for table in TABLES.values()
        for row in table.rows
        if row.evaluation != "train_net"
    }
    assert special == {
        **{
            (6, f"{m}, CLIP direct inference"): "direct_inference" for m in ("IKD", "GKD", "HierKD")
        },
        (9, "CLIP on ground-truth boxes"): "upper_bound",
    }


ONE_X = {"MODEL.IKD.LOSS_WEIGHT": 1.0, "MODEL.GKD.LOSS_WEIGHT": 1.0}
RELEASE = {
    "MODEL.GKD.LOSS_WEIGHT": 1.0,
    "MODEL.ATSS.NEGATIVE_SCOPE": "level",
    "MODEL.ATSS.IGNORE_PADDING": True,
    "MODEL.ATSS.TOPK_PAIRS_TEST": 0,
    "MODEL.TEXT_CLASSIFIER.PROJECT_BACKGROUND": True,
    "MODEL.IKD.LOSS_TYPE": "l2",
    "MODEL.IKD.LOSS_WEIGHT": 0.05,
    "MODEL.IKD.CROP_SCALE": 1.0,
    "MODEL.IKD.AVERAGE_OVER": "levels",
    "MODEL.TEACHER.PIXEL_STATISTICS": "imagenet",
}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("atss_R50_1x", {}),
        ("ikd_R50_1x", {"MODEL.IKD.LOSS_WEIGHT": 1.0}),
        ("gkd_R50_1x", {"MODEL.GKD.LOSS_WEIGHT": 1.0}),
        ("hierkd_R50_1x", ONE_X),
        ("hierkd_R50_3x", {**ONE_X, **THREE_X}),
        ("hierkd_R50_release", RELEASE),
    ],
)
def test_the_main_configs_change_this_and_nothing_else(name, changes):
    assert difference(f"configs/COCO-48-17/{name}.yaml") == changes
    if (ROOT / f"configs/COCO-65-15/{name}.yaml").is_file():
        other = difference(f"configs/COCO-65-15/{name}.yaml", f"configs/COCO-48-17/{name}.yaml")
        assert other == OTHER_SPLIT


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: p.stem)
def test_iterations_follow_the_batch(path):
    """Whole epochs of 107,761 images, as the release counts them: ceil(images / batch) each."""
    cfg = load_config(str(path))
    if not cfg.DATASETS.TRAIN[0].startswith("coco"):
        return
    epoch = -(-107_761 // cfg.SOLVER.IMS_PER_BATCH)
    epochs, rest = divmod(cfg.SOLVER.MAX_ITER, epoch)
    times = [n for n in (1, 2, 3) if f"{n}x" in path.stem.split("_")]
    assert (epochs in ([12 * n for n in times] or (12, 24, 36)), rest) == (True, 0)
    drops = (27, 33) if epochs == 36 else (epochs * 8 // 12, epochs * 11 // 12)  # the release's
    assert tuple(drop * epoch for drop in drops) == cfg.SOLVER.STEPS
    assert epoch == cfg.SOLVER.CHECKPOINT_PERIOD
    assert cfg.TEST.EVAL_PERIOD * 3 == cfg.SOLVER.MAX_ITER


# What the miniature sets for itself: the weights are its own, and its schedule, batch and network.
OWN = ("SOLVER.", "TEST.", "INPUT.", "MODEL.IKD.LOSS_WEIGHT", "MODEL.GKD.LOSS_WEIGHT")
OWN += ("MODEL.WEIGHTS", "MODEL.PIXEL", "MODEL.RESNETS")


@pytest.mark.parametrize("number", [n for n in ROWS if n not in (7, 8)])
def test_a_row_varies_the_same_in_the_miniature_as_on_coco(number):
    rows = [row for row in TABLES[number].rows if row.coco is not None]
    for row, pinned in zip(rows, ROWS[number], strict=True):
        small = load_config(str(ROOT / row.miniature.config), row.miniature.opts)
        for kind in ("IKD", "GKD"):
            on = pinned.get(f"MODEL.{kind}.LOSS_WEIGHT", 0) > 0
            assert (small.MODEL[kind].LOSS_WEIGHT > 0) == on, row.label
        values = dict(leaves(small))
        ikd_off = "MODEL.IKD.LOSS_WEIGHT" not in pinned
        for key, value in pinned.items():
            if not key.startswith(OWN) and not (ikd_off and ".IKD." in key):
                assert values[key] == value, (row.label, key)


def test_one_gpu_instead_of_four_follows_the_linear_rule():
    """What ``SOLVER.REFERENCE_WORLD_SIZE 4`` makes of the batch of 32."""
    cfg = load_config(str(ROOT / "configs/COCO-48-17/hierkd_R50_1x_one_gpu.yaml"))
    solver = DefaultTrainer.auto_scale_workers(cfg, 1).SOLVER
    assert (solver.IMS_PER_BATCH, solver.BASE_LR, solver.MAX_ITER) == (8, 0.0025, 161_664)
    assert solver.STEPS == (107_776, 148_192)
