"""Random detectors: built without CLIP, finite, and with the vocabulary asked for."""

import logging

import torch

from hierkd.benchmarks.random_models import random_hierkd

CPU = torch.device("cpu")


def test_random_hierkd_detects_among_the_classes_asked_for() -> None:
    model = random_hierkd("configs/hierkd_R50.yaml", 7, CPU)
    assert not model.training
    assert len(model.vocabulary_names) == 7
    picture = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)
    with torch.inference_mode():
        features, (embeddings, deltas, qualities) = model._predict_maps(
            model.preprocess_image([{"image": picture}])
        )
        assert all(torch.isfinite(x).all() for x in (*features, *embeddings, *deltas, *qualities))
        found = model([{"image": picture, "height": 64, "width": 96}])[0]["instances"]
    assert len(found) > 0
    assert found.pred_classes.max() < 7
    assert torch.isfinite(found.scores).all()


def test_opts_reach_the_config_and_the_log_level_comes_back() -> None:
    logger = logging.getLogger("hierkd.teachers.teacher")
    before = logger.level
    model = random_hierkd(
        "configs/miniature/hierkd.yaml", 3, CPU, ["MODEL.ATSS.NMS_THRESH_TEST", "0.7"]
    )
    assert model.inference_settings.nms_thresh == 0.7
    assert logger.level == before
