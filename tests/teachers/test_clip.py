import hashlib
import logging
import urllib.error
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import clip_files
from hierkd.teachers import clip as teacher_module
from hierkd.teachers import openai_clip
from hierkd.teachers.clip import CLIPTeacher, build_teacher
from hierkd.teachers.texts import make_text_embeddings, save_text_embeddings


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "tiny.pt"
    return clip_files.write_state_dict(path, clip_files.random_clip())


@pytest.fixture
def make_teacher(weights, tmp_path):
    def make(path=weights, **arguments):
        arguments = {"device": "cpu", "text_cache_dir": str(tmp_path / "cache"), **arguments}
        return CLIPTeacher(str(path), **arguments)

    return make


@pytest.fixture
def no_clip(monkeypatch):
    def refuse(*_):
        raise AssertionError("CLIP was loaded")

    return lambda: monkeypatch.setattr(openai_clip, "_build", refuse)


def smooth_image(height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 6, 6, generator=generator) * 255
    return F.interpolate(coarse, (height, width), mode="bilinear")[0].round().to(torch.uint8)


def released_clip(path):
    """The model as clip itself loads it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return clip_files.import_clip().load(str(path), device="cpu")


BOXES = torch.tensor([[5.0, 5.0, 40.0, 60.0], [10.0, 0.0, 80.0, 30.0], [0.0, 0.0, 90.0, 70.0]])


# --- regions --------------------------------------------------------------------------------------


def test_whole_square_image_equals_clips_own_preprocessing(make_teacher, weights):
    image = smooth_image(96, 96)
    model, preprocess = released_clip(weights)
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    with torch.no_grad():
        expected = F.normalize(model.encode_image(preprocess(picture)[None]), dim=-1)
    box = torch.tensor([[0.0, 0.0, 96.0, 96.0]])
    found = make_teacher().encode_regions([image], [box], 1.0)
    torch.testing.assert_close(found, expected, atol=3e-3, rtol=0)
    other = make_teacher().encode_regions([image.flip(0)], [box], 1.0)
    assert (other - expected).abs().max() > 3e-2  # so that the tolerance above means something


def test_embeddings_made_in_inference_mode_serve_in_a_loss(make_teacher):
    teacher = make_teacher()
    with torch.inference_mode():  # the model and the cache are filled here
        teacher.encode_captions(["a dog"])
        teacher.encode_regions([smooth_image(70, 90)], [BOXES], 1.5)
    regions = teacher.encode_regions([smooth_image(70, 90)], [BOXES], 1.5)
    texts = teacher.encode_captions(["a dog"])
    student = torch.ones(3, 16, requires_grad=True)
    ((student * regions).sum() + (student @ texts.T).sum()).backward()
    torch.testing.assert_close(student.grad, regions + texts)


@pytest.mark.parametrize("shape", ["tiny_vit", "tiny_resnet"])
def test_the_faster_encoder_computes_what_the_released_one_does(make_teacher, tmp_path, shape):
    clip = clip_files.random_clip(shape)
    for part in clip.visual.modules():
        if isinstance(part, nn.BatchNorm2d):  # else folding one that does nothing
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.uniform_(part.running_mean, -0.1, 0.1)
            nn.init.uniform_(part.running_var, 0.5, 2.0)
    path = clip_files.write_state_dict(tmp_path / "other.pt", clip)
    seen = []
    teacher = make_teacher(path)
    teacher._clip("a test").model.visual.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0])
    )
    found = teacher.encode_regions([smooth_image(70, 90)], [BOXES], 1.5)
    model, _ = released_clip(path)
    with torch.no_grad():
        expected = F.normalize(model.float().encode_image(seen[0].contiguous()), dim=-1)
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)  # files may be in half precision
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert not any(
        isinstance(part, nn.BatchNorm2d) for part in teacher._clip("a test").model.visual.modules()
    )


def test_bgr_is_rgb_with_the_channels_turned_round(make_teacher):
    image = smooth_image(70, 90)
    rgb = make_teacher().encode_regions([image], [BOXES], 1.5)
    bgr = make_teacher(image_format="BGR").encode_regions([image.flip(0)], [BOXES], 1.5)
    torch.testing.assert_close(rgb, bgr)
    assert (make_teacher().encode_regions([image.flip(0)], [BOXES], 1.5) - rgb).abs().max() > 1e-2


def test_pixel_statistics_are_what_the_crop_is_normalised_with(make_teacher, monkeypatch):
    """A grey picture of ImageNet's mean colour is all zeros to CLIP with ImageNet's statistics."""
    grey = torch.tensor([123.675, 116.28, 103.53])[:, None, None].expand(3, 80, 90)
    seen = []
    for statistics in ("imagenet", "clip"):
        teacher = make_teacher(pixel_statistics=statistics)
        encode = teacher._clip("a test").model.encode_image
        monkeypatch.setattr(
            teacher._clip("a test").model,
            "encode_image",
            lambda crops, encode=encode: seen.append(crops) or encode(crops),
        )
        teacher.encode_regions([grey], [BOXES[:1]], 1.0)
    torch.testing.assert_close(seen[0], torch.zeros_like(seen[0]), atol=1e-5, rtol=0)
    inside = seen[1][0, :, seen[1].shape[2] // 2, seen[1].shape[3] // 2]
    expected = (torch.tensor([0.485, 0.456, 0.406]) - torch.tensor(openai_clip.CLIP_MEAN)) / (
        torch.tensor(openai_clip.CLIP_STD)
    )
    torch.testing.assert_close(inside, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("limit", [1, 2, 4, 512])
def test_order_and_batch_size_change_nothing(make_teacher, monkeypatch, limit):
    monkeypatch.setattr(teacher_module, "_REGIONS_PER_CALL", limit)
    teacher = make_teacher()
    images = [smooth_image(70, 90, 1), smooth_image(50, 50, 2), smooth_image(80, 95, 3)]
    boxes = [BOXES, BOXES[:0], BOXES[:2]]
    together = teacher.encode_regions(images, boxes, 1.5)
    alone = [
        teacher.encode_regions([image], [box[None]], 1.5)
        for image, image_boxes in zip(images, boxes, strict=True)
        for box in image_boxes
    ]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)
    assert (together[0] - together[3]).abs().max() > 1e-3


def test_autocast_does_not_reach_the_teacher(make_teacher):
    expected = make_teacher().encode_regions([smooth_image(70, 90)], [BOXES], 1.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = make_teacher().encode_regions([smooth_image(70, 90)], [BOXES], 1.5)
    assert torch.equal(found, expected)


# --- texts ----------------------------------------------------------------------------------------


def test_texts_equal_clips_own_encoding(make_teacher, weights):
    texts = ["a dog", "two cats on a sofa", "a dog"]
    model, _ = released_clip(weights)
    with torch.no_grad():
        tokens = clip_files.import_clip().tokenize(texts)
        expected = F.normalize(model.encode_text(tokens), dim=-1)
    found = make_teacher().encode_captions(texts)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_each_text_is_encoded_once(make_teacher, monkeypatch):
    teacher = make_teacher()
    teacher.encode_captions(["z"])  # loaded, and the template checked
    encoded = []
    tokenize = clip_files.import_clip().tokenize
    monkeypatch.setattr(
        clip_files.import_clip(),
        "tokenize",
        lambda texts, **options: encoded.extend(texts) or tokenize(texts, **options),
    )
    teacher.encode_captions(["a", "b", "a"])
    teacher.encode_captions(["b", "c"])
    assert encoded == ["a", "b", "c"]


def test_classes_go_into_the_template(make_teacher):
    teacher = make_teacher(templates=("the {} there",))
    expected = teacher.encode_captions(["the cat there", "the {dog} there"])
    assert torch.equal(teacher.encode_classes(["cat", "{dog}"]), expected)


def test_an_ensemble_is_the_normalised_mean_of_normalised_embeddings(make_teacher, weights):
    templates = ["a {}.", "the big {} there", "{}"]
    found = make_teacher(templates=templates).encode_classes(["cat", "train"])
    model, _ = released_clip(weights)
    for row, name in zip(found, ["cat", "train"], strict=True):
        total = torch.zeros(16)
        for template in templates:
            with torch.no_grad():
                one = model.encode_text(clip_files.import_clip().tokenize(template.format(name)))[0]
            total += one / one.norm()
        torch.testing.assert_close(row, total / total.norm(), atol=1e-5, rtol=0)
    alone = make_teacher(templates=("a {}.",)).encode_classes(["cat", "train"])
    assert (found - alone).abs().max() > 1e-3


# --- text cache -----------------------------------------------------------------------------------


def test_cache_answers_without_clip(make_teacher, no_clip):
    first = make_teacher()
    expected = first.encode_classes(["cat", "dog"])
    scale = first.logit_scale
    no_clip()
    second = make_teacher()
    assert torch.equal(second.encode_classes(["dog", "cat"]), expected.flip(0))
    assert second.embed_dim == 16
    assert second.logit_scale == pytest.approx(scale)
    assert scale == pytest.approx(1 / 0.07, rel=1e-3)
    assert second._loaded is None
    with pytest.raises(AssertionError, match="CLIP was loaded"):
        second.encode_classes(["bird"])


@pytest.mark.parametrize("damage", [b"no database at all " * 300, None])
def test_corrupted_cache_is_rebuilt(make_teacher, caplog, damage):
    first = make_teacher()
    expected = first.encode_captions(["a cat", "a dog"])
    path = first._disk.path
    content = path.read_bytes()
    path.write_bytes(damage or content[:4096] + b"\xff" * (len(content) - 4096))
    with caplog.at_level(logging.WARNING):
        assert torch.equal(make_teacher().encode_captions(["a cat", "a dog"]), expected)
    assert any("is corrupted" in r.message and str(path) in r.message for r in caplog.records)
    caplog.clear()
    again = make_teacher()
    assert torch.equal(again.encode_captions(["a cat", "a dog"]), expected)
    assert again._loaded is None
    assert not caplog.records


def test_unusable_cache_folder_is_a_warning(make_teacher, tmp_path, caplog):
    (tmp_path / "file").write_text("not a folder")
    with caplog.at_level(logging.WARNING):
        teacher = make_teacher(text_cache_dir=str(tmp_path / "file" / "cache"))
        teacher.encode_captions(["a cat"])
        teacher.encode_captions(["a dog"])
    assert [r.message for r in caplog.records if "cannot be used" in r.message].__len__() == 1


# --- CLIP's files ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["tiny_vit", "tiny_resnet"])
@pytest.mark.parametrize("write", [clip_files.write_state_dict, clip_files.write_torchscript])
def test_every_format_and_kind_loads_without_warning(make_teacher, tmp_path, shape, write):
    model = clip_files.random_clip(shape)
    image = smooth_image(model.visual.input_resolution, model.visual.input_resolution)
    path = write(tmp_path / "clip.pt", model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        teacher = make_teacher(path)
        box = torch.tensor([[0.0, 0.0, *image.shape[1:]]])
        regions = teacher.encode_regions([image], [box], 1.0)
        texts = teacher.encode_captions(["a cat"])
    assert teacher.embed_dim == clip_files.SHAPES[shape]["embed_dim"] == regions.shape[1]
    released, _ = released_clip(path)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    with torch.no_grad():
        expected = released.encode_image(((image / 255 - mean) / std)[None])
        tokens = clip_files.import_clip().tokenize(["a cat"], released.context_length)
        expected_text = released.encode_text(tokens)
    torch.testing.assert_close(regions, F.normalize(expected, dim=-1), atol=1e-4, rtol=0)
    torch.testing.assert_close(texts, F.normalize(expected_text, dim=-1), atol=1e-5, rtol=0)


def test_loading_leaves_the_random_numbers_alone(make_teacher):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    make_teacher().encode_captions(["a cat"])
    assert torch.equal(torch.rand(3), expected)


def test_no_network(make_teacher, tmp_path, monkeypatch):
    def refuse(*_):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    teacher = make_teacher("ViT-B/32", download_root=str(tmp_path))
    with pytest.raises(FileNotFoundError) as error:
        teacher.encode_captions(["a cat"])
    message = str(error.value)
    assert str(tmp_path / "ViT-B-32.pt") in message
    assert "https://openaipublic" in message
    assert "MODEL.TEACHER.WEIGHTS" in message
    assert "Name or service not known" in message


@pytest.mark.parametrize("content", ["text", "tensor", "other_model", "small_vocabulary", "module"])
def test_file_that_is_not_a_clip(make_teacher, tmp_path, content):
    path = tmp_path / "wrong.pt"
    if content == "text":
        path.write_text("hello")
    elif content == "tensor":
        torch.save(torch.zeros(3), path)
    elif content == "other_model":
        torch.save(nn.Linear(2, 3).state_dict(), path)
    elif content == "small_vocabulary":
        clip_files.write_state_dict(path, clip_files.random_clip(vocab_size=100))
    else:
        torch.save(nn.Linear(2, 3), path)  # a pickled object: must not be executed
    with pytest.raises(ValueError, match=r"wrong\.pt"):
        make_teacher(path).encode_captions(["a cat"])


# --- construction ---------------------------------------------------------------------------------


def test_wrong_image_format_and_statistics(make_teacher):
    with pytest.raises(ValueError, match=r"INPUT.FORMAT.*found 'L'"):
        make_teacher(image_format="L")
    with pytest.raises(ValueError, match=r"PIXEL_STATISTICS.*'clip', 'imagenet'.*found 'coco'"):
        make_teacher(pixel_statistics="coco")


@pytest.fixture
def make_cfg(weights, tmp_path):
    def make(path=weights, **text):
        return SimpleNamespace(
            MODEL=SimpleNamespace(
                DEVICE="cpu",
                IKD=SimpleNamespace(LOSS_WEIGHT=1.0),
                TEACHER=SimpleNamespace(
                    WEIGHTS=str(path),
                    TEXT_CACHE_DIR=str(tmp_path / "cache"),
                    DOWNLOAD_ROOT="",
                    PIXEL_STATISTICS="imagenet",
                    CACHE="",
                ),
                TEXT_CLASSIFIER=SimpleNamespace(
                    **{"TEMPLATE": "one {}", "TEMPLATES": (), "TEMPLATES_FILE": ""}
                    | {"EMBEDDINGS": "", "EMBED_DIM": 16}
                    | text
                ),
            ),
            INPUT=SimpleNamespace(FORMAT="BGR"),
            OUTPUT_DIR=str(tmp_path),
        )

    return make


def test_build_teacher_reads_the_config(make_cfg, tmp_path):
    teacher = build_teacher(make_cfg())
    assert torch.equal(teacher.encode_classes(["cat"]), teacher.encode_captions(["one cat"]))
    assert isinstance(teacher, CLIPTeacher)
    assert teacher.image_format == "BGR"
    assert teacher._disk.path.parent == tmp_path / "cache"
    assert teacher.pixel_statistics == "imagenet"
    ensemble = build_teacher(make_cfg(TEMPLATES=("one {}", "two {}")))
    assert ensemble.templates == ("one {}", "two {}")
    with pytest.raises(ValueError, match="TEMPLATES_FILE is not read yet"):
        build_teacher(make_cfg(TEMPLATES_FILE="prompts.txt"))


# --- class embeddings from a file -----------------------------------------------------------------

NAMES = ["cat", "dog", "polar bear"]


@pytest.fixture
def make_file(make_teacher, weights, tmp_path):
    """Store embeddings of NAMES as the teacher gives them."""

    def make(background="nothing", **changes):
        teacher = make_teacher(templates=("one {}",))
        rows = teacher.encode_classes(NAMES).numpy()
        provenance = {
            "templates": teacher.templates,
            "clip": "tiny.pt",
            "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        } | changes
        if background:
            provenance["background"] = teacher.encode_captions([background])[0].numpy()
            provenance["background_prompt"] = background
        save_text_embeddings(
            make_text_embeddings(NAMES, rows, **provenance), tmp_path / "x.safetensors"
        )
        return str(tmp_path / "x.safetensors")

    return make


def test_stored_classes_need_no_clip_file(make_cfg, make_file, make_teacher, tmp_path, caplog):
    path = make_file()
    expected = make_teacher(templates=("one {}",))
    with caplog.at_level(logging.WARNING):
        teacher = build_teacher(make_cfg(tmp_path / "gone.pt", EMBEDDINGS=path))
    assert "gone.pt' is not at hand" in caplog.text
    order = [NAMES[2], NAMES[0]]
    assert torch.equal(teacher.encode_classes(order), expected.encode_classes(order))
    assert torch.equal(
        teacher.encode_captions(["nothing", "nothing"]), expected.encode_captions(["nothing"] * 2)
    )
    assert teacher.embed_dim == 16
    assert teacher.encode_captions([]).shape == (0, 16)
    assert not isinstance(teacher, nn.Module)
    for call in (
        lambda: teacher.encode_captions(["nothing", "a cat"]),
        lambda: teacher.encode_regions([smooth_image(70, 90)], [BOXES], 1.5),
        lambda: teacher.logit_scale,
    ):
        with pytest.raises(FileNotFoundError, match=r"x\.\w+ does not hold .*gone\.pt"):
            call()


def test_a_name_that_the_file_lacks_is_not_left_to_clip(make_cfg, make_file):
    teacher = build_teacher(make_cfg(EMBEDDINGS=make_file()))
    with pytest.raises(ValueError, match=r"x\.\w+: no embedding of 'zebra'"):
        teacher.encode_classes(["cat", "zebra"])


def test_stored_classes_of_another_clip(make_cfg, make_file, tmp_path):
    other = clip_files.write_state_dict(tmp_path / "other.pt", clip_files.random_clip(seed=1))
    with pytest.raises(ValueError, match=r"x\.\w+: made with the CLIP 'tiny\.pt'.*other\.pt"):
        build_teacher(make_cfg(other, EMBEDDINGS=make_file()))
    with pytest.raises(ValueError, match=r"x\.\w+: made with the CLIP 'tiny\.pt'.*'ViT-B/32'"):
        build_teacher(make_cfg("ViT-B/32", EMBEDDINGS=make_file()))  # known without its weights


def test_stored_classes_of_another_size_or_template(make_cfg, make_file):
    path = make_file()
    with pytest.raises(ValueError, match=r"x\.\w+: embeddings of size 16, but .*EMBED_DIM is 512"):
        build_teacher(make_cfg(EMBEDDINGS=path, EMBED_DIM=512))
    with pytest.raises(ValueError, match=r"x\.\w+: made with the templates .*'one \{\}'.*'two"):
        build_teacher(make_cfg(EMBEDDINGS=path, TEMPLATE="two {}"))
    with pytest.raises(ValueError, match=r"x\.\w+: made with the templates"):
        build_teacher(make_cfg(EMBEDDINGS=path, TEMPLATES=("one {}", "two {}")))
    build_teacher(make_cfg(EMBEDDINGS=path, TEMPLATE="two {}", TEMPLATES=("one {}",)))


@pytest.mark.gpu
def test_half_precision_on_a_gpu(make_teacher, weights):
    image = smooth_image(70, 90)
    expected = make_teacher().encode_regions([image], [BOXES], 1.5)
    teacher = make_teacher(device="cuda")
    found = teacher.encode_regions([image.cuda()], [BOXES.cuda()], 1.5)
    assert teacher._clip("a test").dtype == torch.float16
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.cpu(), expected, atol=5e-3, rtol=0)


@pytest.mark.clip
def test_released_vit_b_32(tmp_path):
    teacher = CLIPTeacher("ViT-B/32", device="cpu", text_cache_dir=str(tmp_path))
    assert teacher.embed_dim == 512
    assert teacher.logit_scale == pytest.approx(100, abs=0.1)
    cat, kitten, train = teacher.encode_classes(["cat", "kitten", "train"])
    assert cat @ kitten > cat @ train


def test_crops_of_thousands_of_regions_never_exist_together(make_teacher, monkeypatch):
    """45,000 crops of CLIP's 224 px are 27 GB; 512 are 0.3 GB."""
    counts = []

    def recorded(images, boxes, **kwargs):
        counts.append(sum(map(len, boxes)))
        return torch.zeros(counts[-1], 3, kwargs["size"], kwargs["size"])

    monkeypatch.setattr(teacher_module, "crop_regions", recorded)
    boxes = torch.tensor([[1.0, 2.0, 20.0, 24.0]])
    rows = make_teacher().encode_regions(
        [smooth_image(32, 32)] * 3, [boxes.repeat(n, 1) for n in (1000, 0, 1200)], 1.5
    )
    assert len(rows) == sum(counts) == 2200
    assert max(counts) == 512


class Cached:
    """A cache of the teacher that knows one text."""

    folder = "cached_answers"
    contents = SimpleNamespace(embed_dim=16, logit_scale=14.0)

    def texts(self, texts):
        row = np.eye(16, dtype=np.float32)[3]
        return {text: row for text in texts if text == "one cat"}


def test_a_cache_answers_without_clip_and_names_its_folder_where_it_cannot(make_teacher, tmp_path):
    teacher = make_teacher(tmp_path / "gone.pt", cache=Cached(), templates=("one {}",))
    assert teacher.encode_classes(["cat"]).tolist() == [np.eye(16)[3].tolist()]
    assert (teacher.embed_dim, teacher.logit_scale) == (16, 14.0)
    for call in (
        lambda: teacher.encode_captions(["one cat", "one dog"]),
        lambda: teacher.encode_regions([smooth_image(70, 90)], [BOXES], 1.5),
    ):
        with pytest.raises(FileNotFoundError, match=r"cached_answers does not hold .*gone\.pt"):
            call()
