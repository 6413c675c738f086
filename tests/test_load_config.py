"""Reading configs: what wins, and that every mistake names its file and its key."""

import logging
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model

import hierkd.modeling.detector as meta_arch
from fake_teacher import FakeTeacher
from hierkd.load_config import load_config

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
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


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(write):
    path = write("MODEL: {ATSS: {TOPK: 5, NUM_CONVS: 2}}\n")
    cfg = load_config(path, ["MODEL.ATSS.TOPK", "7", "SOLVER.STEPS", "(1, 2)"])
    assert (cfg.MODEL.ATSS.TOPK, cfg.MODEL.ATSS.NUM_CONVS) == (7, 2)
    assert cfg.MODEL.ATSS.NMS_THRESH_TEST == 0.4
    assert cfg.SOLVER.STEPS == (1, 2)
    assert load_config("").MODEL.ATSS.TOPK == 9  # nothing is shared between calls


ROWS = {"atss": (False, False), "ikd": (True, False), "gkd": (False, True), "hierkd": (True, True)}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(CONFIGS)))
def test_every_config_of_the_project_builds(path, monkeypatch):
    # On the meta device a model has shapes and no memory: R-101 builds in a blink.
    cfg = load_config(str(path), ["MODEL.DEVICE", "meta"])
    assert cfg.MODEL.META_ARCHITECTURE == "HierKD"
    # one square anchor per point and level
    assert len(cfg.MODEL.ANCHOR_GENERATOR.SIZES) == len(cfg.MODEL.ATSS.IN_FEATURES)
    assert all(len(sizes) == 1 for sizes in cfg.MODEL.ANCHOR_GENERATOR.SIZES)
    assert cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS == [[1.0]]
    assert list(cfg.SOLVER.STEPS) == sorted(cfg.SOLVER.STEPS)
    if cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupMultiStepLR":
        assert max(cfg.SOLVER.STEPS) < cfg.SOLVER.MAX_ITER
    assert cfg.SOLVER.WARMUP_ITERS < cfg.SOLVER.MAX_ITER
    world = cfg.DATASETS.TRAIN[0].removesuffix("_train_base")
    assert (f"{world}_train_base",) == cfg.DATASETS.TRAIN
    assert len(cfg.DATASETS.TEST) == 3
    assert all(name.startswith(world) for name in cfg.DATASETS.TEST)
    # the file's name is the row of the table
    on = (cfg.MODEL.IKD.LOSS_WEIGHT > 0, cfg.MODEL.GKD.LOSS_WEIGHT > 0)
    assert on == ROWS.get(path.stem.split("_")[0], on)
    if path.stem.split("_")[0] in ROWS and ("R50" in path.stem or "R101" in path.stem):
        assert (101 if "R101" in path.stem else 50) == cfg.MODEL.RESNETS.DEPTH
    teacher = FakeTeacher(cfg.MODEL.TEXT_CLASSIFIER.EMBED_DIM)
    monkeypatch.setattr(meta_arch, "build_teacher", lambda cfg: teacher)
    with torch.device("meta"):
        model = build_model(cfg)
    assert all(parameter.is_meta for parameter in model.parameters())
    classes = {"coco_ovd_48_17": 48, "coco_ovd_65_15": 65, "miniature_ovd": 24}
    assert len(model.vocabulary_names) == classes[world]
    assert (model.ikd is not None, model.mlca is not None) == on
    strides = [model.backbone.output_shape()[f].stride for f in model.head_in_features]
    sizes = [size for (size,) in cfg.MODEL.ANCHOR_GENERATOR.SIZES]
    assert sizes == [8 * stride for stride in strides]  # the paper's anchors


# ---------------------------------------------------------------------- Table 1


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


# ---------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("MODEL: {ATSS: {TOPKK: 5}}\n", r"MODEL\.ATSS\.TOPKK"),
        ("MODEL: {ATSS: {TOPK: many}}\n", r"MODEL\.ATSS\.TOPK"),
        ("MODEL: {ATSS: 5}\n", "ATSS"),
        ("MODEL: [1, 2\n", r"run\.yaml"),
        ("", "the file is empty"),
        ("just words\n", r"run\.yaml"),
    ],
)
def test_a_mistake_in_a_file_names_it_and_the_key(write, text, named):
    path = write(text)
    with pytest.raises(ValueError, match=named) as error:
        load_config(path)
    assert path in str(error.value)


@pytest.mark.parametrize(
    ("pairs", "named"),
    [
        (["MODEL.ATSS.TOPKK", "5"], r"KEY VALUE.*MODEL\.ATSS\.TOPKK"),
        (["MODEL.ATSS.TOPK", "many"], r"KEY VALUE.*MODEL\.ATSS\.TOPK"),
        (["SOLVER.BASE_LR.X", "5"], r"SOLVER\.BASE_LR\.X"),
        (["MODEL.ATSS.TOPK"], r"'MODEL\.ATSS\.TOPK': expected KEY VALUE pairs"),
        (["SEED", "1", "--resume"], "'--resume' stands among the KEY VALUE"),
        (["MODEL.DEVICE", "gpu"], r"MODEL\.DEVICE.*'gpu'"),
        (["SOLVER.MAX_ITER", "-4"], r"SOLVER\.MAX_ITER must be 1 or more, got -4"),
        (["VIS_PERIOD", "-1"], r"VIS_PERIOD must be 0 or more, got -1"),
        (["MODEL.IKD.IOU_THRESH", "2.0"], r"MODEL\.IKD\.IOU_THRESH must be 0 to 1, got 2"),
        (["DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"], "but is not read here"),
        (["MODEL.LOAD_PROPOSALS", "True"], "but is not read here"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_mistake_in_a_pair_names_the_key(pairs, named):
    with pytest.raises(ValueError, match=named):
        load_config("", pairs)


def test_missing_files(write, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--config-file.*nowhere\.yaml"):
        load_config(str(tmp_path / "nowhere.yaml"))
    with pytest.raises(FileNotFoundError, match=r"absent\.yaml"):
        load_config(write("_BASE_: absent.yaml\n"))


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_without_cuda_the_cpu_and_float32_are_used_with_a_note(monkeypatch, caplog, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with caplog.at_level(logging.WARNING, logger="hierkd"):
        cfg = load_config("", ["MODEL.DEVICE", device, "SOLVER.AMP.ENABLED", "True"])
    assert cfg.MODEL.DEVICE == "cpu"
    assert cfg.SOLVER.AMP.ENABLED is False
    told = [r.getMessage() for r in caplog.records if r.name.startswith("hierkd")]
    assert [device in told[0], "SOLVER.AMP.ENABLED" in told[1], len(told)] == [True, True, 2]


def test_whole_numbers_are_floats_where_a_key_holds_one():
    cfg = load_config("", ["SOLVER.BASE_LR", "1", "MODEL.DEVICE", "cpu"])
    assert (cfg.SOLVER.BASE_LR, type(cfg.SOLVER.BASE_LR)) == (1.0, float)
