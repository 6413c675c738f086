"""datasets/extract_text_embeddings.py from the command line, and runs that use its files."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling import build_model

import demo
import tiny_training
from hierkd import __version__
from hierkd.data.splits import COCO_CATEGORIES, SPLITS
from hierkd.load_config import load_config
from hierkd.miniature.world import MINIATURE_CLASSES
from hierkd.teachers import openai_clip
from hierkd.teachers.clip import CLIPTeacher
from hierkd.teachers.texts import PROMPT_ENSEMBLE, load_text_embeddings
from tiny_training import call_main, command_line

SCRIPT = Path(__file__).parents[1] / "datasets" / "extract_text_embeddings.py"
SIZE = tiny_training.EMBED_DIM
COCO = [category.name for category in COCO_CATEGORIES]


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
            status = main([*map(str, arguments), "--output", str(path)])
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
    built_in = extract("--names", "cat", "--weights", clip, "--templates", "ensemble")
    assert built_in.templates == PROMPT_ENSEMBLE


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
        (["--names", "cat", "--verify", "3"], "--verify goes with --from only"),
        (["--names", "cat", "--embed-dim", "3"], "--embed-dim goes with --from only"),
    ],
)
def test_unusable_command_lines(refused, arguments, message):
    assert message in refused(*arguments)


# ---------------------------------------------------------------------------------- made elsewhere


@pytest.fixture
def theirs(clip, tmp_path):
    """An array as others make it, unnormalised in half precision, with COCO's names beside it."""
    rows = 11 * encoded(clip, [f"a {name}" for name in COCO])
    np.save(tmp_path / "theirs.npy", rows.astype(np.float16))
    (tmp_path / "coco.txt").write_text("\n".join(COCO))
    return tmp_path / "theirs.npy"


def swap(path, first, second):
    lines = path.read_text().split("\n")
    lines[first], lines[second] = lines[second], lines[first]
    path.write_text("\n".join(lines))


def test_an_array_is_converted_without_clip(extract, theirs, tmp_path, monkeypatch):
    monkeypatch.setattr(openai_clip, "import_clip", None)
    stored = extract("--from", theirs, "--names", tmp_path / "coco.txt", "--embed-dim", SIZE)
    assert stored.names == tuple(COCO)
    rows = torch.from_numpy(np.load(theirs)).float()
    np.testing.assert_allclose(stored.embeddings, F.normalize(rows, dim=1).numpy(), atol=1e-6)
    assert stored.source == "theirs.npy"
    assert (stored.clip, stored.weights_sha256, stored.templates) == ("", "", ())
    assert stored.background_embedding is None
    assert stored.verified_rows == 0


def test_a_tensor_is_converted_too(extract, theirs, tmp_path):
    torch.save(torch.from_numpy(np.load(theirs)), tmp_path / "theirs.pt")
    torch.save(2 * torch.ones(SIZE), tmp_path / "background.pt")
    stored = extract(
        *("--from", tmp_path / "theirs.pt", "--names", tmp_path / "coco.txt"),
        *("--template", "a {}", "--background-from", tmp_path / "background.pt"),
    )
    assert stored.names == tuple(COCO)
    assert stored.templates == ("a {}",)
    assert stored.background_prompt == "a photo of background."
    assert stored.background_embedding == pytest.approx([SIZE**-0.5] * SIZE)


def test_an_array_is_verified(extract, theirs, clip, tmp_path):
    stored = extract(
        *("--from", theirs, "--names", tmp_path / "coco.txt", "--weights", clip),
        *("--template", "a {}", "--verify", "200"),
    )
    assert stored.verified_rows == 80
    assert stored.clip == "clip.pt"
    assert stored.templates == ("a {}",)
    expected = encoded(clip, ["a photo of background."])[0]
    assert np.array_equal(stored.background_embedding, expected)


def test_verification_names_the_rows_in_a_wrong_order(refused, theirs, clip, tmp_path):
    swap(tmp_path / "coco.txt", 3, 70)
    message = refused(
        *("--from", theirs, "--names", tmp_path / "coco.txt", "--weights", clip),
        *("--template", "a {}", "--verify", "80"),
    )
    assert "theirs.npy: the names are in another order than the rows; 2 of 80" in message
    assert f"row 3 ({COCO[70]!r})" in message
    assert f"row 70 ({COCO[3]!r})" in message


@pytest.mark.parametrize(
    ("names", "difference"),
    [
        (COCO, "row 0 is 'airplane' instead of 'person'"),
        ([category.name for category in SPLITS["48_17"].novel], "row 2 is 'cake' instead of 'cat'"),
    ],
)
def test_cocos_names_in_another_order(extract, refused, tmp_path, names, difference):
    np.save(tmp_path / "theirs.npy", np.random.default_rng(0).normal(size=(len(names), 4)))
    (tmp_path / "names.txt").write_text("\n".join(sorted(names)))
    arguments = ("--from", tmp_path / "theirs.npy", "--names", tmp_path / "names.txt")
    message = refused(*arguments)
    assert f"{tmp_path}/names.txt: the names of COCO's" in message
    assert difference in message
    assert extract(*arguments, "--trust-order").names == tuple(sorted(names))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda rows: rows[:79], "theirs.npy has 79 rows, but {names} has 80 names"),
        (lambda rows: rows[:, :9], f"theirs.npy: embeddings of size 9, expected {SIZE}"),
        (lambda rows: rows.astype(object), "a file with pickled objects is refused"),
    ],
)
def test_unusable_arrays(refused, theirs, tmp_path, spoil, message):
    np.save(theirs, spoil(np.load(theirs)), allow_pickle=True)
    names = tmp_path / "coco.txt"
    found = refused("--from", theirs, "--names", names, "--embed-dim", SIZE)
    assert message.format(names=names) in found
    assert str(theirs) in found


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


def test_the_demo_takes_its_vocabulary_from_the_file(world, extract, clip, tmp_path, capsys):
    extract("--names", "miniature_ovd_val_all", "traffic cone", "--weights", clip)
    pairs = without_distillation(tmp_path / "out.safetensors")
    arguments = command_line(tmp_path / "run", tmp_path / "gone.pt", *pairs)[2:]
    cfg = load_config(tiny_training.CONFIG, arguments)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "model_final.pth")
    call = ["--config-file", str(tmp_path / "config.yaml"), "--output", str(tmp_path / "found")]
    call += ["--input", str(world / "miniature" / "val" / "1.png"), "--vocabulary"]
    with tiny_training.own_log_handlers():
        demo.main([*call, "traffic cone,cat"])
        content = json.loads((tmp_path / "found" / "detections.json").read_text())
        assert content["vocabulary"] == ["traffic cone", "cat"]
        with pytest.raises(SystemExit):
            demo.main([*call, "traffic cone,submarine"])
    assert "out.safetensors: no embedding of 'submarine'" in capsys.readouterr().err
