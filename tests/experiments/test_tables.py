"""Rows of the paper as configs: each YAML changes what its row varies, and nothing else."""

from pathlib import Path

import pytest
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer

from hierkd.experiments.tables import TABLES
from hierkd.load_config import load_config

ROOT = Path(__file__).resolve().parents[2]


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

ROWS = {
    "table2_predicted_l1": IKD,
    "table2_gt_l1": {**IKD, "MODEL.IKD.BOXES": "gt"},
    "table2_predicted_l2": {**IKD, "MODEL.IKD.LOSS_TYPE": "l2"},
    "table2_predicted_l2_x10": {
        **IKD,
        "MODEL.IKD.LOSS_TYPE": "l2",
        "MODEL.IKD.LOSS_WEIGHT": 10.0,
    },
    "table2_predicted_l1_1.5x": WITHOUT_CROPS,
    "table3_max_3x3": GKD,
    "table3_max_4x4": {**GKD, "MODEL.GKD.GRID_SIZE": 4},
    "table3_max_8x8": {**GKD, "MODEL.GKD.GRID_SIZE": 8},
    "table3_avg_3x3": {**GKD, "MODEL.GKD.POOLING": "avg"},
    "table3_positive_only": {**GKD, "MODEL.GKD.LOSS_TYPE": "positive_only"},
    "table3_4_per_gpu": {**GKD, **SIXTEEN},
    "table4_none": NONE,
    "table4_ikd": IKD,
    "table4_gkd": GKD,
    "table4_ikd_gkd": BOTH,
    "table4_ikd_gkd_iou": WITH_IOU,
    "table5_ikd_10_percent": IKD,
    "table5_ikd_all": {**IKD, **ALL},
    "table5_ikd_per_positive": {**IKD, **ONE_TO_ONE},
    "table5_gkd_10_percent": GKD,
    "table5_gkd_all": {**GKD, **ALL},
    "table5_gkd_per_positive": {**GKD, **ONE_TO_ONE},
}


@pytest.mark.parametrize("name", sorted(ROWS))
def test_a_row_changes_this_and_nothing_else(name):
    assert difference(f"configs/ablations/{name}.yaml") == ROWS[name]


def test_every_ablation_of_tables_2_to_5_is_pinned():
    files = {p.stem for p in (ROOT / "configs" / "ablations").glob("table[2-5]_*.yaml")}
    assert files == set(ROWS)
    counts = {n: sum(name.startswith(f"table{n}_") for name in files) for n in (2, 3, 4, 5)}
    assert counts == {2: 5, 3: 6, 4: 5, 5: 6}  # the paper's rows


ONE_X = {"MODEL.IKD.LOSS_WEIGHT": 1.0, "MODEL.GKD.LOSS_WEIGHT": 1.0}
THREE_X = {
    **ONE_X,
    "INPUT.MIN_SIZE_TRAIN": (480, 800),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": "range",
    "SOLVER.MAX_ITER": 121248,
    "SOLVER.STEPS": (90936, 111144),
    "TEST.EVAL_PERIOD": 40416,
}
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
        ("hierkd_R50_3x", THREE_X),
        ("hierkd_R50_release", RELEASE),
    ],
)
def test_the_main_configs_change_this_and_nothing_else(name, changes):
    assert difference(f"configs/COCO-48-17/{name}.yaml") == changes
    if (ROOT / f"configs/COCO-65-15/{name}.yaml").is_file():
        other = difference(f"configs/COCO-65-15/{name}.yaml", f"configs/COCO-48-17/{name}.yaml")
        assert other == {
            "DATASETS.TRAIN": ("coco_ovd_65_15_train_base",),
            "DATASETS.TEST": tuple(f"coco_ovd_65_15_val_{p}" for p in ("novel", "base", "all")),
        }


def test_schedules_are_multiples_of_one():
    schedules = {
        name: load_config(str(ROOT / f"configs/COCO-48-17/hierkd_{name}.yaml")).SOLVER
        for name in ("R50_1x", "R50_2x", "R50_3x", "R101_3x")
    }
    one = schedules["R50_1x"]
    for name, solver in schedules.items():
        times = int(name[-2])
        assert times * one.MAX_ITER == solver.MAX_ITER
        assert tuple(times * step for step in one.STEPS) == solver.STEPS
        assert solver.IMS_PER_BATCH == 32


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: p.stem)
def test_iterations_follow_the_batch(path):
    """Whole epochs of 107,761 images, as the release counts them: ceil(images / batch) each."""
    cfg = load_config(str(path))
    if not cfg.DATASETS.TRAIN[0].startswith("coco"):
        return
    epoch = -(-107_761 // cfg.SOLVER.IMS_PER_BATCH)
    epochs, rest = divmod(cfg.SOLVER.MAX_ITER, epoch)
    assert (epochs in (12, 24, 36), rest) == (True, 0)
    assert (epochs * 8 // 12 * epoch, epochs * 11 // 12 * epoch) == cfg.SOLVER.STEPS
    assert epoch == cfg.SOLVER.CHECKPOINT_PERIOD
    assert cfg.TEST.EVAL_PERIOD * 3 == cfg.SOLVER.MAX_ITER


TRAINED = [
    (table.number, row)
    for table in TABLES.values()
    for row in table.rows
    if table.number != 1 and row.coco is not None and row.miniature is not None
]
# What the miniature sets for itself: the weights are its own, and its schedule and batch.
OWN = ("SOLVER.", "TEST.", "MODEL.IKD.LOSS_WEIGHT", "MODEL.GKD.LOSS_WEIGHT")


@pytest.mark.parametrize(("number", "row"), TRAINED, ids=lambda v: str(getattr(v, "label", v)))
def test_a_row_varies_the_same_in_the_miniature_as_on_coco(number, row):
    coco = load_config(str(ROOT / row.coco.config))
    small = load_config(str(ROOT / row.miniature.config), row.miniature.opts)
    for kind in ("IKD", "GKD"):
        on = coco.MODEL[kind].LOSS_WEIGHT > 0
        assert (small.MODEL[kind].LOSS_WEIGHT > 0) == on
    pinned = ROWS.get(row.coco.name, {})
    assert pinned, f"table {number}: {row.coco.name} is not pinned"
    values = dict(leaves(small))
    ikd_off = coco.MODEL.IKD.LOSS_WEIGHT == 0
    for key, value in pinned.items():
        if not key.startswith(OWN) and not (ikd_off and ".IKD." in key):
            assert values[key] == value, key


def test_paper_figures_by_heart():
    table_4 = {row.label: row.paper for row in TABLES[4].rows}
    assert [table_4[label]["ZSD novel AP50"] for label in table_4] == [10.2, 14.6, 20.7, 20.7, 21.6]
    assert [table_4[label]["ZSD novel AR50"] for label in table_4] == [52.4, 62.4, 61.1, 70.1, 71.3]
    assert [row.paper.get("ZSD novel AP50") for row in TABLES[2].rows] == [
        *(14.6, 14.5, None, None, 15.3)
    ]
    assert [row.paper["ZSD novel AP50"] for row in TABLES[3].rows] == [
        *(20.7, 20.1, 13.7, 12.0, 17.9, 20.5)
    ]
    assert [dict(row.paper) for row in TABLES[5].rows[1:3]] == [
        {"ZSD novel AP50": 9.0},
        {"base AP50": 37.0},
    ]
    assert [row.paper["ZSD novel AP50"] for row in TABLES[6].rows] == [24.9, 23.3, 22.8]
    assert [tuple(row.paper.values()) for row in TABLES[7].rows] == [
        *((25.3, 20.3, 51.3, 43.2), (27.4, 20.4, 48.9, 43.6))
    ]
    assert [row.paper["base AP50"] for row in TABLES[8].rows] == [44.7, 49.0, 51.8, 53.5]
    assert TABLES[9].rows[0].paper == {"ZSD novel AP50": 68.0}


def test_every_paper_figure_has_a_column_and_every_config_a_file():
    for table in TABLES.values():
        labels = {column.label for column in table.columns}
        assert len({row.label for row in table.rows}) == len(table.rows)
        for row in table.rows:
            assert set(row.paper) <= labels
            for training in (row.coco, row.miniature):
                assert training is None or (ROOT / training.config).is_file()


def test_trainings_of_one_name_are_one_training():
    for scale in ("coco", "miniature"):
        found = {}
        for table in TABLES.values():
            for row in table.rows:
                training = getattr(row, scale)
                if training is not None:
                    assert found.setdefault(training.name, training) == training


def test_one_gpu_instead_of_four_follows_the_linear_rule():
    """The figures that docs/reproduction.md gives for ``SOLVER.REFERENCE_WORLD_SIZE 4``."""
    opts = ["SOLVER.REFERENCE_WORLD_SIZE", "4"]
    cfg = load_config(str(ROOT / "configs/hierkd_R50.yaml"), opts)
    solver = DefaultTrainer.auto_scale_workers(cfg, 1).SOLVER
    assert (solver.IMS_PER_BATCH, solver.BASE_LR, solver.MAX_ITER) == (8, 0.0025, 161_664)
    assert solver.STEPS == (107_776, 148_192)
