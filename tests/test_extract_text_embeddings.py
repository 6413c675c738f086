"""datasets/extract_text_embeddings.py from the command line, and runs that use its files."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny_training
from hierkd import __version__
from hierkd.miniature.world import MINIATURE_CLASSES
from hierkd.teachers.clip import CLIPTeacher
from hierkd.teachers.texts import load_text_embeddings
from log_handlers import exit_status
from tiny_training import call_main, command_line

SCRIPT = Path(__file__).parents[1] / "datasets" / "extract_text_embeddings.py"
SIZE = tiny_training.EMBED_DIM


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A CLIP file, and a text cache of its own for all tests of this module."""
    folder = tmp_path_factory.mktemp("clip")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HIERKD_CACHE", str(folder / "cache"))
        patch.setenv("PYTHONHASHSEED", "0")  # detectron2 sets it; undone with the rest
        yield tiny_training.write_clip(folder / "clip.pt")


@pytest.fixture
def extract(tmp_path):
    """Run the script; return what it wrote."""

    def _extract(*arguments, output="out.safetensors"):
        path = tmp_path / output
        main = runpy.run_path(str(SCRIPT))["main"]
        with tiny_training.own_log_handlers():
            status = exit_status(main, *arguments, "--output", path)
        if status == 0:
            return load_text_embeddings(path)
        assert not list(path.parent.glob("*.safetensors"))
        return None

    return _extract


@pytest.fixture
def refused(extract, capsys):
    """Run the script, which has to fail; return its message."""

    def _refused(*arguments, **options):
        assert extract(*arguments, **options) is None
        message = capsys.readouterr().err
        assert "Traceback" not in message
        return message

    return _refused


def encoded(clip, texts):
    teacher = CLIPTeacher(str(clip), device="cpu")
    return teacher.encode_captions(texts).numpy()


# ------------------------------------------------------------------------------------ made by CLIP


def test_one_template(extract, clip, capsys):
    stored = extract("--names", "cat, traffic cone", "--weights", clip, "--template", "the {}!")
    assert stored.names == ("cat", "traffic cone")
    assert np.array_equal(stored.embeddings, encoded(clip, ["the cat!", "the traffic cone!"]))
    assert stored.templates == ("the {}!",)
    assert stored.clip == "clip.pt"  # no folder of this machine
    assert stored.weights_sha256 == CLIPTeacher(str(clip), device="cpu").weights_digest
    assert stored.version == __version__
    assert stored.background_prompt == "a photo of background."
    assert np.array_equal(stored.background_embedding, encoded(clip, ["a photo of background."])[0])
    assert f"2 names, D = {SIZE}" in capsys.readouterr().out


def test_ensembles(extract, clip, tmp_path):
    (tmp_path / "prompts.txt").write_text("a {}\nthe {} there\n")
    mine = extract("--names", "cat", "--weights", clip, "--templates", tmp_path / "prompts.txt")
    assert mine.templates == ("a {}", "the {} there")
    mean = encoded(clip, ["a cat", "the cat there"]).mean(axis=0)
    assert mine.embeddings[0] == pytest.approx(mean / np.linalg.norm(mean), abs=1e-6)


def test_names_from_everywhere_count_once(extract, clip, tmp_path):
    (tmp_path / "names.json").write_text('["zebra", "cat"]')
    (tmp_path / "names.txt").write_text("cat\nhot air balloon\n")
    stored = extract(
        *("--names", tmp_path / "names.json", tmp_path / "names.txt", "yak"),
        *("miniature_ovd_val_all", "--weights", clip),
    )
    assert stored.names[:4] == ("zebra", "cat", "hot air balloon", "yak")
    assert set(stored.names[4:]) == {*MINIATURE_CLASSES} - {"cat"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--names", "cat,cat"], "repeats 'cat'"),
        (["--names", "gone.txt"], "no file 'gone.txt'"),
        (["--names", "cat", "--template", "a cat"], "--template: expected one {}"),
        (["--names", "cat", "--templates", "gone.txt"], "no file 'gone.txt'"),
        (["--names", "cat", "--weights", "ViT-X/7"], "'ViT-X/7' is neither an existing file nor"),
        (["--names", "cat", "--config-file", "gone.yaml"], "no file 'gone.yaml'"),
    ],
)
def test_unusable_command_lines(refused, arguments, message):
    assert message in refused(*arguments)


# ---------------------------------------------------------------------------- runs with such a file


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    tiny_training.write_world(root)
    with tiny_training.miniature_at(root):
        yield root


def without_distillation(path, *extra):
    return (
        *extra,
        *("MODEL.TEXT_CLASSIFIER.EMBEDDINGS", str(path), "SOLVER.MAX_ITER", "1"),
        *("MODEL.IKD.LOSS_WEIGHT", "0.0", "MODEL.GKD.LOSS_WEIGHT", "0.0"),
    )


def test_training_and_evaluation_without_clip(world, extract, clip, tmp_path, monkeypatch):
    extract("--names", "miniature_ovd_val_all", "--weights", clip)
    pairs = without_distillation("")
    call_main(command_line(tmp_path / "with", clip, *pairs))
    weights = ("MODEL.WEIGHTS", str(tmp_path / "with" / "model_final.pth"))
    expected = call_main(command_line(tmp_path / "a", clip, "--eval-only", *pairs, *weights))

    monkeypatch.setenv("HIERKD_CACHE", str(tmp_path / "cold"))
    gone, pairs = tmp_path / "gone.pt", without_distillation(tmp_path / "out.safetensors")
    call_main(command_line(tmp_path / "without", gone, *pairs))
    figures = call_main(command_line(tmp_path / "b", gone, "--eval-only", *pairs, *weights))
    assert json.dumps(figures) == json.dumps(expected)
    assert not list((tmp_path / "cold").rglob("*.sqlite"))
    with_clip, without_clip = (
        torch.load(tmp_path / name / "model_final.pth", weights_only=True)["model"]
        for name in ("with", "without")
    )
    assert with_clip.keys() == without_clip.keys()
    assert all(torch.equal(with_clip[key], without_clip[key]) for key in with_clip)
