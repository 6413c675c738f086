"""The teacher that looks up: what comes from the cache, what from CLIP, what is refused."""

import logging

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from torch import nn

from clip_files import random_clip, write_state_dict
from fake_teacher import FakeTeacher
from hierkd.load_config import load_config
from hierkd.teachers.cached_teacher import CachedTeacher, build_cached_teacher
from hierkd.teachers.region_cache import (
    CacheContents,
    TeacherCache,
    TeacherCacheWriter,
    file_sha256,
    keys_sha256,
    sorted_texts,
)

SIZE = 16
IDS = np.array([11, 7, 30], np.int64)
TEXTS = ["a photo of background.", "a photo of a cat.", "a picture of a dog"]
DATASET = "cached_teacher_test_world"


@pytest.fixture
def annotations(tmp_path):
    path = tmp_path / "train.json"
    path.write_text("{}")
    MetadataCatalog.get(DATASET).set(json_file=str(path))
    yield path
    MetadataCatalog.remove(DATASET)


@pytest.fixture
def weights(tmp_path):
    return write_state_dict(tmp_path / "clip.pt", random_clip("tiny_vit"))


@pytest.fixture
def folder(tmp_path, weights, annotations):
    """A cache whose rows are the fake teacher's embeddings."""
    texts, keys = sorted_texts(TEXTS)
    contents = CacheContents(
        clip="clip.pt",
        weights_sha256=file_sha256(weights),
        pixel_statistics="clip",
        image_format="RGB",
        crop_scale=1.5,
        datasets=(DATASET,),
        annotations_sha256=(file_sha256(annotations),),
        embed_dim=SIZE,
        logit_scale=14.5,
        num_boxes=len(IDS),
        num_texts=len(texts),
        texts_sha256=keys_sha256(keys),
    )
    writer = TeacherCacheWriter(tmp_path / "cache", contents, IDS, keys)
    writer.write_regions(region_rows().numpy())
    writer.write_texts(FakeTeacher(SIZE).encode_captions(texts).numpy())
    writer.finish()
    return tmp_path / "cache"


def region_rows() -> torch.Tensor:
    rows = FakeTeacher(SIZE)._embed([f"annotation {i} {f}" for i in IDS for f in (False, True)])
    return rows.reshape(len(IDS), 2, SIZE)


class Inner:
    """Builds a fake teacher; counts how often."""

    def __init__(self) -> None:
        self.teacher = FakeTeacher(SIZE)
        self.built = 0

    def __call__(self) -> FakeTeacher:
        self.built += 1
        return self.teacher


@pytest.fixture
def inner():
    return Inner()


@pytest.fixture
def teacher(folder, inner):
    return CachedTeacher(TeacherCache(folder), inner, templates=("a photo of a {}.",), device="cpu")


def test_what_the_cache_holds_needs_no_other_teacher(teacher, inner):
    assert (teacher.embed_dim, teacher.logit_scale) == (SIZE, 14.5)
    wanted = [TEXTS[2], TEXTS[0], TEXTS[2]]
    found = teacher.encode_captions(wanted)
    torch.testing.assert_close(found, FakeTeacher(SIZE).encode_captions(wanted), atol=1e-3, rtol=0)
    torch.testing.assert_close(
        teacher.encode_classes(["cat"]),
        FakeTeacher(SIZE).encode_classes(["cat"]),
        atol=1e-3,
        rtol=0,
    )
    assert teacher.encode_captions([]).shape == (0, SIZE)
    assert inner.built == 0
    assert not isinstance(teacher, nn.Module)


def test_annotations_are_found_by_id_and_orientation(teacher, inner):
    ids = [torch.tensor([30, 11]), torch.tensor([], dtype=torch.int64), torch.tensor([11])]
    found = teacher.encode_annotations(ids, [True, True, False])
    rows = region_rows()
    expected = torch.stack([rows[2, 1], rows[0, 1], rows[0, 0]])
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
    assert found.dtype == torch.float32
    assert inner.built == 0


def test_other_texts_and_regions_come_from_the_inner_teacher(teacher, inner):
    texts = ["new", TEXTS[1], "newer", "new"]
    found = teacher.encode_captions(texts)
    assert inner.teacher.captions == [["new", "newer"]]  # each once, what is known not at all
    torch.testing.assert_close(found, FakeTeacher(SIZE).encode_captions(texts), atol=1e-3, rtol=0)
    image, box = torch.zeros(3, 8, 8), torch.tensor([[0.0, 0.0, 4.0, 4.0]])
    assert teacher.encode_regions([image], [box], 1.5).shape == (1, SIZE)
    teacher.encode_classes(["cat", "bird"])
    assert inner.built == 1


def test_classes_come_from_a_file_of_embeddings_where_one_is_named(folder, inner):
    teacher = CachedTeacher(TeacherCache(folder), inner, templates=(), device="cpu")
    teacher.encode_classes(["cat"])
    assert inner.built == 1


def test_a_single_text_is_no_list_of_texts(teacher):
    with pytest.raises(ValueError, match="single text 'a cat'"):
        teacher.encode_captions("a cat")


# --- from a config --------------------------------------------------------------------------------


def make_cfg(folder, weights, *overrides):
    return load_config(
        "",
        [
            *("MODEL.DEVICE", "cpu", "MODEL.TEACHER.CACHE", str(folder)),
            *("MODEL.TEACHER.WEIGHTS", str(weights), "MODEL.TEXT_CLASSIFIER.EMBED_DIM", SIZE),
            *("MODEL.TEACHER.TEXT_CACHE_DIR", str(folder / "texts"), "MODEL.IKD.BOXES", "gt"),
            *("DATASETS.TRAIN", f"('{DATASET}',)", *overrides),
        ],
    )


def test_the_config_is_read(folder, weights, caplog):
    with caplog.at_level(logging.WARNING):
        teacher = build_cached_teacher(make_cfg(folder, weights))
    assert teacher.templates == ("a photo of a {}.",)
    assert caplog.text == ""
    two = "('one {}', 'two {}')"
    cfg = make_cfg(folder, weights, "MODEL.TEXT_CLASSIFIER.TEMPLATES", two)
    assert build_cached_teacher(cfg).templates == ("one {}", "two {}")
    # CLIP itself, for what the cache lacks
    assert teacher.encode_captions(["a text that is new"]).shape == (1, SIZE)


def test_without_clips_weights_a_warning_and_only_what_is_cached(folder, weights, caplog):
    weights.unlink()
    with caplog.at_level(logging.WARNING):
        teacher = build_cached_teacher(make_cfg(folder, weights))
    assert "clip.pt' is not at hand" in caplog.text
    assert teacher.encode_captions(TEXTS).shape == (3, SIZE)
    with pytest.raises(FileNotFoundError, match=r"cache does not hold 'new'.*clip\.pt"):
        teacher.encode_captions(["new", TEXTS[0]])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("MODEL.IKD.BOXES", "predicted"), "set MODEL.IKD.BOXES gt"),
        (("MODEL.IKD.CROP_SCALE", 1.0), "crop_scale found 1.5, expected 1.0"),
        (("MODEL.TEACHER.PIXEL_STATISTICS", "imagenet"), "pixel_statistics found clip"),
        (("MODEL.TEXT_CLASSIFIER.EMBED_DIM", 512), "embed_dim found 16, expected 512"),
        (("MODEL.TEACHER.WEIGHTS", "ViT-B/32"), "weights_sha256 .* 'ViT-B/32'"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(folder, weights, overrides, message):
    with pytest.raises(ValueError, match=message):
        build_cached_teacher(make_cfg(folder, weights, *overrides))


def test_other_annotations_are_refused(folder, weights, annotations):
    annotations.write_text('{"images": []}')
    with pytest.raises(ValueError, match=rf"annotations_sha256.*{DATASET}.*cache_teacher\.py"):
        build_cached_teacher(make_cfg(folder, weights))


def test_without_instance_distillation_the_regions_do_not_matter(folder, weights):
    build_cached_teacher(
        make_cfg(
            folder,
            weights,
            *("MODEL.IKD.LOSS_WEIGHT", 0.0, "MODEL.IKD.BOXES", "predicted"),
            *("MODEL.IKD.CROP_SCALE", 1.0),
        )
    )
