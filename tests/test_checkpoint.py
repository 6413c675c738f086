"""Checkpoints: what they hold, what they give back, and errors that say what to do."""

import contextlib
import errno
import logging
import os
import random
import re
import resource
import signal
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone import FPN, BasicStem, ResNet
from detectron2.modeling.backbone.resnet import BasicBlock
from detectron2.modeling.box_regression import Box2BoxTransform

from fake_teacher import FakeTeacher
from hierkd.checkpoint import HierKDCheckpointer, _find_damage
from hierkd.modeling.atss import ATSSMatcher
from hierkd.modeling.detector import HierKD
from hierkd.modeling.detector_settings import IKD, DetectionSettings, InferenceSettings
from hierkd.modeling.head import ATSSHead
from hierkd.modeling.mlca import MLCA
from hierkd.modeling.text_classifier import TextClassifier


def make_detector(*, embed_dim=6, vocabulary=("cat", "dog"), seed=0, mlca=True, background=None):
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
            text_classifier=TextClassifier(
                torch.ones(embed_dim) if background is None else background
            ),
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


def test_missing_file(tmp_path):
    path = str(tmp_path / "absent.pth")
    with pytest.raises(FileNotFoundError, match=rf"MODEL\.WEIGHTS: no file '{path}'"):
        HierKDCheckpointer(make_detector()).load(path)


@pytest.mark.parametrize("error", [URLError("no route"), TimeoutError("slow"), ConnectionError()])
def test_no_network(monkeypatch, error):
    checkpointer = HierKDCheckpointer(make_detector())

    def refuse(path, *args, **kwargs):
        raise error

    monkeypatch.setattr(checkpointer.path_manager, "get_local_path", refuse)
    url = "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
    with pytest.raises(ConnectionError, match=rf"MODEL\.WEIGHTS.*{re.escape(url)}.*FVCORE_CACHE"):
        checkpointer.load(url)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", "truncated"])
def test_a_damaged_file_is_named(saved, tmp_path, content):
    path, whole = tmp_path / "damaged.pth", Path(saved).read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content == "truncated" else content)
    with pytest.raises(ValueError, match=r"MODEL\.WEIGHTS.*damaged\.pth"):
        HierKDCheckpointer(make_detector()).load(str(path))


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


# --------------------------------------------------------------------------- whole or not at all


def checkpoints(folder, *iterations, final=None):
    """Checkpoints of distinct detectors, saved one after the other as detectron2 names them."""
    names = {f"model_{i:07d}": i for i in iterations}
    if final is not None:
        names["model_final"] = final
    for name, iteration in names.items():
        checkpointer = HierKDCheckpointer(make_detector(seed=iteration), str(folder))
        checkpointer.save(name, iteration=iteration)


def resumed(folder):
    """The iteration that ``--resume`` finds in the folder; the weights are those of it."""
    model = make_detector(seed=99)
    rest = HierKDCheckpointer(model, str(folder)).resume_or_load("", resume=True)
    if "iteration" in rest:
        expected = make_detector(seed=rest["iteration"]).state_dict()
        assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())
    return rest.get("iteration")


def truncate(path, keep=0.5):
    os.truncate(path, int(path.stat().st_size * keep))


class Iteration:
    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        assert state == {}


UNLIKE = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])  # orthogonal to the trace of `saved`


def test_another_teacher_of_the_same_size_is_named(saved, tmp_path):
    for load in (
        lambda each: each.load_detector(saved),
        lambda each: each.resume_or_load("", resume=True),
    ):
        with pytest.raises(ValueError, match=r"another CLIP.*cosine of -?0\.00") as error:
            load(HierKDCheckpointer(make_detector(background=UNLIKE), str(tmp_path)))
        for part in (saved, "MODEL.TEACHER.WEIGHTS", "EMBEDDINGS", "BACKGROUND_PROMPT"):
            assert part in str(error.value)
    # another prompt of the same CLIP is taken, with a cosine of 0.78
    HierKDCheckpointer(make_detector(background=torch.ones(6) + 0.8 * UNLIKE)).load(saved)


def test_a_new_training_may_start_from_another_teachers_detector(saved, caplog):
    checkpointer = HierKDCheckpointer(make_detector(background=UNLIKE), trainer=Iteration())
    checkpointer.resume_or_load(saved, resume=False)
    assert "another CLIP" in caplog.text


def test_our_file_is_that_of_stock_detectron2_byte_for_byte(saved, tmp_path):
    stock = tmp_path / "stock"
    stock.mkdir()
    model = make_detector(seed=1)
    further = {"teacher_trace": model.text_classifier.start_embedding, "iteration": 41}
    DetectionCheckpointer(model, str(stock)).save("model_0000041", **further)
    assert (stock / "model_0000041.pth").read_bytes() == Path(saved).read_bytes()
    assert (stock / "last_checkpoint").read_bytes() == (tmp_path / "last_checkpoint").read_bytes()
    DetectionCheckpointer(make_detector(seed=2)).load(saved)


# ------------------------------------------------------------------- what --resume falls back to


@pytest.mark.parametrize(
    ("tag", "message"),
    [
        (None, "there is no last_checkpoint"),
        (b"", "is not there"),
        (bytes(17), "is not there"),
        (b"model_00", "'model_00', which is not there"),
    ],
)
def test_a_broken_last_checkpoint_falls_back_to_the_newest(tmp_path, caplog, tag, message):
    checkpoints(tmp_path, 9, 10, 100)
    os.utime(tmp_path / "model_0000009.pth", (2**31, 2**31))  # by iteration, not by date
    (tmp_path / "last_checkpoint").unlink()
    if tag is not None:
        (tmp_path / "last_checkpoint").write_bytes(tag)
    assert resumed(tmp_path) == 100
    (warning,) = [r.getMessage() for r in caplog.records if "--resume" in r.getMessage()]
    assert message in warning
    assert warning.endswith(f"Going on from {tmp_path / 'model_0000100.pth'}")


DAMAGES = {
    "truncated": (truncate, "is damaged"),
    "empty": (lambda p: p.write_bytes(b""), "is damaged"),
    "gone": (lambda p: p.unlink(), "is not there"),
    "no model": (lambda p: torch.save({"iteration": 7}, p), "is damaged"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(tmp_path, caplog, case):
    checkpoints(tmp_path, 1, 3, 5, final=6)
    damage, message = DAMAGES[case]
    damage(tmp_path / "model_final.pth")
    truncate(tmp_path / "model_0000005.pth", 0.9)
    assert resumed(tmp_path) == 3
    (warning,) = [r.getMessage() for r in caplog.records if "--resume" in r.getMessage()]
    assert f"'model_final.pth', which {message}" in warning
    assert "model_0000005.pth is damaged" in warning


def test_nothing_whole_is_an_error_and_no_fresh_start(tmp_path):
    checkpoints(tmp_path, 1, 3)
    truncate(tmp_path / "model_0000001.pth")
    (tmp_path / "model_0000003.pth").unlink()
    with pytest.raises(ValueError, match="no checkpoint is whole") as error:
        resumed(tmp_path)
    for part in (str(tmp_path), "1.pth is damaged", "is not there", "leave --resume out"):
        assert part in str(error.value)


def test_an_empty_folder_starts_afresh_and_says_so(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    assert resumed(tmp_path) is None
    assert f"{str(tmp_path)!r} holds no checkpoint: starting afresh" in caplog.text


@pytest.mark.parametrize("number", [150, pytest.param(20_000, marks=pytest.mark.slow)])
def test_every_single_damage_is_found_or_harmless(saved, tmp_path, number):
    """Bits turned, bytes overwritten, files cut: noticed, or what is loaded is the same."""
    path, whole = tmp_path / "model_0000050.pth", Path(saved).read_bytes()
    expected = torch.load(saved, weights_only=True)["model"]
    draw, found = random.Random(number), 0
    for _ in range(number):
        content = bytearray(whole)
        at = draw.randrange(len(whole))
        kind = draw.randrange(3)
        if kind == 0:
            content[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            content[at : at + 64] = draw.randbytes(len(content[at : at + 64]))
        else:
            del content[at:]
        path.write_bytes(content)
        if _find_damage(path) is not None:
            found += 1
            continue
        loaded = torch.load(path, weights_only=True)
        assert all(torch.equal(v, loaded["model"][k]) for k, v in expected.items())
        assert loaded["iteration"] == 41
    assert found > number // 2


# ------------------------------------------------------------------------------------- full disks


@contextlib.contextmanager
def largest_file(num_bytes):
    """No file of this process can grow beyond so many bytes, as on a disk that is full."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("share", [0.01, 0.9999])
def test_a_write_that_fails_leaves_what_was(tmp_path, share):
    checkpoints(tmp_path, 3)
    size = (tmp_path / "model_0000003.pth").stat().st_size
    checkpointer = HierKDCheckpointer(make_detector(seed=4), str(tmp_path))
    with largest_file(int(size * share)), pytest.raises(OSError, match="File too large") as error:
        checkpointer.save("model_0000004", iteration=4)
    assert error.value.errno == errno.EFBIG
    for part in (str(tmp_path / "model_0000004.pth"), " MB free", "are intact", "--resume"):
        assert part in str(error.value)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["last_checkpoint", "model_0000003.pth"]
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000003.pth"
    assert resumed(tmp_path) == 3
    checkpointer.save("model_0000004", iteration=4)  # there is room again
    assert resumed(tmp_path) == 4
