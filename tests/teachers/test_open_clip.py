"""open_clip's models as teachers, against its own preprocessing, tokeniser and loading."""

import hashlib
import json
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import clip_files
from hierkd.teachers import open_clip as open_clip_models
from hierkd.teachers import openai_clip
from hierkd.teachers.clip import CLIPTeacher, known_weights_sha256
from open_clip_files import PIXELS, TINY, write_folder

open_clip = pytest.importorskip("open_clip", reason="open_clip_torch is not installed")

BOXES = torch.tensor([[5.0, 5.0, 40.0, 60.0], [10.0, 0.0, 80.0, 30.0], [0.0, 0.0, 90.0, 70.0]])
# Changes of the config that give models of other classes.
KINDS = {
    "clip": {},
    "quickgelu": {"quick_gelu": True},
    "text tower": {"custom_text": True},
    "resnet": {"vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16}},
    "timm": {
        "custom_text": True,
        "vision_cfg": {
            "image_size": 64,
            "timm_model_name": "resnet18",
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "timm_proj": "linear",
        },
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def make_teacher(folder, tmp_path):
    def make(weights=None, **arguments):
        arguments = {"device": "cpu", "text_cache_dir": str(tmp_path / "cache"), **arguments}
        return CLIPTeacher(weights or f"open_clip:{folder}", **arguments)

    return make


@pytest.fixture
def tiny_architecture(tmp_path, monkeypatch):
    """Make "tiny" an architecture that open_clip knows, as its users do."""
    factory = open_clip.factory
    monkeypatch.setattr(factory, "_MODEL_CONFIGS", dict(factory._MODEL_CONFIGS))
    monkeypatch.setattr(factory, "_MODEL_CONFIG_PATHS", list(factory._MODEL_CONFIG_PATHS))
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(tmp_path / "tiny.json")


@pytest.fixture
def publish(tiny_architecture, monkeypatch):
    """Give "tiny" the published weights "web"."""

    def add(**changes):
        entry = {"hf_hub": "org/tiny/", **PIXELS, **changes}
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny", {"web": entry})

    return add


def theirs(folder):
    """The model, preprocessing and tokeniser as open_clip itself makes them."""
    name = f"local-dir:{folder}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    return model.eval(), preprocess, open_clip.get_tokenizer(name)


def smooth_image(height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 6, 6, generator=generator) * 255
    return F.interpolate(coarse, (height, width), mode="bilinear")[0].round().to(torch.uint8)


def seen_crops(teacher, *arguments):
    """What the image encoder gets."""
    crops = []
    hook = teacher._clip("a test").model.visual.register_forward_pre_hook(
        lambda _, inputs: crops.append(inputs[0])
    )
    teacher.encode_regions(*arguments)
    hook.remove()
    return torch.cat(crops)


# --- embeddings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_regions_and_texts_equal_open_clips_own(make_teacher, tmp_path, kind):
    folder = write_folder(tmp_path / kind, **KINDS[kind])
    model, preprocess, tokenizer = theirs(folder)
    image, texts = smooth_image(96, 96), ["a dog", "two cats on a sofa"]
    with torch.no_grad():
        picture = preprocess(Image.fromarray(image.permute(1, 2, 0).numpy()))[None]
        region = model.encode_image(picture, normalize=True)
        expected = model.encode_text(tokenizer(texts), normalize=True)
    teacher = make_teacher(f"open_clip:{folder}")
    box = torch.tensor([[0.0, 0.0, 96.0, 96.0]])
    found = teacher.encode_regions([image], [box], 1.0)
    torch.testing.assert_close(found, region, atol=3e-3, rtol=0)
    other = teacher.encode_regions([image.flip(0)], [box], 1.0)
    # so that the tolerance above means something
    assert (other - region).abs().max() > 10 * (found - region).abs().max()
    torch.testing.assert_close(teacher.encode_captions(texts), expected, atol=1e-5, rtol=0)
    assert teacher.embed_dim == 16 == found.shape[1]
    assert teacher.logit_scale == pytest.approx(1 / 0.07, rel=1e-4)


def test_one_file_is_another_teacher_with_another_activation(make_teacher, tmp_path):
    plain, quick = write_folder(tmp_path / "a"), write_folder(tmp_path / "b", quick_gelu=True)
    digests = [
        hashlib.sha256((each / "open_clip_model.safetensors").read_bytes()).hexdigest()
        for each in (plain, quick)
    ]
    assert digests[0] == digests[1]
    first, second = make_teacher(f"open_clip:{plain}"), make_teacher(f"open_clip:{quick}")
    assert first.weights_digest != second.weights_digest
    assert not torch.allclose(first.encode_captions(["a cat"]), second.encode_captions(["a cat"]))


def test_a_folders_tokeniser_is_part_of_the_teacher(tmp_path):
    """With other tokens, texts have other embeddings: those of before must not be reused."""
    text = {**TINY["text_cfg"], "hf_tokenizer_name": "org/tokens"}
    own, plain = write_folder(tmp_path / "own", text_cfg=text), write_folder(tmp_path / "plain")
    for folder in (own, plain):
        (folder / "tokenizer.json").write_text('{"cat": 1, "dog": 2}')
    before = [known_weights_sha256(f"open_clip:{each}") for each in (own, plain)]
    for folder in (own, plain):
        (folder / "README.md").write_text("a model")
    assert [known_weights_sha256(f"open_clip:{each}") for each in (own, plain)] == before
    for folder in (own, plain):
        (folder / "tokenizer.json").write_text('{"cat": 2, "dog": 1}')
    changed = known_weights_sha256(f"open_clip:{own}")
    assert changed not in before
    assert open_clip_models.OpenCLIPFiles(f"open_clip:{own}").digest == changed
    (own / "merges.txt").write_text("c at")
    assert known_weights_sha256(f"open_clip:{own}") not in {*before, changed}
    # open_clip takes its own tokeniser for the other
    assert known_weights_sha256(f"open_clip:{plain}") == before[1]


# --- names ----------------------------------------------------------------------------------------


def test_openais_sizes_are_those_that_open_clip_has_written_down():
    assert list(openai_clip.OPENAI_MODELS) == clip_files.import_clip().available_models()
    for name, size in openai_clip.OPENAI_MODELS.items():
        config = open_clip.get_model_config(name.replace("/", "-").replace("@336px", "-336"))
        assert config["embed_dim"] == size


def test_a_file_for_a_known_architecture(make_teacher, folder, tiny_architecture, tmp_path):
    model, _, tokenizer = theirs(folder)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "mine.pt")
    teacher = make_teacher(f"open_clip:tiny:{tmp_path / 'mine.pt'}")
    with torch.no_grad():
        expected = model.encode_text(tokenizer(["a cat"]), normalize=True)
    torch.testing.assert_close(teacher.encode_captions(["a cat"]), expected, atol=1e-5, rtol=0)
    assert teacher.title == "open_clip:tiny:mine.pt"  # no folder of this machine
    crops = seen_crops(teacher, [torch.full((3, 80, 90), 255.0)], [BOXES[:1]], 1.0)
    mean, std = openai_clip.CLIP_MEAN, openai_clip.CLIP_STD  # nothing else is published
    for channel in range(3):
        assert crops[0, channel].max() == pytest.approx(
            (1 - mean[channel]) / std[channel], abs=1e-4
        )


def test_a_file_has_the_pixel_statistics_of_its_architecture(make_teacher, folder, publish):
    publish()
    weights = f"open_clip:tiny:{folder / 'open_clip_model.safetensors'}"
    assert make_teacher(weights)._clip("a test").pixel_mean == tuple(PIXELS["mean"])
    entries = open_clip.pretrained._PRETRAINED["tiny"]
    entries["other"] = {**entries["web"], "mean": [0.1, 0.1, 0.1]}
    with pytest.raises(ValueError, match=r"different pixel statistics.*0\.1, 0\.1.*preprocess_cfg"):
        make_teacher(weights)


def put_into_hub_cache(root, content, name):
    """As the hub's client keeps a file: named by its hash, and linked to."""
    repository = root / "models--org--tiny"
    digest = hashlib.sha256(content).hexdigest()
    for part in ("refs", "blobs", "snapshots/abc"):
        (repository / part).mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "blobs" / digest).write_bytes(content)
    (repository / "snapshots" / "abc" / name).symlink_to(Path("../../blobs") / digest)


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_published_weights_in_the_cache_need_no_network(
    make_teacher, publish, tmp_path, monkeypatch, name
):
    publish()
    monkeypatch.setattr(open_clip, "download_pretrained", None)
    folder = write_folder(tmp_path / "tiny", name=name)
    root = tmp_path / "hub"
    put_into_hub_cache(root, (folder / name).read_bytes(), name)
    teacher = make_teacher("open_clip:tiny:web", download_root=str(root))
    expected = make_teacher(f"open_clip:{folder}").encode_captions(["a cat"])
    assert torch.equal(teacher.encode_captions(["a cat"]), expected)
    known = known_weights_sha256("open_clip:tiny:web", str(root))
    assert known == teacher.weights_digest


def test_published_weights_without_network(make_teacher, publish, tmp_path, monkeypatch):
    publish()
    asked = []

    def no_network(entry, cache_dir):
        asked.append((entry["hf_hub"], cache_dir))
        raise RuntimeError("no route to host")  # the hub's client has errors of its own

    monkeypatch.setattr(open_clip, "download_pretrained", no_network)
    assert known_weights_sha256("open_clip:tiny:web", str(tmp_path)) is None
    assert asked == []
    with pytest.raises(FileNotFoundError) as error:
        make_teacher("open_clip:tiny:web", download_root=str(tmp_path))
    assert asked == [("org/tiny/", str(tmp_path))]
    for part in ("open_clip:tiny:web", "no route to host", "huggingface.co/org/tiny", "tiny:FILE"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ("open_clip:", ValueError, "expected open_clip:MODEL:TAG, open_clip:MODEL:FILE or"),
        ("open_clip:hf-hub:org/tiny", ValueError, "expected open_clip:MODEL:TAG"),
        ("open_clip:ViT-B-17:x", FileNotFoundError, "none of .*ViT-L-14"),
        ("open_clip:ViT-B-16", FileNotFoundError, r"no weights; .*tags of ViT-B-16 are.*laion2b"),
        ("open_clip:ViT-B-16:lion", FileNotFoundError, r"'lion' is neither a file nor a tag of"),
        ("open_clip:/no/where", FileNotFoundError, "'/no/where' is none of .*open_clip:FOLDER"),
        ("open_clip:ViT-B-32:openai", ValueError, "name them open_clip:ViT-B-32-quickgelu:openai"),
        ("openclip:ViT-B-16:x", FileNotFoundError, "nor does it begin with 'open_clip:'"),
    ],
)
def test_wrong_names(make_teacher, weights, error, message):
    with pytest.raises(error, match=message) as caught:
        make_teacher(weights)
    assert f"MODEL.TEACHER.WEIGHTS: {weights!r}" in str(caught.value)


def test_without_the_package(make_teacher, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    for weights in (f"open_clip:{folder}", "open_clip:ViT-B-16:laion2b_s34b_b88k"):
        assert known_weights_sha256(weights) is None
        with pytest.raises(FileNotFoundError, match=r"pip install open_clip_torch"):
            make_teacher(weights)


# --- files ----------------------------------------------------------------------------------------


def spoil_folder(change):
    """Change a copy of the folder's config."""

    def spoil(folder):
        path = folder / "open_clip_config.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return spoil


def torchscript(folder):
    (folder / "open_clip_model.safetensors").unlink()
    with zipfile.ZipFile(folder / "open_clip_pytorch_model.bin", "w") as archive:
        archive.writestr("a/constants.pkl", b"")


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda f: (f / "open_clip_config.json").unlink(), FileNotFoundError, "needs open_clip_c"),
        (lambda f: (f / "open_clip_config.json").write_text("{"), ValueError, "is no config of an"),
        (spoil_folder(lambda c: c.pop("model_cfg")), ValueError, "KeyError: 'model_cfg'"),
        (spoil_folder(lambda c: c["model_cfg"].update(embed_dim="x")), ValueError, "no config of"),
        (
            spoil_folder(lambda c: c["preprocess_cfg"].update(mean=[1])),
            ValueError,
            "is no config of an open_clip model",
        ),
        (
            spoil_folder(lambda c: c["model_cfg"]["text_cfg"].update(unheard=1)),
            ValueError,
            "open_clip:tiny cannot be built: TypeError",
        ),
        (
            spoil_folder(lambda c: c["model_cfg"].update(embed_dim=24)),
            ValueError,
            r"model\.safetensors does not fit open_clip:tiny",
        ),
        (
            lambda f: (f / "open_clip_model.safetensors").write_bytes(b"no weights at all"),
            ValueError,
            r"open_clip_model\.safetensors does not fit",
        ),
        (lambda f: (f / "open_clip_model.safetensors").unlink(), FileNotFoundError, "needs open_c"),
        (torchscript, ValueError, r"open_clip_pytorch_model\.bin' cannot be read as tensors"),
    ],
)
def test_a_folder_that_holds_something_else(make_teacher, tmp_path, spoil, error, message):
    folder = write_folder(tmp_path / "tiny")
    spoil(folder)
    with pytest.raises(error, match=message):
        make_teacher(f"open_clip:{folder}").encode_captions(["a cat"])


@pytest.mark.parametrize("option", ["trust_remote_code", "reduction_mask"])
def test_options_that_would_run_code_or_draw_at_random(make_teacher, tmp_path, option):
    folder = write_folder(tmp_path / "tiny")
    text = {**TINY["text_cfg"], "tokenizer_kwargs": {option: "random"}}
    spoil_folder(lambda c: c["model_cfg"].update(text_cfg=text))(folder)
    with pytest.raises(ValueError, match=rf"tokenizer_kwargs \['{option}'\]: only .*clean"):
        make_teacher(f"open_clip:{folder}")
