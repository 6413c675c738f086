"""The tiny CLIP: its samples, its file, and that it learns."""

import copy
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import clip_files
from hierkd.miniature import clip as tiny_clip
from hierkd.miniature.clip import TinyCLIPSpec, build_tiny_clip, save_clip, train_tiny_clip
from hierkd.miniature.world import MINIATURE_CLASSES, MiniatureSpec, render_scene
from hierkd.teachers.clip import CLIPTeacher

SMALL = TinyCLIPSpec(vision_width=8, text_layers=1, scenes=8, steps=2, batch_size=6)
WORLD = MiniatureSpec()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "teacher.pt"
    train_tiny_clip(path, SMALL, WORLD)
    return path


def test_crops_are_normalised_letterboxed_and_named_after_their_object():
    samples = tiny_clip._Samples(replace(SMALL, batch_size=64), WORLD)
    crops, texts, classes = samples.draw(0.0)
    assert crops.shape == (64, 3, 64, 64)
    torch.testing.assert_close(classes.sum(1), torch.ones(64))
    for text, row in zip(texts, classes, strict=True):
        assert MINIATURE_CLASSES[int(row.argmax())] in text.replace(".", "").split()
    # 0..255 scaled by CLIP's own mean and std lies in [-1.8, 2.2]; bicubic weights overshoot a bit.
    assert -2.2 < float(crops.min()) < -1
    assert 1 < float(crops.max()) < 2.6
    padded = (crops == 0).all(dim=1).flatten(1).float().mean(1)
    assert (padded > 0.02).float().mean() > 0.5
    whole, texts, classes = samples.draw(1.0)
    assert not (whole == 0).all(dim=1).flatten(1).all(1).any()
    assert classes.sum(1).min() >= 1
    assert classes.sum(1).max() > 1, "captions of whole pictures name several classes"


def test_a_saved_model_is_the_loaded_one_to_the_bit(tmp_path):
    torch.manual_seed(0)
    model = build_tiny_clip(SMALL)
    images = torch.randn(8, 3, 64, 64)
    model.train().encode_image(images)  # moves the running statistics off their start
    tokens = clip_files.import_clip().tokenize(["a cat", "a photo of two dogs."], context_length=32)
    before = copy.deepcopy(model.eval())
    save_clip(model, tmp_path / "clip.pt")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`torch.jit.load` is deprecated")  # in clip
        loaded = clip_files.import_clip().load(str(tmp_path / "clip.pt"), device="cpu")[0].eval()
    # Parameters in half precision, read back as float32, are the model.
    model.token_embedding.half()
    model.float()
    with torch.no_grad():
        for encode, inputs in (("encode_image", images), ("encode_text", tokens)):
            theirs = getattr(loaded, encode)(inputs)
            assert torch.equal(theirs, getattr(model, encode)(inputs))
            full = F.normalize(getattr(before, encode)(inputs), dim=1)  # half keeps 11 bits
            torch.testing.assert_close(F.normalize(theirs, dim=1), full, atol=5e-3, rtol=0)


def test_the_teacher_reads_the_file(trained, tmp_path):
    teacher = CLIPTeacher(str(trained), device="cpu", text_cache_dir=str(tmp_path))
    texts = teacher.encode_classes(["cat", "umbrella"])
    scene = render_scene(["cat", "cow"], WORLD, np.random.default_rng(0))
    image = torch.from_numpy(scene.picture).permute(2, 0, 1)
    regions = teacher.encode_regions([image], [torch.from_numpy(scene.boxes).float()], 1.5)
    for embeddings, rows in ((texts, 2), (regions, len(scene.names))):
        assert embeddings.shape == (rows, 64)
        torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(rows))
    assert teacher.logit_scale == pytest.approx(1 / 0.07, rel=0.1)


def test_one_seed_gives_one_model_and_leaves_the_global_state(trained, tmp_path):
    state = torch.random.get_rng_state()
    train_tiny_clip(tmp_path / "again.pt", SMALL, WORLD)
    assert torch.equal(torch.random.get_rng_state(), state)
    ours, again = torch.load(trained), torch.load(tmp_path / "again.pt")
    assert all(torch.equal(ours[key], again[key]) for key in ours)


class Colours:
    """Samples that are easy: each class has a colour."""

    def __init__(self, spec, world):
        self.spec, self.rng = spec, np.random.default_rng(spec.seed)

    def draw(self, windows):
        chosen = self.rng.integers(0, 3, self.spec.batch_size)
        texts = [f"a photo of a {('airplane', 'cow', 'scissors')[k]}." for k in chosen]
        shape = (len(chosen), 3, self.spec.resolution, self.spec.resolution)
        noise = torch.from_numpy(self.rng.normal(0, 0.3, shape)).float()
        crops = noise + 2 * torch.eye(3)[torch.from_numpy(chosen)][:, :, None, None]
        return crops, texts, torch.stack([tiny_clip._named_classes(t) for t in texts])


def test_it_learns_to_name_what_it_sees(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_clip, "_Samples", Colours)
    spec = replace(SMALL, resolution=32, steps=24, batch_size=24)
    figures = train_tiny_clip(tmp_path / "clip.pt", spec, WORLD)
    assert figures.keys() == {"seconds", "accuracy", "logit_scale"}
    assert figures["accuracy"] > 0.9, "over the last 2 steps"
