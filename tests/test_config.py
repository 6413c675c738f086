"""The keys HierKD adds: that each is read, and the paper's values by heart."""

import re
from pathlib import Path

import pytest
from detectron2.config import CfgNode, get_cfg

from hierkd.config import add_hierkd_config

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "projects" / "HierKD" / "hierkd"
CONFIG = PACKAGE / "config.py"
READERS = [p for p in PACKAGE.rglob("*.py") if p != CONFIG]


def leaves(node, prefix=""):
    """Every key with its value, by its full name."""
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def make_cfg():
    cfg = get_cfg()
    add_hierkd_config(cfg)
    return cfg


STOCK = dict(leaves(get_cfg()))
ADDED = {key: value for key, value in leaves(make_cfg()) if key not in STOCK}
SOURCES = [p.read_text() for p in READERS]
SETTINGS = next(p for p in READERS if p.name == "detector_settings.py").read_text()


def test_detectron2s_keys_keep_their_values():
    ours = dict(leaves(make_cfg()))
    assert {key: ours[key] for key in STOCK} == STOCK
    assert len(ADDED) > 30


@pytest.mark.parametrize("key", sorted(ADDED))
def test_every_key_is_read(key):
    # by its node's name or by a local name for it, `cfg.MODEL.IKD.BOXES`, `ikd.BOXES`, or as a
    # field of the settings that `read_settings` fills from a node
    node, name = key.split(".")[-2:]
    by_name, as_field = rf"\.{name}\b", rf"^    {name.lower()}: "
    if node in ("ATSS", "IKD") and re.search(as_field, SETTINGS, re.M):
        return
    readers = [text for text in SOURCES if re.search(by_name, text)]
    assert any(re.search(rf"\.{node}\b", text) for text in readers), f"nobody reads {key}"


@pytest.mark.parametrize("key", sorted(ADDED))
def test_every_key_is_explained(key):
    # a comment right above the key, or above the run of keys it belongs to
    lines = CONFIG.read_text().splitlines()
    (at,) = [i for i, line in enumerate(lines) if line.strip().startswith(f"cfg.{key} = ")]
    while lines[at].strip().startswith("cfg."):
        at -= 1
    assert lines[at].strip().startswith("#"), f"{key} has no comment"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.ATSS.IN_FEATURES", ["p3", "p4", "p5", "p6", "p7"]),  # §3.1
        ("MODEL.ATSS.QUALITY", "iou"),  # §3.1
        ("MODEL.ATSS.NEGATIVE_SAMPLING", "fraction"),  # §3.4
        ("MODEL.ATSS.NEGATIVE_AMOUNT", 0.1),  # §3.4
        ("MODEL.ATSS.NMS_THRESH_TEST", 0.4),  # §4.2
        ("MODEL.ATSS.TOPK", 9),  # ATSS
        ("MODEL.ATSS.FOCAL_GAMMA", 2.0),
        ("MODEL.ATSS.FOCAL_ALPHA", 0.25),
        ("MODEL.ATSS.BOX_REG_LOSS_WEIGHT", 2.0),
        ("MODEL.TEXT_CLASSIFIER.EMBED_DIM", 512),  # ViT-B/32
        ("MODEL.TEXT_CLASSIFIER.TEMPLATE", "a photo of a {}."),
        ("MODEL.TEXT_CLASSIFIER.BACKGROUND_PROMPT", "a photo of background."),  # §3.1
        ("MODEL.IKD.LOSS_TYPE", "l1"),  # Eq. 2
        ("MODEL.IKD.BOXES", "predicted"),  # §3.2
        ("MODEL.IKD.CROP_SCALE", 1.5),  # Table 2
        ("MODEL.IKD.IOU_THRESH", 0.5),  # §3.2
        ("MODEL.GKD.LOSS_TYPE", "contrastive"),  # Eq. 5
        ("MODEL.GKD.GRID_SIZE", 3),  # Table 3
        ("MODEL.GKD.POOLING", "max"),  # Table 3
        ("MODEL.TEACHER.WEIGHTS", "ViT-B/32"),  # §4.2
        ("SOLVER.OPTIMIZER", "SGD"),  # §4.2
        ("DATALOADER.SKIP_BROKEN_IMAGES", False),
    ],
)
def test_values_of_the_paper(key, value):
    assert ADDED[key] == value


def test_the_config_of_a_run_of_before_is_still_read(tmp_path):
    (tmp_path / "config.yaml").write_text("MODEL: {ATSS: {PRESELECT_ABOVE: 4000, TOPK: 7}}")
    cfg = make_cfg()
    cfg.merge_from_file(str(tmp_path / "config.yaml"))
    assert cfg.MODEL.ATSS.TOPK == 7
    assert "PRESELECT_ABOVE" not in cfg.MODEL.ATSS
