"""Checkpoints: what they hold, what they give back, and errors that say what to do."""

import re
from urllib.error import URLError

import pytest
import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone import FPN, BasicStem, ResNet
from detectron2.modeling.backbone.resnet import BasicBlock
from detectron2.modeling.box_regression import Box2BoxTransform

from fake_teacher import FakeTeacher
from hierkd.engine.checkpoint import HierKDCheckpointer
from hierkd.modeling.atss import ATSSMatcher
from hierkd.modeling.head import ATSSHead
from hierkd.modeling.meta_arch import IKD, DetectionSettings, HierKD, InferenceSettings
from hierkd.modeling.mlca import MLCA
from hierkd.modeling.text_classifier import TextClassifier


def make_detector(*, embed_dim=6, vocabulary=("cat", "dog"), seed=0, mlca=True):
    """A whole HierKD of a few hundred weights, with both distillations and a teacher."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stage = ResNet.make_stage(
            BasicBlock, 1, in_channels=4, out_channels=4, norm="BN", stride_per_block=[2]
        )
        bottom_up = ResNet(BasicStem(3, 4, norm="BN"), [stage], out_features=["res2"])
        return HierKD(
            backbone=FPN(bottom_up, ["res2"], 4, norm="BN"),
            head=ATSSHead(in_channels=4, embed_dim=embed_dim, num_levels=1, num_convs=1, norm="BN"),
            head_in_features=["p3"],
            text_classifier=TextClassifier(torch.randn(embed_dim)),
            anchor_generator=DefaultAnchorGenerator(
                sizes=[[64]], aspect_ratios=[[1.0]], strides=[8], offset=0.0
            ),
            box2box_transform=Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0)),
            anchor_matcher=ATSSMatcher(),
            teacher=FakeTeacher(embed_dim),
            detection=DetectionSettings(),
            inference=InferenceSettings(),
            ikd=IKD(),
            mlca=MLCA() if mlca else None,
            gkd_loss_weight=1.0,
            vocabulary=vocabulary,
            pixel_mean=[0.0] * 3,
            pixel_std=[1.0] * 3,
        )


@pytest.fixture
def saved(tmp_path):
    """The path of a checkpoint of the detector with seed 1, at iteration 41."""
    checkpointer = HierKDCheckpointer(make_detector(seed=1), str(tmp_path))
    checkpointer.save("model_0000041", iteration=41)
    return str(tmp_path / "model_0000041.pth")


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_round_trip(saved):
    model, original = make_detector(seed=2), make_detector(seed=1)
    different = [n for n, v in model.state_dict().items() if not v.equal(original.state_dict()[n])]
    assert len(different) > 5
    rest = HierKDCheckpointer(model).load(saved)
    assert rest["iteration"] == 41
    for name, value in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_a_checkpoint_runs_with_another_vocabulary(saved):
    model = make_detector(seed=2, vocabulary=("sheep", "cow", "zebra"))
    texts = model.text_classifier.text_embeddings.clone()
    HierKDCheckpointer(model).load(saved)
    assert model.vocabulary_names == ("sheep", "cow", "zebra")
    assert torch.equal(model.text_classifier.text_embeddings, texts)
    assert model.text_classifier(torch.zeros(1, 6)).shape == (1, 4)


def test_the_file_holds_the_detector_alone(saved):
    content = torch.load(saved, weights_only=True)
    names = set(content["model"])
    assert names == set(make_detector().state_dict())
    assert not [n for n in names if "teacher" in n or "text_embeddings" in n]
    top_level = {name.split(".")[0] for name in names}
    assert top_level == {"backbone", "head", "text_classifier", "mlca", "cls_loss_log_weight"}


def test_a_detector_without_distillation_loads_one_with_it(saved):
    model = make_detector(seed=2, mlca=False)
    HierKDCheckpointer(model).load(saved)
    original = make_detector(seed=1).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, original[name]), name


def test_resume_takes_the_last_checkpoint(saved, tmp_path):
    model = make_detector(seed=2)
    checkpointer = HierKDCheckpointer(model, str(tmp_path))
    assert checkpointer.resume_or_load("/nowhere/else.pth", resume=True)["iteration"] == 41
    assert torch.equal(
        model.text_classifier.background_embedding,
        make_detector(seed=1).text_classifier.background_embedding,
    )


def test_an_empty_path_loads_nothing():
    model = make_detector()
    before = weights(model)
    assert HierKDCheckpointer(model).load("") == {}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_another_embedding_size(saved):
    model = make_detector(embed_dim=10)
    before = weights(model)
    with pytest.raises(
        ValueError, match=r"have 6 dimensions, this detector's 10.*EMBED_DIM.*TEACHER\.WEIGHTS"
    ):
        HierKDCheckpointer(model).load(saved)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_backbone_weights_have_no_embedding_to_compare(tmp_path):
    # what MODEL.WEIGHTS names at the start of a training
    source = make_detector(seed=1).backbone.state_dict()
    torch.save({"model": {f"backbone.{k}": v for k, v in source.items()}}, tmp_path / "b.pth")
    model = make_detector(seed=2, embed_dim=10)
    HierKDCheckpointer(model).load(str(tmp_path / "b.pth"))
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value, source[name]), name


def test_matching_heuristics_can_be_asked_for(tmp_path):
    # detectron2's "file.pth?matching_heuristics=True": names without their prefix
    source = make_detector(seed=1).backbone.bottom_up.state_dict()
    torch.save({"model": source}, tmp_path / "b.pth")
    model = make_detector(seed=2)
    HierKDCheckpointer(model).load(f"{tmp_path}/b.pth?matching_heuristics=True")
    name = "res2.0.conv1.weight"
    assert torch.equal(model.backbone.bottom_up.state_dict()[name], source[name])


def test_missing_file(tmp_path):
    path = str(tmp_path / "absent.pth")
    with pytest.raises(FileNotFoundError, match=r"MODEL\.WEIGHTS") as error:
        HierKDCheckpointer(make_detector()).load(path)
    assert path in str(error.value)
    with pytest.raises(FileNotFoundError, match="no file"):  # a folder is not a checkpoint
        HierKDCheckpointer(make_detector()).load(str(tmp_path))


@pytest.mark.parametrize("error", [URLError("no route"), TimeoutError("slow"), ConnectionError()])
@pytest.mark.parametrize(
    "url", ["https://example.org/model.pth", "detectron2://ImageNetPretrained/torchvision/R-50.pkl"]
)
def test_no_network(monkeypatch, url, error):
    checkpointer = HierKDCheckpointer(make_detector())

    def refuse(path, *args, **kwargs):
        raise error

    monkeypatch.setattr(checkpointer.path_manager, "get_local_path", refuse)
    with pytest.raises(ConnectionError, match=re.escape(url)) as caught:
        checkpointer.load(url)
    assert "MODEL.WEIGHTS" in str(caught.value)
    assert "FVCORE_CACHE" in str(caught.value)
    assert caught.value.__cause__ is error


def test_a_refused_connection(monkeypatch, tmp_path):
    # the real way through detectron2's downloader; port 9 of this machine answers nobody
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    with pytest.raises(ConnectionError, match=r"http://127\.0\.0\.1:9/model\.pth"):
        HierKDCheckpointer(make_detector()).load("http://127.0.0.1:9/model.pth")


@pytest.mark.parametrize("content", [b"", b"no checkpoint", "truncated"])
def test_a_damaged_file(saved, tmp_path, content):
    path = tmp_path / "damaged.pth"
    whole = (tmp_path / "model_0000041.pth").read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content == "truncated" else content)
    with pytest.raises(ValueError, match=r"MODEL\.WEIGHTS.*damaged\.pth"):
        HierKDCheckpointer(make_detector()).load(str(path))


def test_a_failed_load_does_not_spoil_the_next(saved, tmp_path):
    checkpointer = HierKDCheckpointer(make_detector(seed=2))
    (tmp_path / "damaged.pth").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="damaged"):
        checkpointer.load(str(tmp_path / "damaged.pth"))
    assert checkpointer.load(saved)["iteration"] == 41


def test_a_trained_detector_is_told_from_a_backbone(saved, tmp_path):
    model = make_detector(seed=2)
    HierKDCheckpointer(model).load_detector(saved)
    original = make_detector(seed=1).state_dict()
    assert all(torch.equal(value, original[name]) for name, value in model.state_dict().items())
    source = {f"backbone.{k}": v for k, v in make_detector().backbone.state_dict().items()}
    torch.save({"model": source}, tmp_path / "warm_start.pth")
    with pytest.raises(ValueError, match=r"warm_start\.pth' is no trained detector.*head\."):
        HierKDCheckpointer(model).load_detector(str(tmp_path / "warm_start.pth"))
    with pytest.raises(ValueError, match="no trained detector"):
        HierKDCheckpointer(model).load_detector("")
