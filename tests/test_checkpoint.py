"""Checkpoints: what they hold, what they give back, and errors that say what to do."""

import contextlib
import errno
import logging
import os
import random
import re
import resource
import shutil
import signal
import zipfile
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer, PeriodicCheckpointer
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone import FPN, BasicStem, ResNet
from detectron2.modeling.backbone.resnet import BasicBlock
from detectron2.modeling.box_regression import Box2BoxTransform

from fake_teacher import FakeTeacher
from hierkd.checkpoint import HierKDCheckpointer, find_damage, warn_of_little_space
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


def test_a_detector_without_distillation_loads_one_with_it(saved):
    model = make_detector(seed=2, mlca=False)
    HierKDCheckpointer(model).load(saved)
    original = make_detector(seed=1).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, original[name]), name


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


@pytest.mark.parametrize("content", [b"", b"no checkpoint", "truncated"])
def test_a_damaged_file_does_not_spoil_the_next(saved, tmp_path, content):
    path = tmp_path / "damaged.pth"
    whole = (tmp_path / "model_0000041.pth").read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content == "truncated" else content)
    checkpointer = HierKDCheckpointer(make_detector())
    assert checkpointer.loaded == ""
    with pytest.raises(ValueError, match=r"MODEL\.WEIGHTS.*damaged\.pth"):
        checkpointer.load(str(path))
    assert checkpointer.load(saved)["iteration"] == 41
    assert checkpointer.loaded == saved


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


def test_a_detector_of_another_backbone_is_refused(saved, tmp_path):
    content = torch.load(saved, weights_only=True)
    backbone = [key for key in content["model"] if key.startswith("backbone.")]
    del content["model"][backbone[-1]]
    torch.save(content, tmp_path / "other.pth")
    said = rf"lacks 1 of its weights, for example '{backbone[-1]}'"
    with pytest.raises(ValueError, match=said):
        HierKDCheckpointer(make_detector(seed=2)).load_detector(str(tmp_path / "other.pth"))


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


@pytest.mark.parametrize("moved", [0.0, 0.8])  # the same CLIP; of another prompt: a cosine of 0.78
def test_the_teacher_of_the_training_is_taken(saved, moved):
    model = make_detector(background=torch.ones(6) + moved * UNLIKE)
    model.text_classifier.background_embedding.data.neg_()  # what is learned has no say
    HierKDCheckpointer(model).load(saved)


def test_another_teacher_of_the_same_size_is_named(saved, tmp_path):
    for load in (
        lambda each: each.load(saved),
        lambda each: each.load_detector(saved),
        lambda each: each.resume_or_load(saved, resume=False),
        lambda each: each.resume_or_load("", resume=True),
    ):
        with pytest.raises(ValueError, match=r"another CLIP.*cosine of -?0\.00") as error:
            load(HierKDCheckpointer(make_detector(background=UNLIKE), str(tmp_path)))
        for part in (saved, "MODEL.TEACHER.WEIGHTS", "EMBEDDINGS", "BACKGROUND_PROMPT"):
            assert part in str(error.value)


def test_a_new_training_may_start_from_another_teachers_detector(saved, tmp_path, caplog):
    trained = make_detector(background=UNLIKE)
    checkpointer = HierKDCheckpointer(trained, str(tmp_path / "new"), trainer=Iteration())
    (tmp_path / "new").mkdir()
    with caplog.at_level(logging.WARNING, logger="hierkd"):
        checkpointer.resume_or_load(saved, resume=False)
    assert "another CLIP" in caplog.text
    checkpointer.save("model_0000001")
    HierKDCheckpointer(make_detector(background=UNLIKE)).load(
        str(tmp_path / "new/model_0000001.pth")
    )
    with pytest.raises(ValueError, match="another CLIP"):
        HierKDCheckpointer(make_detector()).load(str(tmp_path / "new/model_0000001.pth"))


def test_a_checkpoint_without_a_trace_is_taken(saved, tmp_path):
    content = torch.load(saved, weights_only=True)
    assert content.pop("teacher_trace").tolist() == pytest.approx([6**-0.5] * 6)
    torch.save(content, tmp_path / "older.pth")
    HierKDCheckpointer(make_detector(background=UNLIKE)).load(str(tmp_path / "older.pth"))


def test_our_file_is_that_of_stock_detectron2_byte_for_byte(saved, tmp_path):
    stock = tmp_path / "stock"
    stock.mkdir()
    model = make_detector(seed=1)
    further = {"teacher_trace": model.text_classifier.start_embedding, "iteration": 41}
    DetectionCheckpointer(model, str(stock)).save("model_0000041", **further)
    assert (stock / "model_0000041.pth").read_bytes() == Path(saved).read_bytes()
    assert (stock / "last_checkpoint").read_bytes() == (tmp_path / "last_checkpoint").read_bytes()
    DetectionCheckpointer(make_detector(seed=2)).load(saved)


def test_periodic_checkpointer_keeps_the_newest(tmp_path):
    checkpointer = HierKDCheckpointer(make_detector(), str(tmp_path))
    periodic = PeriodicCheckpointer(checkpointer, period=2, max_iter=8, max_to_keep=2)
    for iteration in range(8):
        periodic.step(iteration)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        "last_checkpoint",
        *(f"model_{i}.pth" for i in ("0000005", "0000007", "final")),
    ]
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    assert checkpointer.saved_iteration == 7


# ------------------------------------------------------------------- what --resume falls back to


def test_a_sound_folder_is_resumed_without_a_word(tmp_path, caplog):
    checkpoints(tmp_path, 1, 3, final=4)
    assert resumed(tmp_path) == 4
    assert [r.message for r in caplog.records if r.levelno >= logging.WARNING] == []


def test_last_checkpoint_is_obeyed_when_it_names_an_older_one(tmp_path):
    checkpoints(tmp_path, 1, 3)
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth\n")
    assert resumed(tmp_path) == 1


BROKEN_TAGS = {
    "missing": (lambda f: (f / "last_checkpoint").unlink(), "there is no last_checkpoint"),
    "empty": (lambda f: (f / "last_checkpoint").write_text(""), "is not there"),
    "zeros": (lambda f: (f / "last_checkpoint").write_bytes(bytes(17)), "is not there"),
    "garbage": (lambda f: (f / "last_checkpoint").write_bytes(b"\xff\xfe\x80m"), "is not there"),
    "cut short": (lambda f: (f / "last_checkpoint").write_text("model_00"), "'model_00', which is"),
    "the folder": (lambda f: (f / "last_checkpoint").write_text("."), "is not there"),
}


@pytest.mark.parametrize("case", BROKEN_TAGS)
def test_a_broken_last_checkpoint_falls_back_to_the_newest(tmp_path, caplog, case):
    checkpoints(tmp_path, 9, 10, 100)
    os.utime(tmp_path / "model_0000009.pth", (2**31, 2**31))  # by iteration, not by date
    spoil, message = BROKEN_TAGS[case]
    spoil(tmp_path)
    assert resumed(tmp_path) == 100
    (warning,) = [r.getMessage() for r in caplog.records if "--resume" in r.getMessage()]
    assert message in warning
    assert warning.endswith(f"Going on from {tmp_path / 'model_0000100.pth'}")


DAMAGES = {
    "truncated": (truncate, "is damaged"),
    "one byte short": (lambda p: os.truncate(p, p.stat().st_size - 1), "is damaged"),
    "empty": (lambda p: p.write_bytes(b""), "is empty"),
    "zeros": (lambda p: p.write_bytes(bytes(p.stat().st_size)), "is damaged"),
    "text": (lambda p: p.write_text("404: not found"), "is damaged"),
    "gone": (lambda p: p.unlink(), "is not there"),
    "a bit in a tensor": (lambda p: flip(p, largest_tensor(p)), "is damaged (in 'archive/data"),
    "no model": (lambda p: torch.save({"iteration": 7}, p), "holds no model"),
}


def flip(path, at, mask=1):
    content = bytearray(path.read_bytes())
    content[at] ^= mask
    path.write_bytes(content)


def largest_tensor(path):
    """An offset inside of the longest stretch of numbers."""
    with zipfile.ZipFile(path) as archive:
        info = max(archive.infolist(), key=lambda each: each.file_size)
    return info.header_offset + 200 + info.file_size // 2


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
    assert str(tmp_path / "model_0000003.pth") in warning


def test_the_final_one_is_ordered_by_its_iteration(tmp_path):
    checkpoints(tmp_path, 1, 8, final=4)
    (tmp_path / "last_checkpoint").unlink()
    assert resumed(tmp_path) == 8
    (tmp_path / "model_0000008.pth").unlink()
    assert resumed(tmp_path) == 4


@pytest.mark.parametrize("tagged", [True, False])
def test_nothing_whole_is_an_error_and_no_fresh_start(tmp_path, tagged):
    checkpoints(tmp_path, 1, 3)
    truncate(tmp_path / "model_0000001.pth")
    (tmp_path / "model_0000003.pth").write_bytes(b"")
    if not tagged:
        (tmp_path / "last_checkpoint").unlink()
    with pytest.raises(ValueError, match="no checkpoint is whole") as error:
        resumed(tmp_path)
    for part in (str(tmp_path), "model_0000001.pth is damaged", "is empty", "leave --resume out"):
        assert part in str(error.value)
    for path in tmp_path.glob("*.pth"):
        path.unlink()
    if tagged:
        with pytest.raises(ValueError, match=r"names 'model_0000003\.pth', which is not there"):
            resumed(tmp_path)


def test_an_empty_folder_starts_afresh_and_says_so(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    assert resumed(tmp_path) is None
    assert f"{str(tmp_path)!r} holds no checkpoint: starting afresh" in caplog.text
    (tmp_path / "warm_start.pth").write_bytes(b"weights to start from are no checkpoint of a run")
    assert resumed(tmp_path) is None


def test_the_format_before_torch_1_6_is_read(tmp_path):
    content = {"model": make_detector(seed=5).state_dict(), "iteration": 5}
    path = tmp_path / "model_0000005.pth"
    torch.save(content, path, _use_new_zipfile_serialization=False)
    assert find_damage(path) is None
    assert resumed(tmp_path) == 5
    truncate(path, 0.9)
    assert find_damage(path).startswith("is damaged")


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
        if find_damage(path) is not None:
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


def assert_only(folder, iteration):
    names = {path.name for path in folder.iterdir() if path.name != "filler"}
    assert names == {"last_checkpoint", f"model_{iteration:07d}.pth"}
    assert resumed(folder) == iteration


@pytest.mark.parametrize("share", [0.01, 0.5, 0.9999])
def test_a_write_that_fails_leaves_what_was(tmp_path, share):
    checkpoints(tmp_path, 3)
    size = (tmp_path / "model_0000003.pth").stat().st_size
    checkpointer = HierKDCheckpointer(make_detector(seed=4), str(tmp_path))
    with largest_file(int(size * share)), pytest.raises(OSError, match="File too large") as error:
        checkpointer.save("model_0000004", iteration=4)
    message = str(error.value)
    assert error.value.errno == errno.EFBIG
    intact = f"{str(tmp_path / 'model_0000003.pth')!r}, is intact"
    for part in (str(tmp_path / "model_0000004.pth"), " MB free", intact, "--resume"):
        assert part in message
    assert_only(tmp_path, 3)
    checkpointer.save("model_0000004", iteration=4)  # there is room again
    assert resumed(tmp_path) == 4


def test_the_first_write_that_fails(tmp_path):
    checkpointer = HierKDCheckpointer(make_detector(), str(tmp_path))
    with largest_file(1000), pytest.raises(OSError, match="There was no checkpoint before it"):
        checkpointer.save("model_0000004", iteration=4)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_will_be_full_is_told_in_advance(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    model = make_detector()
    weights = sum(v.nbytes for v in model.parameters())
    for kind, copies in ((torch.optim.SGD, 2), (torch.optim.AdamW, 3)):
        caplog.clear()
        most = 1_000_000 // (copies * weights)
        optimizer = kind(model.parameters(), lr=0.1)
        warn_of_little_space(str(tmp_path), model, optimizer, int(most * 0.8))
        assert caplog.text == ""
        warn_of_little_space(str(tmp_path), model, optimizer, most + 1)
        assert f"{tmp_path}: this run writes {most + 1} checkpoints" in caplog.text
        assert "1.0 MB free" in caplog.text


def test_what_a_killed_run_had_begun_is_removed_by_the_next_save(tmp_path, caplog):
    checkpoints(tmp_path, 3)
    left = [".model_0000009.pth.123.tmp", ".last_checkpoint.123.tmp"]
    for name in left:
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / ".notes.tmp").write_text("not ours")
    assert resumed(tmp_path) == 3  # whoever only reads removes nothing: a run may be writing
    assert all((tmp_path / name).exists() for name in left)
    checkpoints(tmp_path, 5)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {*("model_0000003.pth", "model_0000005.pth", "last_checkpoint", ".notes.tmp")}
    assert all(f"Removed {tmp_path / name}" in caplog.text for name in left)
