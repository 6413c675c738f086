"""Teachers other than the default through the commands: what works, and what is refused by name."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

import open_clip_files
import tiny_training
import train_net
from hierkd.load_config import load_config
from hierkd.miniature.clip import TinyCLIPSpec, build_tiny_clip, save_clip
from hierkd.teachers.clip import CLIPTeacher
from hierkd.teachers.openai_clip import OPENAI_MODELS
from hierkd.teachers.texts import read_templates
from tiny_training import call_main, command_line

ROOT = Path(__file__).resolve().parents[1]
ENSEMBLE = ROOT / "datasets" / "prompts" / "ensemble.txt"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A world, an OpenAI CLIP, and a text cache of its own for all tests of this module."""
    with tiny_training.prepared(tmp_path_factory.mktemp("teachers")) as root:
        yield root


@pytest.fixture(scope="module")
def open_clip(folder):
    """The name of an open_clip model with embeddings of another size than the OpenAI CLIP's."""
    return f"open_clip:{open_clip_files.write_folder(folder / 'tiny', embed_dim=24)}"


def with_teacher(teacher, *extra):
    """Put flags first and the pairs that name the 24-dimensional teacher before the others."""
    flags = [each for each in extra if each.startswith("--")]
    keys = ("MODEL.TEACHER.WEIGHTS", teacher, "MODEL.TEXT_CLASSIFIER.EMBED_DIM", "24")
    return [*flags, *keys, *extra[len(flags) :]]


@pytest.fixture(scope="module")
def trained(folder, open_clip):
    """The folder of a training with the other teacher."""
    pairs = with_teacher(open_clip, "MODEL.IKD.IOU_THRESH", "0.0")
    call_main(command_line(folder / "run", folder / "x", *pairs))
    return folder / "run"


@pytest.fixture
def refused(folder, tmp_path, monkeypatch):
    """The message of the error that comes instead of a first step."""

    def _refused(*extra, error=ValueError):
        def run_step(self):
            pytest.fail("training started")

        monkeypatch.setattr(train_net.Trainer, "run_step", run_step)
        with pytest.raises(error) as caught:
            call_main(command_line(tmp_path / "refused", folder / "clip.pt", *extra))
        return str(caught.value)

    return _refused


# ------------------------------------------------------------------------------- with open_clip


def test_training_with_both_distillations(trained):
    lines = map(json.loads, (trained / "metrics.json").read_text().splitlines())
    last = [line for line in lines if "loss_cls" in line][-1]
    for loss in ("loss_ikd", "loss_gkd_image", "loss_gkd_caption"):
        assert last[loss] > 0
    weights = torch.load(trained / "model_final.pth", weights_only=True)["model"]
    assert weights["text_classifier.background_embedding"].shape == (24,)
    assert not any("teacher" in name or "visual" in name for name in weights)


def test_evaluation_finds_all_texts_in_the_cache(folder, open_clip, trained, monkeypatch):
    def refuse(self):
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr(CLIPTeacher, "_clip", refuse)
    extra = ("--eval-only", "MODEL.WEIGHTS", str(trained / "model_final.pth"))
    pairs = with_teacher(open_clip, *extra)
    figures = call_main(command_line(folder / "evaluation", folder / "x", *pairs))
    assert figures["miniature_ovd_val_all"]["bbox"]["base/AP50"] > 0


def test_the_example_of_the_page_gives_the_same_teacher_twice(tmp_path, monkeypatch):
    """The miniature's CLIP, read by OpenAI's package and by open_clip."""
    pytest.importorskip("open_clip", reason="open_clip_torch is not installed")
    page = (ROOT / "docs" / "teachers.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    theirs = tmp_path / "datasets" / "miniature" / "teacher.pt"
    theirs.parent.mkdir(parents=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_clip(build_tiny_clip(TinyCLIPSpec()), theirs)
    exec(compile(code, "docs/teachers.md", "exec"), {})
    folder = tmp_path / "output" / "open_clip_teacher"
    first, second = (
        CLIPTeacher(str(name), device="cpu") for name in (theirs, f"open_clip:{folder}")
    )
    assert first.weights_digest != second.weights_digest
    texts = ["a photo of a cat.", "two dogs " * 40]
    found = second.encode_captions(texts)
    torch.testing.assert_close(found, first.encode_captions(texts), atol=1e-5, rtol=0)
    generator = torch.Generator().manual_seed(0)
    picture = (torch.rand(1, 3, 5, 7, generator=generator) * 255).repeat_interleave(20, 2)
    boxes = torch.tensor([[3.0, 4.0, 6.0, 60.0], [0.0, 0.0, 7.0, 90.0]])
    regions = second.encode_regions([picture[0]], [boxes], 1.5)
    expected = first.encode_regions([picture[0]], [boxes], 1.5)
    torch.testing.assert_close(regions, expected, atol=1e-5, rtol=0)


# -------------------------------------------------------------------------------------- mismatches


@pytest.mark.parametrize("name", ["RN50", "ViT-L/14", "ViT-L/14@336px"])
def test_another_width_of_a_published_model_is_known_before_the_download(refused, name):
    size = OPENAI_MODELS[name]
    message = refused("MODEL.TEACHER.WEIGHTS", name, "MODEL.TEXT_CLASSIFIER.EMBED_DIM", "512")
    assert "MODEL.TEXT_CLASSIFIER.EMBED_DIM is 512" in message
    assert f"set MODEL.TEXT_CLASSIFIER.EMBED_DIM to {size}, or MODEL.TEACHER.WEIGHTS" in message


@pytest.mark.parametrize("flags", [(), ("--eval-only",)])
def test_a_checkpoint_of_another_width(refused, trained, flags):
    message = refused(*flags, "MODEL.WEIGHTS", str(trained / "model_final.pth"))
    assert "model_final.pth: its embeddings have 24 dimensions, this detector's 16" in message
    assert "MODEL.TEACHER.WEIGHTS" in message


def test_a_checkpoint_of_another_teacher_of_the_same_width(refused, trained, tmp_path):
    name = open_clip_files.write_folder(tmp_path / "same_width", embed_dim=24, seed=5)
    weights = str(trained / "model_final.pth")
    flags_and_keys = with_teacher(f"open_clip:{name}", "--eval-only", "MODEL.WEIGHTS", weights)
    message = refused(*flags_and_keys)
    assert f"MODEL.WEIGHTS: {weights!r} was trained with another CLIP" in message
    assert "config.yaml beside it" in message


def test_every_config_names_the_width_of_its_teacher():
    files = [p for p in (ROOT / "configs").rglob("*.yaml") if "miniature" not in p.parts]
    named = {}
    for path in files:
        cfg = load_config(str(path), ["MODEL.DEVICE", "cpu"])
        named[cfg.MODEL.TEACHER.WEIGHTS] = cfg.MODEL.TEXT_CLASSIFIER.EMBED_DIM
    others = [name for name in named if name not in OPENAI_MODELS]
    for name in set(named) - set(others):
        assert named[name] == OPENAI_MODELS[name]
    assert {"ViT-B/32", "ViT-L/14"} <= set(named)
    assert len(others) == 1
    package = pytest.importorskip("open_clip", reason="open_clip_torch is not installed")
    _, model, tag = others[0].split(":")
    assert package.get_model_config(model)["embed_dim"] == named[others[0]]
    assert package.is_pretrained_cfg(model, tag)


# --------------------------------------------------------------------------------- prompts by file


def test_the_shipped_ensemble_is_read():
    assert len(read_templates(ENSEMBLE)) == 7


def test_a_run_writes_down_the_templates_not_the_file(folder, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("# two\n\na {}.\n  the {} there  \n")
    keys = ("MODEL.TEXT_CLASSIFIER.TEMPLATES_FILE", str(prompts), "SOLVER.MAX_ITER", "1")
    call_main(command_line(tmp_path / "run", folder / "clip.pt", *keys))
    written = tmp_path / "run" / "config.yaml"
    text = yaml.safe_load(written.read_text())["MODEL"]["TEXT_CLASSIFIER"]
    assert text["TEMPLATES"] == ["a {}.", "the {} there"]
    assert text["TEMPLATES_FILE"] == ""
    prompts.unlink()
    assert list(load_config(str(written)).MODEL.TEXT_CLASSIFIER.TEMPLATES) == text["TEMPLATES"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"no file .*prompts\.txt.* \(looked from .*one prompt template a line"),
        ("", r"prompts\.txt: no templates"),
        ("# only this\n\n", r"prompts\.txt: no templates"),
        ("a {}\na photo\n", r"prompts\.txt, line 2: expected one {}.*'a photo'"),
        ("\n{} and {}\n", r"prompts\.txt, line 2: expected one {}.*'{} and {}'"),
        (b"a {}\n\xff\xfe\n", r"prompts\.txt: cannot be read as text"),
    ],
)
def test_unusable_files_of_templates(refused, tmp_path, content, message):
    prompts = tmp_path / "prompts.txt"
    if content is not None:
        prompts.write_bytes(content if isinstance(content, bytes) else content.encode())
    error = FileNotFoundError if content is None else ValueError
    found = refused("MODEL.TEXT_CLASSIFIER.TEMPLATES_FILE", str(prompts), error=error)
    assert re.search(message, found)
    assert "MODEL.TEXT_CLASSIFIER.TEMPLATES" in found


def test_templates_from_two_places(refused):
    keys = ("MODEL.TEXT_CLASSIFIER.TEMPLATES", "('a {}',)")
    message = refused(*keys, "MODEL.TEXT_CLASSIFIER.TEMPLATES_FILE", str(ENSEMBLE))
    assert "TEMPLATES_FILE and TEMPLATES are both set" in message
