"""Rows of the paper as configs."""

from pathlib import Path

import pytest
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer

from hierkd.experiments.tables import TABLES
from hierkd.load_config import load_config

ROOT = Path(__file__).resolve().parents[2]


def test_every_row_has_one_name_and_every_config_a_file():
    assert set(TABLES) == set(range(1, 10))
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
    cfg = load_config(str(ROOT / "configs/COCO-48-17/hierkd_R50_1x_one_gpu.yaml"))
    solver = DefaultTrainer.auto_scale_workers(cfg, 1).SOLVER
    assert (solver.IMS_PER_BATCH, solver.BASE_LR, solver.MAX_ITER) == (8, 0.0025, 161_664)
    assert solver.STEPS == (107_776, 148_192)
