"""OpenVocabularyPredictor: what the model is given, and what comes back."""

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, Instances

import hierkd.modeling.meta_arch as meta_arch
from fake_teacher import FakeTeacher
from hierkd.engine.config import load_config
from hierkd.engine.predictor import OpenVocabularyPredictor, resolve_vocabulary
from toy_world import VOCABULARY, register_toy_world

CONFIG = "configs/miniature/hierkd.yaml"


class RecordingModel(torch.nn.Module):
    """Remembers its input and finds one object."""

    vocabulary_names = ("cat", "dog")

    def forward(self, batched_inputs):
        self.batched_inputs = batched_inputs
        instances = Instances((10, 10), pred_boxes=Boxes(torch.tensor([[1.0, 2.0, 3.0, 4.0]])))
        return [{"instances": instances}]


def gradient_image(height, width):
    """BGR picture whose blue grows to the right; red is 200, green 0."""
    image = np.zeros((height, width, 3), dtype=np.uint8)
    image[..., 0] = np.linspace(0, 255, width).astype(np.uint8)
    image[..., 2] = 200
    return image


def test_short_side_is_resized_and_the_original_size_told():
    model = RecordingModel().train()
    predictor = OpenVocabularyPredictor(model=model, min_size=64, max_size=100, image_format="BGR")
    instances = predictor(gradient_image(128, 160))
    (given,) = model.batched_inputs
    assert given["image"].shape == (3, 64, 80)
    assert (given["height"], given["width"]) == (128, 160)
    assert not model.training
    assert instances.pred_boxes.tensor.tolist() == [[1, 2, 3, 4]]


def test_long_side_is_limited():
    predictor = OpenVocabularyPredictor(
        model=RecordingModel(), min_size=64, max_size=100, image_format="BGR"
    )
    assert predictor.prepare(gradient_image(128, 1280))["image"].shape == (3, 10, 100)


@pytest.mark.parametrize(("image_format", "red_channel"), [("BGR", 2), ("RGB", 0)])
def test_channels_come_in_the_models_order(image_format, red_channel):
    predictor = OpenVocabularyPredictor(
        model=RecordingModel(), min_size=128, max_size=128, image_format=image_format
    )
    image = predictor.prepare(gradient_image(128, 128))["image"]
    assert image[red_channel].unique().tolist() == [200]
    assert image[1].unique().tolist() == [0]


def test_unknown_channel_order():
    with pytest.raises(ValueError, match=r"INPUT\.FORMAT.*'YUV'"):
        OpenVocabularyPredictor(model=RecordingModel(), min_size=1, max_size=1, image_format="YUV")


@pytest.fixture
def make_cfg(monkeypatch, tmp_path):
    """Config of a random detector, saved as a checkpoint, that knows a toy world's dataset."""

    def _make(*overrides):
        dataset = register_toy_world(tmp_path / "world")
        general = [
            "MODEL.DEVICE",
            "cpu",
            "DATASETS.TRAIN",
            "()",
            "DATASETS.TEST",
            f"('{dataset}',)",
        ]
        cfg = load_config(CONFIG, [*general, *overrides])
        teacher = FakeTeacher(cfg.MODEL.TEXT_CLASSIFIER.EMBED_DIM)
        monkeypatch.setattr(meta_arch, "build_teacher", lambda cfg: teacher)
        return cfg

    return _make


def test_from_config_loads_the_weights_and_the_largest_vocabulary(make_cfg, tmp_path):
    from detectron2.modeling import build_model

    weights = tmp_path / "model.pth"
    cfg = make_cfg("MODEL.WEIGHTS", str(weights))
    torch.manual_seed(3)
    saved = build_model(cfg)
    torch.save({"model": saved.state_dict()}, weights)

    predictor = OpenVocabularyPredictor(cfg)
    assert predictor.vocabulary == VOCABULARY
    for name, parameter in predictor.model.state_dict().items():
        torch.testing.assert_close(parameter, saved.state_dict()[name])

    image = gradient_image(96, 120)
    five = predictor(image)
    assert five.image_size == (96, 120)
    assert (five.scores[:-1] >= five.scores[1:]).all()
    predictor.set_vocabulary(["one thing"])
    assert predictor.vocabulary == ("one thing",)
    assert set(predictor(image).pred_classes.tolist()) == {0}


def test_missing_weights_are_named(make_cfg):
    with pytest.raises(FileNotFoundError, match=r"nowhere/model\.pth"):
        OpenVocabularyPredictor(make_cfg("MODEL.WEIGHTS", "nowhere/model.pth"))


def test_empty_weights(make_cfg):
    with pytest.raises(ValueError, match=r"MODEL\.WEIGHTS is empty"):
        OpenVocabularyPredictor(make_cfg("MODEL.WEIGHTS", ""))


def test_vocabulary_from_names():
    assert resolve_vocabulary("cat,umbrella, traffic cone ") == ["cat", "umbrella", "traffic cone"]


def test_vocabulary_from_a_dataset(tmp_path):
    name = register_toy_world(tmp_path / "world")
    assert resolve_vocabulary(name) == list(VOCABULARY)
    resolve_vocabulary(name).clear()  # a copy: the dataset keeps its own
    assert tuple(MetadataCatalog.get(name).thing_classes) == VOCABULARY


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "empty"), (" , ", "empty"), ("cat,,dog", "blank"), ("cat,dog,cat", "repeats 'cat'")],
)
def test_unusable_vocabularies(text, message):
    with pytest.raises(ValueError, match=message):
        resolve_vocabulary(text)
