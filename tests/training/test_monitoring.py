"""Hooks to watch a training by: what they record, and that they leave everything as it was."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from fake_teacher import FakeTeacher
from hierkd.load_config import load_config
from hierkd.modeling import detector as meta_arch
from hierkd.reports.charts import draw_comparison
from hierkd.training.monitoring import BackgroundDrift, DetectionPictures, build_monitoring_hooks
from toy_world import NOVEL, register_toy_world

TRAINED = ("ant", "cow", "elk")


@pytest.fixture
def cfg(monkeypatch):
    cfg = load_config(
        "configs/miniature/hierkd.yaml",
        ["MODEL.DEVICE", "cpu", "DATASETS.TRAIN", "()", "VIS_PERIOD", "3"],
    )
    cfg.defrost()
    teacher = FakeTeacher(cfg.MODEL.TEXT_CLASSIFIER.EMBED_DIM)
    monkeypatch.setattr(meta_arch, "build_teacher", lambda cfg: teacher)
    return cfg


@pytest.fixture
def detector(cfg):
    torch.manual_seed(0)
    model = build_model(cfg)
    model.set_vocabulary(TRAINED)
    return model.train()


def run(hooks, iterations, max_iter=100):
    """Call the hooks after these steps; the storage, with what they put into it."""
    with EventStorage() as storage:
        for iteration in iterations:
            storage.iter = iteration
            for hook in hooks:
                hook.trainer = SimpleNamespace(iter=iteration, max_iter=max_iter, storage=storage)
                hook.after_step()
    return storage


def state(model):
    """All that a training goes on from."""
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        [module.training for module in model.modules()],
        (model.vocabulary_names, id(model.text_classifier.text_embeddings), model.compile_test),
    )


def assert_same_state(model, before):
    weights, *others = state(model)
    assert others == list(before[1:])
    assert [n for n, value in before[0].items() if not torch.equal(value, weights[n])] == []


# ------------------------------------------------------------------------------------ background


def test_the_background_drifts_by_the_angle_it_is_turned_also_when_resumed(detector):
    drift = BackgroundDrift(detector)
    background = detector.text_classifier.background_embedding
    assert run([drift], [19]).latest()["background_start_cosine"] == (pytest.approx(1.0), 19)
    # a unit vector at right angles, by Gram and Schmidt
    across = torch.randn(len(background), generator=torch.Generator().manual_seed(1))
    across -= (across @ background) * background
    across /= across.norm()
    with torch.no_grad():  # as loading a checkpoint does: turned by 60 degrees, three times as long
        background.copy_(3 * (0.5 * background + 0.75**0.5 * across))
    turned = run([drift], [39]).latest()["background_start_cosine"]
    assert turned == (pytest.approx(0.5, abs=1e-5), 39)


def test_the_nearest_class_is_told_whenever_scalars_are_written_and_at_the_end(detector):
    drift = BackgroundDrift(detector)
    with torch.no_grad():
        target = 7 * detector.text_classifier.text_embeddings[1]
        detector.text_classifier.background_embedding.copy_(target)
    recorded = run([drift], range(50), max_iter=50).history("background_class_cosine").values()
    assert recorded == [(pytest.approx(1.0, abs=1e-6), i) for i in (19, 39, 49)]


# -------------------------------------------------------------------------------------- pictures


@pytest.fixture
def dataset(tmp_path):
    return register_toy_world(tmp_path / "world")


@pytest.fixture
def pictures(cfg, detector, dataset):
    cfg.TEST.VIS_PICTURES, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 2, 128, 128
    return DetectionPictures(cfg, detector, dataset)


def test_pictures_show_novel_classes_every_so_often_and_at_the_end(pictures, monkeypatch):
    drawn = []

    def recorded(columns, captions):
        drawn.extend(zip(columns["detected"], captions, strict=True))
        return draw_comparison(columns, captions)

    monkeypatch.setattr("hierkd.training.monitoring.draw_comparison", recorded)
    storage = run([pictures], range(5), max_iter=5)
    assert [(name, i) for name, _, i in storage._vis_data] == [
        (f"detections/{number}", i) for i in (2, 4) for number in (1, 2)
    ]
    for _, image, _ in storage._vis_data:
        assert (image.dtype, image.shape[0]) == (np.uint8, 3)
        assert image.shape[2] > 2 * 480  # two panels beside one another
    # bee and dog in turn: pictures 2 and 3 of the toy world
    assert [text for _, text in drawn[:2]] == ["2.png, iteration 3", "3.png, iteration 3"]
    for sample, _ in drawn:
        assert sample.image.shape == (128, 128, 3)
        found = [box.class_name in NOVEL for box in sample.detections]
        there = [box.class_name in NOVEL for box in sample.truth]
        assert sorted(found) == sorted(there)  # an untrained detector finds something everywhere


def test_pictures_change_nothing(detector, pictures):
    detector.backbone.eval()  # a part that the training keeps in this mode
    detector.compile_test = True  # would compile for a minute
    before = state(detector)
    storage = run([pictures, BackgroundDrift(detector)], [2, 19, 20])
    assert len(storage._vis_data) == 2 * 2
    assert "background_start_cosine" in storage.latest()
    assert_same_state(detector, before)


def test_a_drawing_that_fails_costs_a_warning_and_changes_nothing(detector, pictures, caplog):
    def leave(model, inputs):
        raise RuntimeError("out of memory")

    before = state(detector)
    handle = detector.register_forward_pre_hook(leave)
    assert run([pictures], [2])._vis_data == []
    assert "out of memory" in caplog.text
    handle.remove()
    assert_same_state(detector, before)


def test_the_config_decides_which_hooks_there_are(cfg, detector, dataset):
    def kinds():
        return [type(hook) for hook in build_monitoring_hooks(cfg, detector)]

    cfg.DATASETS.TEST = (dataset,)
    assert kinds() == [BackgroundDrift, DetectionPictures]
    cfg.VIS_PERIOD = 0
    assert kinds() == [BackgroundDrift]
    cfg.VIS_PERIOD, cfg.TEST.VIS_PICTURES = 3, 0
    assert kinds() == [BackgroundDrift]
    cfg.TEST.VIS_PICTURES, cfg.DATASETS.TEST = 2, ()
    assert kinds() == [BackgroundDrift]
    assert build_monitoring_hooks(cfg, torch.nn.Linear(1, 1)) == []  # a model without text
