"""The tiny CLIP: its loss, its samples, its file, and that it learns."""

import copy
import math
import warnings
from dataclasses import replace
from pathlib import Path

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


def load(path: Path) -> torch.nn.Module:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`torch.jit.load` is deprecated")  # in clip
        return clip_files.import_clip().load(str(path), device="cpu")[0].eval()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "teacher.pt"
    train_tiny_clip(path, SMALL)
    return path


# ------------------------------------------------------------------------------ loss


def slow_loss(logits: torch.Tensor, same: torch.Tensor) -> float:
    """Mean over rows and over columns of -log p, averaged over the positives of each."""
    total = 0.0
    size = len(logits)
    for matrix in (logits, logits.T):
        for i in range(size):
            normaliser = math.log(sum(math.exp(v) for v in matrix[i].tolist()))
            positives = [j for j in range(size) if same[i, j]]
            total += sum(normaliser - float(matrix[i, j]) for j in positives) / len(positives)
    return total / (2 * size)


def test_loss_against_a_slow_reference() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 1, 0, 2, 1])
    same = (labels[:, None] == labels).double()
    value = tiny_clip._multi_positive_loss(logits, same)
    assert float(value) == pytest.approx(slow_loss(logits, same))
    assert float(tiny_clip._multi_positive_loss(logits.T, same)) == pytest.approx(float(value))


def test_pairs_of_one_class_do_not_push_each_other_away() -> None:
    same = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    perfect = 50 * same
    assert float(tiny_clip._multi_positive_loss(perfect, same)) == pytest.approx(
        2 / 3 * math.log(2)
    )
    logits = perfect.clone().requires_grad_()
    tiny_clip._multi_positive_loss(logits, same).backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.zeros(3, 3), atol=1e-6, rtol=0)


# ------------------------------------------------------------------------------ samples


def test_classes_of_a_caption_are_whole_words() -> None:
    hot = tiny_clip._named_classes("a photo of a cat, a bicycle and an airplane.")
    named = {name for name, value in zip(MINIATURE_CLASSES, hot.tolist(), strict=True) if value}
    assert named == {"cat", "bicycle", "airplane"}
    assert not tiny_clip._named_classes("a scar, carts and a keyboard.").any()
    assert tiny_clip._named_classes("an apple").sum() == 1


def test_crops_are_normalised_letterboxed_and_named_after_their_object() -> None:
    samples = tiny_clip._Samples(replace(SMALL, batch_size=64), MiniatureSpec())
    crops, texts, classes = samples.draw(0.0)
    assert crops.shape == (64, 3, 64, 64)
    torch.testing.assert_close(classes.sum(1), torch.ones(64))
    drawn = {name for scene in samples._scenes for name in scene.names}
    for text, row in zip(texts, classes, strict=True):
        name = MINIATURE_CLASSES[int(row.argmax())]
        assert name in text.replace(".", "").split()
        assert name in drawn
    # 0..255 scaled by CLIP's own mean and std lies in [-1.8, 2.2]; bicubic weights overshoot a bit.
    assert -2.2 < float(crops.min()) < -1
    assert 1 < float(crops.max()) < 2.6
    padded = (crops == 0).all(dim=1).flatten(1).float().mean(1)
    assert (padded > 0.02).float().mean() > 0.5
    share = float((samples.draw(1 / 3)[0] != 0).flatten(1).all(1).float().mean())
    assert share == pytest.approx(1 / 3, abs=0.15), "of whole pictures, which have no padding"
    whole, texts, classes = samples.draw(1.0)
    assert not (whole == 0).all(dim=1).flatten(1).all(1).any()
    assert (classes.sum(1) >= 1).all()
    assert classes.sum(1).max() > 1, "captions of whole pictures name several classes"


# ------------------------------------------------------------------------------ the file


def test_a_saved_model_is_the_loaded_one_to_the_bit(tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_tiny_clip(SMALL)
        images = torch.randn(8, 3, 64, 64)
        model.train()
        model.encode_image(images)  # moves the running statistics off their start
    tokens = clip_files.import_clip().tokenize(["a cat", "a photo of two dogs."], context_length=32)
    model.eval()
    before = copy.deepcopy(model)
    save_clip(model, tmp_path / "clip.pt")
    loaded = load(tmp_path / "clip.pt")
    # Parameters in half precision, read back as float32, are the model.
    model.token_embedding.half()
    model.float()
    with torch.no_grad():
        assert torch.equal(loaded.encode_image(images), model.encode_image(images))
        assert torch.equal(loaded.encode_text(tokens), model.encode_text(tokens))
        # Half precision keeps 11 bits.
        for encode, inputs in (("encode_image", images), ("encode_text", tokens)):
            ours = F.normalize(getattr(before, encode)(inputs), dim=1)
            theirs = F.normalize(getattr(loaded, encode)(inputs), dim=1)
            torch.testing.assert_close(theirs, ours, atol=5e-3, rtol=0)


def test_an_interrupted_save_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "clip.pt"
    path.write_bytes(b"old")

    def interrupted(_: object, file: Path) -> None:
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_clip(build_tiny_clip(SMALL), path)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["clip.pt"]


def test_the_teacher_reads_the_file(trained: Path, tmp_path: Path) -> None:
    teacher = CLIPTeacher(str(trained), device="cpu", text_cache_dir=str(tmp_path))
    assert teacher.embed_dim == 64
    texts = teacher.encode_classes(["cat", "umbrella"])
    scene = render_scene(["cat", "cow"], MiniatureSpec(), np.random.default_rng(0))
    image = torch.from_numpy(scene.picture).permute(2, 0, 1)
    regions = teacher.encode_regions([image], [torch.from_numpy(scene.boxes).float()], 1.5)
    for embeddings, rows in ((texts, 2), (regions, len(scene.names))):
        assert embeddings.shape == (rows, 64)
        torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(rows))
    assert teacher.logit_scale == pytest.approx(1 / 0.07, rel=0.1)


# ------------------------------------------------------------------------------ training


def test_one_seed_gives_one_model_and_leaves_the_global_state(
    trained: Path, tmp_path: Path
) -> None:
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    figures = train_tiny_clip(tmp_path / "again.pt", SMALL)
    assert torch.equal(torch.random.get_rng_state(), state)
    train_tiny_clip(tmp_path / "other.pt", replace(SMALL, seed=1))
    ours, again, other = (
        torch.load(path) for path in (trained, tmp_path / "again.pt", tmp_path / "other.pt")
    )
    assert all(torch.equal(ours[key], again[key]) for key in ours)
    assert not torch.equal(ours["text_projection"], other["text_projection"])
    assert figures.keys() == {"seconds", "accuracy", "logit_scale"}


class Colours:
    """Samples that are easy: each class has a colour."""

    NAMES = ("airplane", "cow", "scissors")

    def __init__(self, spec: TinyCLIPSpec, world: MiniatureSpec) -> None:
        self.spec, self.rng = spec, np.random.default_rng(spec.seed)

    def draw(self, windows: float) -> tuple[torch.Tensor, list[str], torch.Tensor]:
        chosen = self.rng.integers(0, 3, self.spec.batch_size)
        texts = [f"a photo of a {self.NAMES[k]}." for k in chosen]
        return self.crops(chosen), texts, torch.stack([tiny_clip._named_classes(t) for t in texts])

    def crops(self, chosen: np.ndarray) -> torch.Tensor:
        side = self.spec.resolution
        noise = torch.from_numpy(self.rng.normal(0, 0.3, (len(chosen), 3, side, side))).float()
        return noise + 2 * torch.eye(3)[torch.from_numpy(chosen)][:, :, None, None]


def test_it_learns_to_name_what_it_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses: list[float] = []
    loss = tiny_clip._multi_positive_loss

    def spy(logits: torch.Tensor, same: torch.Tensor) -> torch.Tensor:
        # What is left when every positive gets its share: log of the number of positives.
        least = same.sum(dim=1).log().mean()
        losses.append(float((loss(logits, same) - least).detach()))
        return loss(logits, same)

    monkeypatch.setattr(tiny_clip, "_Samples", Colours)
    monkeypatch.setattr(tiny_clip, "_multi_positive_loss", spy)
    spec = replace(SMALL, resolution=32, steps=24, batch_size=24)
    figures = train_tiny_clip(tmp_path / "clip.pt", spec)
    assert len(losses) == 24
    assert min(losses) > -1e-4
    assert np.mean(losses[-5:]) < 0.25 * np.mean(losses[:3])
    assert figures["accuracy"] > 0.9, "over the last 2 steps"
    model = load(tmp_path / "clip.pt")
    chosen = np.arange(30) % 3
    with torch.no_grad():
        image = F.normalize(model.encode_image(Colours(spec, MiniatureSpec()).crops(chosen)), dim=1)
        texts = [f"a photo of a {name}." for name in Colours.NAMES]
        text = F.normalize(tiny_clip._encode_texts(model, texts), dim=1)
    assert ((image @ text.T).argmax(1).numpy() == chosen).mean() > 0.9
