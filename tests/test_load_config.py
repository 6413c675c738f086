"""Reading configs: what wins, and that every mistake names its file and its key."""

import logging
import re
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model

import hierkd.modeling.detector as meta_arch
from fake_teacher import FakeTeacher
from hierkd.load_config import load_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# Table 1's proposals come from detectron2's model, everything else from ours.
RPN_FILES = sorted(p for p in CONFIGS.rglob("*.yaml") if "rpn" in p.stem.split("_"))
FILES = sorted(set(CONFIGS.rglob("*.yaml")) - set(RPN_FILES))


@pytest.fixture
def write(tmp_path):
    def write_file(text, name="run.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write_file


def test_defaults_alone():
    cfg = load_config("")
    assert cfg.MODEL.ATSS.TOPK == 9
    assert cfg.is_frozen()


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(write):
    path = write("MODEL: {ATSS: {TOPK: 5, NUM_CONVS: 2}}\n")
    cfg = load_config(path, ["MODEL.ATSS.TOPK", "7", "SOLVER.STEPS", "(1, 2)"])
    assert (cfg.MODEL.ATSS.TOPK, cfg.MODEL.ATSS.NUM_CONVS) == (7, 2)
    assert cfg.MODEL.ATSS.NMS_THRESH_TEST == 0.4
    assert cfg.SOLVER.STEPS == (1, 2)
    assert load_config("").MODEL.ATSS.TOPK == 9  # nothing is shared between calls


def test_a_base_is_found_beside_the_file(write):
    write("MODEL: {ATSS: {TOPK: 5, NUM_CONVS: 2}}\n", "base.yaml")
    cfg = load_config(write("_BASE_: base.yaml\nMODEL: {ATSS: {TOPK: 6}}\n"))
    assert (cfg.MODEL.ATSS.TOPK, cfg.MODEL.ATSS.NUM_CONVS) == (6, 2)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(CONFIGS)))
def test_every_config_of_the_project_is_consistent(path):
    cfg = load_config(str(path))
    assert cfg.MODEL.META_ARCHITECTURE == "HierKD"
    atss = cfg.MODEL.ATSS
    # one square anchor per point and level
    assert len(cfg.MODEL.ANCHOR_GENERATOR.SIZES) == len(atss.IN_FEATURES)
    assert all(len(sizes) == 1 for sizes in cfg.MODEL.ANCHOR_GENERATOR.SIZES)
    assert cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS == [[1.0]]
    assert list(cfg.SOLVER.STEPS) == sorted(cfg.SOLVER.STEPS)
    if cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupMultiStepLR":
        assert max(cfg.SOLVER.STEPS) < cfg.SOLVER.MAX_ITER
    assert cfg.SOLVER.WARMUP_ITERS < cfg.SOLVER.MAX_ITER
    assert len(cfg.DATASETS.TRAIN) == 1
    assert len(cfg.DATASETS.TEST) == 3
    world = cfg.DATASETS.TRAIN[0].removesuffix("_train_base")
    assert all(name.startswith(world) for name in cfg.DATASETS.TEST)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(CONFIGS)))
def test_every_config_of_the_project_builds(path, monkeypatch):
    # On the meta device a model has shapes and no memory: R-101 builds in a blink.
    cfg = load_config(str(path), ["MODEL.DEVICE", "meta"])
    teacher = FakeTeacher(cfg.MODEL.TEXT_CLASSIFIER.EMBED_DIM)
    monkeypatch.setattr(meta_arch, "build_teacher", lambda cfg: teacher)
    with torch.device("meta"):
        model = build_model(cfg)
    assert all(parameter.is_meta for parameter in model.parameters())
    world = cfg.DATASETS.TRAIN[0].removesuffix("_train_base")
    classes = {"coco_ovd_48_17": 48, "coco_ovd_65_15": 65, "miniature_ovd": 24}
    assert len(model.vocabulary_names) == classes[world]
    assert (model.ikd is not None) == (cfg.MODEL.IKD.LOSS_WEIGHT > 0)
    assert (model.mlca is not None) == (cfg.MODEL.GKD.LOSS_WEIGHT > 0)
    strides = [model.backbone.output_shape()[f].stride for f in model.head_in_features]
    sizes = [size for (size,) in cfg.MODEL.ANCHOR_GENERATOR.SIZES]
    assert sizes == [8 * stride for stride in strides]  # the paper's anchors


ROWS = {"atss": (False, False), "ikd": (True, False), "gkd": (False, True), "hierkd": (True, True)}


@pytest.mark.parametrize(
    "path",
    [p for p in FILES if p.stem.split("_")[0] in ROWS],
    ids=lambda p: str(p.relative_to(CONFIGS)),
)
def test_the_file_name_is_the_row_of_the_table(path):
    cfg = load_config(str(path))
    on = (cfg.MODEL.IKD.LOSS_WEIGHT > 0, cfg.MODEL.GKD.LOSS_WEIGHT > 0)
    assert on == ROWS[path.stem.split("_")[0]]
    if "R50" in path.stem or "R101" in path.stem:
        assert (101 if "R101" in path.stem else 50) == cfg.MODEL.RESNETS.DEPTH


# ---------------------------------------------------------------------- Table 1


def test_table_1_is_there_at_both_scales():
    assert [str(p.relative_to(CONFIGS)) for p in RPN_FILES] == [
        "ablations/table1_rpn_R50_1x.yaml",
        "miniature/rpn.yaml",
    ]


@pytest.mark.parametrize("path", RPN_FILES, ids=lambda p: str(p.relative_to(CONFIGS)))
def test_proposals_are_learned_from_base_boxes_and_scored_on_all(path):
    cfg = load_config(str(path), ["MODEL.DEVICE", "cpu"])
    world = cfg.DATASETS.TRAIN[0].removesuffix("_train_base")
    assert (f"{world}_train_base",) == cfg.DATASETS.TRAIN
    (tested,) = cfg.DATASETS.TEST
    assert tested == {"miniature_ovd": f"{world}_test_all"}.get(world, f"{world}_val_all")
    assert cfg.MODEL.IKD.LOSS_WEIGHT == cfg.MODEL.GKD.LOSS_WEIGHT == 0  # no captions are asked for
    assert cfg.MODEL.RPN.POST_NMS_TOPK_TEST == 1000  # AR@1000
    assert cfg.SOLVER.WARMUP_ITERS < cfg.SOLVER.MAX_ITER
    model = build_model(cfg)
    rpn = model.proposal_generator
    assert type(rpn).__name__ == "RPN"
    assert len(cfg.MODEL.ANCHOR_GENERATOR.SIZES) == len(rpn.in_features)
    assert rpn.anchor_generator.num_anchors == [3] * len(rpn.in_features)
    # proposals know no class: one logit per anchor
    assert rpn.rpn_head.objectness_logits.out_channels == 3


def test_table_1_on_coco_is_twelve_epochs_of_detectron2s_recipe():
    cfg = load_config(str(CONFIGS / "ablations" / "table1_rpn_R50_1x.yaml"))
    epoch = 107_761 // cfg.SOLVER.IMS_PER_BATCH + 1
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR) == (16, 0.02)
    assert 12 * epoch == cfg.SOLVER.MAX_ITER
    assert (8 * epoch, 11 * epoch) == cfg.SOLVER.STEPS
    assert cfg.SOLVER.CLIP_GRADIENTS.ENABLED is False
    assert cfg.MODEL.RPN.IN_FEATURES == ["p2", "p3", "p4", "p5", "p6"]


# ---------------------------------------------------------------------- mistakes


def test_unknown_key_in_a_file(write):
    path = write("MODEL: {ATSS: {TOPKK: 5}}\n")
    with pytest.raises(ValueError, match=r"MODEL\.ATSS\.TOPKK") as error:
        load_config(path)
    assert path in str(error.value)


def test_unknown_key_on_the_command_line():
    with pytest.raises(ValueError, match=r"KEY VALUE.*MODEL\.ATSS\.TOPKK"):
        load_config("", ["MODEL.ATSS.TOPKK", "5"])


@pytest.mark.parametrize("key", ["MODEL.ATSS.TOPK.DEEPER", "SOLVER.BASE_LR.X", "MODEL.DEVICE.c"])
def test_a_key_below_a_value(key):
    with pytest.raises(ValueError, match=re.escape(key)):
        load_config("", [key, "5"])


def test_wrong_type(write):
    path = write("MODEL: {ATSS: {TOPK: many}}\n")
    with pytest.raises(ValueError, match=r"MODEL\.ATSS\.TOPK") as error:
        load_config(path)
    assert path in str(error.value)
    with pytest.raises(ValueError, match=r"KEY VALUE.*MODEL\.ATSS\.TOPK"):
        load_config("", ["MODEL.ATSS.TOPK", "many"])


def test_a_value_where_a_section_is_expected(write):
    path = write("MODEL: {ATSS: 5}\n")
    with pytest.raises(ValueError, match="ATSS") as error:
        load_config(path)
    assert path in str(error.value)


def test_a_key_without_a_value():
    with pytest.raises(ValueError, match=r"KEY VALUE pairs, but 'MODEL\.ATSS\.TOPK' has no value"):
        load_config("", ["MODEL.ATSS.TOPK"])


@pytest.mark.parametrize("text", ["MODEL: [1, 2\n", "", "- a\n- b\n", "just words\n"])
def test_a_file_that_is_not_a_config(write, text):
    path = write(text)
    with pytest.raises(ValueError, match=r"run\.yaml"):
        load_config(path)


def test_missing_files(write, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--config-file.*nowhere\.yaml"):
        load_config(str(tmp_path / "nowhere.yaml"))
    with pytest.raises(FileNotFoundError, match=r"absent\.yaml"):
        load_config(write("_BASE_: absent.yaml\n"))


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_without_cuda_the_cpu_is_used_with_a_note(monkeypatch, caplog, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with caplog.at_level(logging.WARNING, logger="hierkd"):
        cfg = load_config("", ["MODEL.DEVICE", device])
    assert cfg.MODEL.DEVICE == "cpu"
    assert [device in r.getMessage() for r in caplog.records if r.name.startswith("hierkd")] == [
        True
    ]


def test_the_device_is_kept_where_it_exists(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert load_config("", ["MODEL.DEVICE", "cuda:1"]).MODEL.DEVICE == "cuda:1"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert load_config("", ["MODEL.DEVICE", "cpu"]).MODEL.DEVICE == "cpu"
    assert not [r for r in caplog.records if r.name.startswith("hierkd")]


def test_an_unknown_device():
    with pytest.raises(ValueError, match=r"MODEL\.DEVICE.*'gpu'"):
        load_config("", ["MODEL.DEVICE", "gpu"])


def test_a_device_that_pytorch_lacks_here_is_named(monkeypatch):
    absent = next(name for name in ("hpu", "xpu", "mps") if not _has(name))
    for name in {absent, "mps"} if not _has("mps") else {absent}:
        with pytest.raises(ValueError, match=rf"MODEL\.DEVICE: no device '{name}'") as caught:
            load_config("", ["MODEL.DEVICE", name])
        assert len(str(caught.value)) < 400
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert load_config("", ["MODEL.DEVICE", "cuda:1"]).MODEL.DEVICE == "cuda:1"
    with pytest.raises(ValueError, match=r"MODEL\.DEVICE: no device 'cuda:2': this machine has 2"):
        load_config("", ["MODEL.DEVICE", "cuda:2"])


def _has(device):
    try:
        torch.empty(0, device=device)
    except Exception:
        return False
    return True


def test_half_precision_without_cuda_is_left_out_with_a_note(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with caplog.at_level(logging.WARNING):
        cfg = load_config("", ["SOLVER.AMP.ENABLED", "True"])
    assert cfg.SOLVER.AMP.ENABLED is False
    assert "SOLVER.AMP.ENABLED" in caplog.text


@pytest.mark.parametrize("number", [0, -4])
@pytest.mark.parametrize(
    "key", ["TEST.IMS_PER_BATCH", "SOLVER.MAX_ITER", "SOLVER.CHECKPOINT_PERIOD"]
)
def test_numbers_of_images_and_iterations_are_positive(key, number):
    with pytest.raises(ValueError, match=rf"{key} must be 1 or more, got {number}"):
        load_config("", [key, str(number)])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"),
        ("DATALOADER.REPEAT_THRESHOLD", "0.5"),
        ("TEST.AUG.ENABLED", "True"),
    ],
)
def test_keys_that_would_be_set_in_vain_are_refused(key, value):
    with pytest.raises(ValueError, match=rf"{key} is '?{value}'?, but is not read here"):
        load_config("", [key, value, "MODEL.DEVICE", "cpu"])


def test_an_option_behind_the_pairs_is_said():
    with pytest.raises(ValueError, match="'--resume' stands among the KEY VALUE pairs"):
        load_config("", ["SEED", "1", "--resume", "SOLVER.MAX_ITER", "3"])


def test_whole_numbers_are_floats_where_a_key_holds_one():
    cfg = load_config("", ["SOLVER.BASE_LR", "1", "SEED", "2", "MODEL.DEVICE", "cpu"])
    assert (cfg.SOLVER.BASE_LR, type(cfg.SOLVER.BASE_LR)) == (1.0, float)
    assert type(cfg.SEED) is int


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.IKD.IOU_THRESH", "2.0"),
        ("MODEL.GKD.LOSS_WEIGHT", "-1.0"),
        ("MODEL.ATSS.NMS_THRESH_TEST", "5.0"),
        ("TEST.DETECTIONS_PER_IMAGE", "0"),
    ],
)
def test_numbers_out_of_range_are_refused(key, value):
    with pytest.raises(ValueError, match=rf"{key} must be .*, got {value}"):
        load_config("", [key, value, "MODEL.DEVICE", "cpu"])


def test_a_seed_that_numpy_cannot_take_is_refused():
    taken = [-1, 0, 2**31 - 1]
    cfgs = [load_config("", ["SEED", str(seed), "MODEL.DEVICE", "cpu"]) for seed in taken]
    assert [cfg.SEED for cfg in cfgs] == taken
    for seed in (2**31, 2**32):
        with pytest.raises(ValueError, match=f"SEED must be below 2147483648.*got {seed}"):
            load_config("", ["SEED", str(seed), "MODEL.DEVICE", "cpu"])
