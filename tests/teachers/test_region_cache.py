"""The cache's files: what is written comes back, nothing half-written counts, nothing stale."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest

from hierkd.files import file_hash
from hierkd.load_config import load_config
from hierkd.teachers.clip import build_region_cache
from hierkd.teachers.region_cache import (
    CacheContents,
    RegionCache,
    RegionCacheWriter,
    keys_sha256,
    sorted_texts,
)

IDS = np.array([70, 3, 900_000_000_000, 41, 5], np.int64)  # in no order, beyond 32 bits
TEXTS = ["a cat", "two cats, ü", "", "a dog", "a cat"]
SIZE = 6


@pytest.fixture
def annotations(tmp_path) -> Path:
    path = tmp_path / "train.json"
    path.write_text("{}")
    return path


@pytest.fixture
def contents(annotations) -> CacheContents:
    texts, keys = sorted_texts(TEXTS)
    return CacheContents(
        clip="tiny.pt",
        weights_sha256="ab" * 32,
        pixel_statistics="clip",
        image_format="RGB",
        crop_scale=1.5,
        datasets=["world"],
        annotations_sha256=[file_hash(annotations)],
        embed_dim=SIZE,
        logit_scale=14.0,
        num_boxes=len(IDS),
        num_texts=len(texts),
        texts_sha256=keys_sha256(keys),
    )


def unit_rows(*shape: int) -> np.ndarray:
    rows = np.random.default_rng(len(shape)).standard_normal(shape)
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def text_rows(texts: list[str]) -> np.ndarray:
    return np.stack([unit_rows(4, SIZE)[TEXTS.index(text)] for text in texts])


def open_writer(folder: Path, contents: CacheContents, **options) -> RegionCacheWriter:
    return RegionCacheWriter(folder, contents, IDS, sorted_texts(TEXTS)[1], **options)


def fill(writer: RegionCacheWriter, chunk: int = 2) -> None:
    regions, texts = unit_rows(len(IDS), 2, SIZE), text_rows(sorted_texts(TEXTS)[0])
    while writer.texts_done < len(texts):
        writer.write_texts(texts[writer.texts_done :][:chunk])
    while writer.boxes_done < len(IDS):
        writer.write_regions(regions[writer.boxes_done :][:chunk])
    writer.finish()


@pytest.fixture
def folder(tmp_path, contents) -> Path:
    fill(open_writer(tmp_path / "cache", contents))
    return tmp_path / "cache"


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def test_rows_come_back_in_any_order(folder):
    cache, regions = RegionCache(folder), unit_rows(len(IDS), 2, SIZE)
    order = [4, 2, 2, 0]
    for flipped in (False, True):
        found = cache.regions(IDS[order], flipped=flipped)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, regions[order, int(flipped)], atol=1e-3)
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert cache.regions(IDS[:0], flipped=False).shape == (0, SIZE)


def test_texts_that_are_there_come_back(folder):
    found = RegionCache(folder).texts(["a dog", "a bird", "", "two cats, ü"])
    assert set(found) == {"a dog", "", "two cats, ü"}
    for text, row in found.items():
        np.testing.assert_allclose(row, text_rows([text])[0], atol=1e-3)
    assert RegionCache(folder).texts([]) == {}


def test_unknown_annotation_is_named(folder):
    with pytest.raises(ValueError, match=r"annotations \[71\].*tools/cache_teacher.py"):
        RegionCache(folder).regions(np.array([3, 71]), flipped=False)


@pytest.mark.parametrize("stops", [(0, 0), (1, 0), (2, 1), (2, 2)])
def test_an_interrupted_cache_is_refused_and_can_be_completed(tmp_path, folder, contents, stops):
    part = tmp_path / "part"
    writer = open_writer(part, contents)
    regions, texts = unit_rows(len(IDS), 2, SIZE), text_rows(sorted_texts(TEXTS)[0])
    for step in range(stops[0]):
        writer.write_texts(texts[2 * step : 2 * step + 2])
    for step in range(stops[1]):
        writer.write_regions(regions[2 * step : 2 * step + 2])
    with pytest.raises(FileNotFoundError, match=r"is not complete.*cache_teacher\.py"):
        RegionCache(part)
    again = open_writer(part, contents)
    assert (again.texts_done, again.boxes_done) == (2 * stops[0], 2 * stops[1])
    fill(again)
    assert digests(part) == digests(folder)


def test_a_cache_of_other_contents_is_not_overwritten_unasked(tmp_path, folder, contents):
    other = dataclasses.replace(contents, crop_scale=1.0)
    with pytest.raises(ValueError, match=r"crop_scale: found 1.5, expected 1.0.*--overwrite"):
        open_writer(folder, other)
    open_writer(tmp_path / "begun", contents)
    with pytest.raises(ValueError, match=r"progress.json.*crop_scale"):
        open_writer(tmp_path / "begun", other)
    writer = open_writer(folder, other, overwrite=True)
    assert not writer.complete
    with pytest.raises(FileNotFoundError, match="is not complete"):
        RegionCache(folder)
    fill(writer)
    assert RegionCache(folder).contents == other


def test_proposals_come_back_with_their_image_and_belong_to_their_weights(tmp_path, contents):
    of = {"proposals_per_image": 2, "proposals_sha256": "ef" * 32, "num_images": 3}
    contents, owners = dataclasses.replace(contents, **of), np.array([3, 41, 5])
    writer = open_writer(tmp_path / "cache", contents, owners=owners)
    boxes, rows = 1e3 * unit_rows(3, 2, 4), unit_rows(3, 2, 2, SIZE)
    boxes[1, 1] = rows[1, 1] = 0  # of the second image there is one
    writer.write_proposals(0, boxes[:2], rows[:2])
    writer.write_proposals(2, boxes[2:], rows[2:])
    fill(writer)
    cache = RegionCache(tmp_path / "cache")
    for ids, image, count in (([70, 3], 0, 2), ([41], 1, 1), ([5, 900_000_000_000], 2, 2)):
        for flipped in (False, True):
            found_boxes, found = cache.proposals(np.array(ids), flipped=flipped)
            assert np.array_equal(found_boxes, boxes[image, :count])
            np.testing.assert_allclose(found, rows[image, :count, int(flipped)], atol=1e-3)
    assert len(cache.proposals(IDS[:0], flipped=False)[0]) == 0
    other = dataclasses.replace(contents, proposals_sha256="00" * 32)
    with pytest.raises(ValueError, match=r"proposals_sha256: found 'ef.*--overwrite"):
        open_writer(tmp_path / "cache", other, owners=owners)


def test_repeated_annotation_ids_are_refused(tmp_path, contents):
    with pytest.raises(ValueError, match=r"\[3\] occur more than once in world"):
        RegionCacheWriter(tmp_path / "x", contents, np.array([3, 3]), sorted_texts(TEXTS)[1])
    assert not (tmp_path / "x").exists()


def test_a_stale_cache_is_refused_with_both_sides_and_the_command(folder, annotations):
    cache = RegionCache(folder)
    cache.check(crop_scale=(1.5, "KEY"), embed_dim=(SIZE, "KEY"))
    cache.check_annotations({"world": str(annotations)})
    annotations.write_text('{"other": 1}')
    for check, message in (
        (lambda: cache.check(crop_scale=(1.0, "KEY")), r"crop_scale found 1.5, expected 1.0 \(KEY"),
        (
            lambda: cache.check_annotations({"world": str(annotations)}),
            r"annotations_sha256 found .*train\.json.*'world'",
        ),
    ):
        with pytest.raises(ValueError, match=f"manifest.json.*{message}.*--overwrite"):
            check()


@pytest.mark.parametrize("name", ["regions.npy", "texts.npy", "annotation_ids.npy"])
@pytest.mark.parametrize("damage", ["cut", "missing", "other"])
def test_damaged_files_are_refused_with_the_command(folder, name, damage):
    path = folder / name
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-8])
    elif damage == "missing":
        path.unlink()
    else:
        np.save(path, np.zeros((2, SIZE), np.float16))
    with pytest.raises(ValueError, match=rf"{name}.*cache_teacher.py"):
        RegionCache(folder)


@pytest.mark.parametrize("text", ["", "[]", '{"format": 1}', '{"format": 99}'])
def test_a_broken_manifest_is_refused(folder, text):
    (folder / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest.json.* is no manifest.*--overwrite"):
        RegionCache(folder)


def test_a_cache_holds_ground_truth_boxes_only():
    cfg = load_config("", ["MODEL.TEACHER.CACHE", "x", "MODEL.IKD.BOXES", "predicted"])
    with pytest.raises(ValueError, match=r"MODEL\.IKD\.BOXES is 'predicted'"):
        build_region_cache(cfg)


def test_no_cache_at_all(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no cache.*cache_teacher.py"):
        RegionCache(tmp_path)
