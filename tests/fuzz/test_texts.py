"""Captions, vocabularies and stored embeddings of every kind."""

import itertools
import json
import os
import random
import sqlite3
import time
import unicodedata

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import clip_files
from hierkd.files import replacing
from hierkd.inference.predictor import resolve_vocabulary
from hierkd.modeling.detector import HierKD
from hierkd.teachers import teacher as teacher_module
from hierkd.teachers.clip import CLIPTeacher
from hierkd.teachers.openai_clip import import_clip
from hierkd.teachers.region_cache import (
    CacheContents,
    TeacherCache,
    TeacherCacheWriter,
    keys_sha256,
    sorted_texts,
)
from hierkd.teachers.texts import (
    check_names,
    load_text_embeddings,
    make_text_embeddings,
    read_text_lines,
    repeated_names,
    save_text_embeddings,
)
from mutations import break_bytes, broken_json_file

MANY = pytest.mark.slow
TEXTS = (
    *("", " ", "\t\n", "a", "A", "a ", "a\0b", "a b", "\u200b", "\ufeffcat", "\ud800", "a\ud83d"),
    *("\U0001f642", "\U0001f469\u200d\U0001f467", "\u05e9\u05dc\u05d5\u05dd \u202e abc", "\ufffd"),
    *("\u00e9", "e\u0301", "<|endoftext|>", "a <|startoftext|> b", "&lt;&amp;", "{}", "'; DROP"),
    *("word " * 2000, "7" * 10_000, "!" * 10_000, "\u4e2d" * 10_000, "x" * 10_000 + "y"),
)


def tries(number):
    """Hypothesis' settings for so many cases: the same ones each time."""
    return settings(
        max_examples=number,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "clip.pt"
    return clip_files.write_state_dict(path, clip_files.random_clip("tiny_vit"))


@pytest.fixture
def make(weights, tmp_path):
    def _make(cache="cache"):
        return CLIPTeacher(str(weights), device="cpu", text_cache_dir=str(tmp_path / cache))

    return _make


# --- captions -------------------------------------------------------------------------------------


def test_every_caption_is_embedded_and_the_cache_says_the_same(make):
    first, second = make(), make()
    rows = first.encode_captions(TEXTS)
    assert torch.isfinite(rows).all()
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(len(TEXTS)))
    assert torch.equal(second.encode_captions(TEXTS), rows)
    assert not second.loaded  # all of them came from the file
    for index, text in enumerate(TEXTS):  # alone, and without a cache
        alone = make(f"cold {index}").encode_captions([text])[0]
        torch.testing.assert_close(alone, rows[index], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("number", [25, pytest.param(2_000, marks=MANY)])
def test_any_text(make, number):
    """In any order and company, from memory, file or CLIP: the same embedding."""
    warm, reference = make(), make("other")
    count = 0

    @tries(number)
    @given(st.lists(st.text(st.characters(exclude_categories=()), max_size=40), max_size=5))
    def check(texts):
        nonlocal count
        count += len(texts)
        rows = warm.encode_captions(texts)
        assert rows.shape == (len(texts), warm.embed_dim)
        again = make().encode_captions(texts)
        assert torch.equal(rows, again)
        for text, row in zip(texts, rows, strict=True):
            torch.testing.assert_close(reference.encode_captions([text])[0], row)

    check()
    print(f"{count} texts")
    assert count >= number / 2


@pytest.mark.parametrize("caption", [None, 3, 1.5, b"cat", ["cat"]])
def test_what_is_no_text_is_named(make, caption):
    with pytest.raises(ValueError, match="caption 1 must be a text, found"):
        make().encode_captions(["a cat", caption])


def test_a_word_without_end_takes_no_time(make):
    rng = random.Random(0)
    text = "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(100_000))
    started = time.perf_counter()
    assert torch.isfinite(make().encode_captions([text])).all()
    assert time.perf_counter() - started < 10  # without the limit, minutes


def test_long_texts_have_the_tokens_of_the_whole():
    tokenize = teacher_module.import_clip().tokenize
    rng = random.Random(0)
    for _ in range(50):
        words = ["".join(rng.choice("abcdefgh") for _ in range(rng.randint(1, 12)))] * 3000
        rng.shuffle(words)
        text = rng.choice((" ", "  \n ", " " * 90)).join(words)
        short = teacher_module._beginning(text)
        assert len(short) < len(text)
        assert torch.equal(tokenize([short], truncate=True), tokenize([text], truncate=True))


@pytest.mark.parametrize("count", [20, pytest.param(1_000, marks=MANY)])
def test_a_broken_cache_costs_time_and_changes_nothing(make, tmp_path, count):
    texts = [f"text {index}" for index in range(8)]
    expected = make().encode_captions(texts)
    (path,) = (tmp_path / "cache").glob("*.sqlite")
    whole = path.read_bytes()
    for seed in range(count):
        for each in path.parent.iterdir():
            each.unlink()
        path.write_bytes(break_bytes(whole, random.Random(seed)))
        torch.testing.assert_close(make().encode_captions(texts), expected)


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, 3.0])
def test_rows_of_the_cache_that_are_no_embeddings_are_made_anew(make, tmp_path, value):
    expected = make().encode_captions(["a cat"])
    (path,) = (tmp_path / "cache").glob("*.sqlite")
    with sqlite3.connect(path) as connection:
        blob = np.full(expected.shape[1], value, "<f4").tobytes()
        connection.execute("UPDATE texts SET embedding = ?", (blob,))
    connection.close()
    torch.testing.assert_close(make().encode_captions(["a cat"]), expected)


@pytest.mark.parametrize("model", ["-3, 100.0", "16, -1.0", "16, 9e999", "'x', 100.0", "16, NULL"])
def test_a_cache_of_an_impossible_model_is_set_aside(make, tmp_path, model):
    teacher = make()
    teacher.encode_captions(["a cat"])
    (path,) = (tmp_path / "cache").glob("*.sqlite")
    with sqlite3.connect(path) as connection:
        connection.execute(f"INSERT OR REPLACE INTO model VALUES (0, {model})")
    connection.close()
    again = make()
    assert again.embed_dim == teacher.embed_dim
    assert again.logit_scale == pytest.approx(teacher.logit_scale)


# --- vocabularies ---------------------------------------------------------------------------------


def test_twenty_thousand_names_take_no_time(tmp_path):
    names = [f"thing number {index}" for index in range(20_000)]
    (tmp_path / "names.txt").write_text("\r\n".join(names), encoding="utf-8-sig")
    started = time.perf_counter()
    assert resolve_vocabulary(",".join(names)) == names
    assert read_text_lines(tmp_path / "names.txt") == names
    with pytest.raises(ValueError, match="repeats 'thing number 7'"):
        resolve_vocabulary(",".join([*names, "thing number 7"]))
    assert time.perf_counter() - started < 2  # 4 s and more when each was compared with all


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "no names"),
        ("cat", "expected a list of names, found the text 'cat'"),
        (["cat", None], "no texts at positions 1: None"),
        (["cat", 3], "no texts at positions 1: 3"),
        (["", "cat"], "blank names at positions 0"),
        (["cat", "\u200b"], "blank names at positions 1"),
        (["cat", "\u00a0\u3000"], "blank names at positions 1"),
        (["cat\ndog"], "line breaks.*at positions 0"),
        (["cat\0"], "control characters.*at positions 0"),
        (["cat\ud800"], "halves of characters at positions 0"),
        (["a" * 501], "more than 500 characters"),
        (["cat", "dog", "cat"], "repeats 'cat'"),
        (["caf\u00e9", "cafe\u0301"], "'caf\u00e9' and 'cafe\u0301' are one name to CLIP"),
        (["a", "Cat", "b", "cat"], "the vocabulary: 'Cat' and 'cat' are one name to CLIP"),
        (["wine  glass", "wine glass", "a", "A"], "'wine  glass' and 'wine glass'.* 1 more"),
        (["cat", "cat "], "'cat' and 'cat ' are one name"),
    ],
)
def test_what_is_no_vocabulary_is_refused(names, message):
    with pytest.raises(ValueError, match=message):
        check_names(names, "the vocabulary")
    with pytest.raises(ValueError, match=message):  # before the detector itself is touched
        HierKD.set_vocabulary(None, names)


@pytest.mark.parametrize(
    "names",
    [
        ["cat"],
        ["Cat"],
        ["stra\u00dfe", "STRASSE"],  # two to CLIP
        ["\u05e9\u05dc\u05d5\u05dd"],
        ["\U0001f469\u200d\U0001f467", "{}"],
        ["a" * 500],
    ],
)
def test_unusual_names_are_names(names, tmp_path):
    check_names(names, "the vocabulary")
    rows = np.eye(len(names), 8, dtype=np.float32)
    path = tmp_path / "names.npz"
    save_text_embeddings(make_text_embeddings(names, rows), path)
    assert list(load_text_embeddings(path).names) == names


def test_names_are_one_name_where_clips_tokeniser_makes_the_same_of_them():
    spellings = [
        "Cat",
        "cat ",
        "caT",
        "caf\u00e9",
        "cafe\u0301",
        "CAF\u00c9",
        "cafe",
        "wine  glass",
    ]
    spellings += ["wine\u00a0glass", "wine glass", "wineglass", "stra\u00dfe", "STRASSE", "strasse"]
    tokens = import_clip().tokenize(spellings)
    for (i, first), (j, second) in itertools.combinations(enumerate(spellings), 2):
        assert bool(repeated_names([first, second])) == torch.equal(tokens[i], tokens[j]), first


@pytest.mark.parametrize("number", [150, pytest.param(5_000, marks=MANY)])
def test_any_list_typed_by_a_user(number, tmp_path):
    """Refused, or names that are told apart, that survive a file, and that are as typed."""
    counts = {"taken": 0, "refused": 0}
    text = st.text(st.characters(exclude_categories=()), max_size=8)
    words = st.sampled_from(
        ["cat", "dog", "caf\u00e9", "cafe\u0301", " cat ", "", "\ufeff", "a\nb"]
    )

    @tries(number)
    @given(st.lists(st.one_of(words, text), min_size=1, max_size=5))
    def check(parts):
        typed = ",".join(parts)
        try:
            names = resolve_vocabulary(typed)
        except ValueError as error:
            assert "vocabulary" in str(error)
            counts["refused"] += 1
            return
        counts["taken"] += 1
        assert names == [part.strip() for part in typed.split(",")]
        assert len({unicodedata.normalize("NFD", name) for name in names}) == len(names)
        path = tmp_path / "names.npz"
        rows = np.eye(len(names), 64, dtype=np.float32)
        save_text_embeddings(make_text_embeddings(names, rows), path)
        assert list(load_text_embeddings(path).names) == names
        lines = tmp_path / "names.txt"
        lines.write_bytes("\r\n".join(names).encode("utf-8-sig"))
        assert read_text_lines(lines) == names

    check()
    print(f"vocabularies: {counts}")
    assert min(counts.values()) > number / 50


# --- files of embeddings --------------------------------------------------------------------------


def write_npz(path, **changes):
    rows = np.eye(3, 8, dtype=np.float32)
    provenance = {"format": 1, "templates": ["a {}"], **changes.pop("provenance", {})}
    arrays = {
        "names": np.array(["a", "b", "c"]),
        "embeddings": rows,
        "background_embedding": rows[0],
        "provenance": np.array(json.dumps(provenance)),
        **changes,
    }
    with path.open("wb") as file:
        np.savez(file, **arrays)
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {"background_embedding": np.full(8, np.nan, np.float32)},
        {"background_embedding": np.full(8, np.inf, np.float32)},
        {"background_embedding": np.zeros(8, np.float32)},
        {"background_embedding": np.array(["x"] * 8)},
        {"background_embedding": np.ones(8, np.complex64)},
        {"background_embedding": np.eye(2, 4, dtype=np.float32)},
        {"embeddings": np.full((3, 8), np.nan, np.float32)},
        {"embeddings": np.zeros((3, 8), np.float32)},
        {"embeddings": np.eye(3, 8, dtype=np.float16)},
        {"embeddings": np.eye(3, 8, dtype=np.int64)},
        {"embeddings": np.eye(3, 8, dtype=np.float32)[0]},
        {"embeddings": np.float32(1)},
        {"embeddings": np.zeros((3, 0), np.float32)},
        {"names": np.array([1, 2, 3]).reshape(1, 3)},
        {"names": np.array(["a", "b", ""])},
        {"provenance": {"weights_sha256": 5}},
        {"provenance": {"verified_rows": "many"}},
        {"provenance": {"templates": [3]}},
        {"provenance": {"templates": None}},
        {"provenance": {"unknown": 1}},
    ],
)
def test_files_of_no_embeddings(tmp_path, changes):
    with pytest.raises(ValueError, match=r"odd\.npz"):
        load_text_embeddings(write_npz(tmp_path / "odd.npz", **changes))


@pytest.mark.parametrize("count", [200, pytest.param(6_000, marks=MANY)])
def test_broken_files_of_embeddings(tmp_path, count):
    whole = write_npz(tmp_path / "whole.npz").read_bytes()
    path, loaded = tmp_path / "odd.npz", 0
    for seed in range(count):
        path.write_bytes(break_bytes(whole, random.Random(seed)))
        try:
            stored = load_text_embeddings(path)
        except ValueError as error:
            assert type(error) is ValueError, f"seed {seed}: {error!r}"
            assert "odd.npz" in str(error), f"seed {seed}"
        else:
            loaded += 1
            assert stored.embeddings.shape == (len(stored.names), 8), f"seed {seed}"
            assert np.isfinite(stored.embeddings).all(), f"seed {seed}"
    print(f"{count} files of embeddings: {loaded} loaded, {count - loaded} refused")


# --- the teacher's cache --------------------------------------------------------------------------

CAPTIONS = ["a cat", "two dogs"]


@pytest.fixture
def cache(tmp_path):
    """A complete cache of three boxes and two texts."""
    texts, keys = sorted_texts(CAPTIONS)
    contents = CacheContents(
        clip="c.pt", weights_sha256="1" * 64, pixel_statistics="clip", image_format="RGB",
        crop_scale=1.5, datasets=("d",), annotations_sha256=("2" * 64,), embed_dim=8,
        logit_scale=100.0, num_boxes=3, num_texts=len(texts), texts_sha256=keys_sha256(keys),
    )  # fmt: skip
    writer = TeacherCacheWriter(tmp_path / "teacher", contents, np.array([4, 2, 9]), keys)
    writer.write_regions(np.tile(np.eye(3, 8, dtype=np.float32)[:, None], (1, 2, 1)))
    writer.write_texts(np.eye(2, 8, dtype=np.float32))
    writer.finish()
    return tmp_path / "teacher"


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_rows_that_are_no_embeddings(cache, value):
    for name in ("regions.npy", "texts.npy"):
        rows = np.load(cache / name)
        rows[1] = value
        np.save(cache / name, rows)
    opened = TeacherCache(cache)
    with pytest.raises(ValueError, match=r"regions\.npy: no embeddings of the annotations \[2\]"):
        opened.regions(np.array([4, 2]), np.array([False, True]))
    with pytest.raises(ValueError, match=r"texts\.npy: some rows are zero or not finite"):
        opened.texts(CAPTIONS)


def read_all(folder):
    opened = TeacherCache(folder)
    opened.check_source(weights="c.pt", weights_sha256="1" * 64, embed_dim=8)
    opened.check_regions(crop_scale=1.5, pixel_statistics="clip", annotation_files={})
    rows = opened.regions(np.array([9, 4, 2]), np.array([False, True, True]))
    return rows, opened.texts(CAPTIONS)


@pytest.mark.parametrize("count", [200, pytest.param(6_000, marks=MANY)])
def test_broken_files_of_the_teachers_cache(cache, count):
    names = sorted(os.listdir(cache))
    whole = {name: (cache / name).read_bytes() for name in names}
    read = 0
    for seed in range(count):
        name = names[seed % len(names)]
        if name == "manifest.json" and seed % 2:
            data = broken_json_file(json.loads(whole[name]), 4 * seed + 1)
        else:
            data = break_bytes(whole[name], random.Random(seed))
        with replacing(cache / name) as making:
            making.write_bytes(data)
        try:
            rows, texts = read_all(cache)
        except (ValueError, FileNotFoundError) as error:
            assert type(error) in (ValueError, FileNotFoundError), f"seed {seed}: {error!r}"
            assert str(cache) in str(error), f"seed {seed}: {error}"
        else:
            read += 1
            vectors = np.vstack([rows, *texts.values()])
            assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-2), f"seed {seed}"
        with replacing(cache / name) as making:
            making.write_bytes(whole[name])
    print(f"{count} caches of the teacher: {read} read, {count - read} refused")
