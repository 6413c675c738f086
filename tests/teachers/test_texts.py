import dataclasses
import json

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import torch
from torch import nn

from hierkd.teachers.texts import (
    check_known_order,
    check_same_rows,
    load_text_embeddings,
    make_text_embeddings,
    read_embedding_array,
    read_text_lines,
    save_text_embeddings,
)

NAMES = ("ant", "bee", "polar bear", "dôme", "elk")


def random_rows(count=5, size=6, seed=0):
    return np.random.default_rng(seed).normal(size=(count, size)).astype(np.float32)


def made(names=NAMES, rows=None, **provenance):
    return make_text_embeddings(names, random_rows() if rows is None else rows, **provenance)


# --- making ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_rows_are_normalised(dtype):
    rows = (random_rows() * 300).astype(dtype)  # squares overflow in half precision
    stored = made(rows=rows)
    assert stored.embeddings.dtype == np.float32
    for found, row in zip(stored.embeddings, rows.astype(float), strict=True):
        length = sum(value**2 for value in row) ** 0.5
        assert found.tolist() == pytest.approx([value / length for value in row], abs=1e-6)


def test_normalised_rows_stay_to_the_last_bit():
    rows = torch.nn.functional.normalize(torch.from_numpy(random_rows(50, 64)), dim=1).numpy()
    assert np.array_equal(made([str(i) for i in range(50)], rows).embeddings, rows)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (random_rows(4), r"a\.npy has 4 rows, but n\.txt has 5 names$"),
        (random_rows(7, 5), r"7 rows, but n\.txt has 5 names \(it looks transposed"),
        (random_rows()[0], r"shape \(K, D\), found float32 of shape \(6,\)"),
        (np.ones((5, 6), int), r"floating point.*found int"),
        (np.where(np.arange(5)[:, None] == 2, np.nan, 1.0), "not finite: the rows of 'polar bear'"),
        (np.where(np.arange(5)[:, None] == 4, np.inf, 1.0), "not finite: the rows of 'elk'"),
        (np.where(np.arange(5)[:, None] < 2, 0.0, 1.0), "all zero: the rows of 'ant', 'bee'"),
    ],
)
def test_unusable_rows(rows, message):
    with pytest.raises(ValueError, match=message):
        made(rows=rows, rows_from="a.npy", names_from="n.txt")


@pytest.mark.parametrize(
    ("background", "message"),
    [
        (np.ones((1, 4)), "size 4, expected 6"),
        (np.ones((2, 6)), "2 rows"),
        (np.zeros(6), "all zero"),
    ],
)
def test_unusable_background(background, message):
    with pytest.raises(ValueError, match=f"background.*{message}"):
        made(background=background)


# --- order ----------------------------------------------------------------------------------------


def test_a_known_list_in_another_order():
    known = {"the farm": ["dog", "ant", "cow"], "the zoo": ["ant", "bee"]}
    with pytest.raises(ValueError, match=r"n\.txt: .* the farm.* row 0 is 'ant' instead of 'dog'"):
        check_known_order(["ant", "cow", "dog"], known, "n.txt")
    check_known_order(["dog", "ant", "cow"], known, "n.txt")
    check_known_order(["dog", "cow"], known, "n.txt")  # no list has these


def test_rows_that_are_clips():
    clip = made()
    half = made(rows=(30 * random_rows()).astype(np.float16))
    check_same_rows(half, [4, 0, 2], clip.embeddings[[4, 0, 2]])


def test_rows_in_another_order_are_named():
    clip = made()
    swapped = made(rows=random_rows()[[0, 3, 2, 1, 4]], source="theirs.npy")
    check_same_rows(swapped, [0, 2, 4], clip.embeddings[[0, 2, 4]])
    with pytest.raises(ValueError, match=r"theirs\.npy: the names are in another order") as error:
        check_same_rows(swapped, [2, 1], clip.embeddings[[2, 1]])
    assert "1 of 2 compared rows" in str(error.value)
    assert "row 1 ('bee')" in str(error.value)
    assert "which is row 3 ('dôme')" in str(error.value)


def test_rows_of_another_clip():
    theirs = made(rows=random_rows(seed=1), source="theirs.npy", templates=("a {}",), clip="RN50")
    with pytest.raises(ValueError, match=r"another CLIP than 'RN50'.*\['a \{\}'\]; 2 of 2"):
        check_same_rows(theirs, [3, 1], made().embeddings[[3, 1]])
    with pytest.raises(ValueError, match="size 6, the CLIP 'RN50' has 9"):
        check_same_rows(theirs, [0], np.ones((1, 9), np.float32))


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("background", [None, np.ones(6)])
def test_round_trip(tmp_path, background):
    stored = made(
        background=background,
        templates=("a {}.", "the {}."),
        clip="ViT-B/32",
        weights_sha256="ab" * 32,
        background_prompt="nothing",
        source="x.npy",
        source_sha256="cd" * 32,
        verified_rows=3,
        version="0.1",
    )
    path = tmp_path / "new" / "x.safetensors"
    save_text_embeddings(stored, path)
    loaded = load_text_embeddings(path)
    for field in dataclasses.fields(stored):
        before, after = getattr(stored, field.name), getattr(loaded, field.name)
        if field.name == "path":
            assert after == str(path)
        elif isinstance(before, np.ndarray):
            assert np.array_equal(before, after)
            assert before.dtype == after.dtype
        else:
            assert before == after
            assert type(before) is type(after)
    assert [each.name for each in path.parent.iterdir()] == ["x.safetensors"]


def test_rows_by_name(tmp_path):
    save_text_embeddings(made(), tmp_path / "x.safetensors")
    stored = load_text_embeddings(tmp_path / "x.safetensors")
    expected = np.stack([stored.embeddings[3], stored.embeddings[0]])
    assert np.array_equal(stored.rows_of(["dôme", "ant"]), expected)
    assert stored.rows_of([]).shape == (0, 6)
    with pytest.raises(ValueError, match=r"x\.safetensors: no embedding of .cat., .Ant."):
        stored.rows_of(["cat", "elk", "Ant"])


def rewrite(path, **changes):
    """The same file with other tensors, or entries of its header; None takes one away."""
    with safetensors.safe_open(path, framework="numpy") as file:
        content = {key: file.get_tensor(key) for key in file.keys()} | file.metadata()  # noqa: SIM118
    content = {key: value for key, value in (content | changes).items() if value is not None}
    texts = {key: value for key, value in content.items() if isinstance(value, str)}
    arrays = {key: value for key, value in content.items() if key not in texts}
    path.write_bytes(safetensors.numpy.save(arrays, texts))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names": json.dumps(NAMES[:4])}, "5 rows, but its list has 4 names"),
        ({"names": '["a", "b", "c", "d", "a"]'}, "repeats 'a'"),
        ({"names": None}, "not a file of text embeddings.*names"),
        ({"other": np.ones(3, np.float32)}, "not a file of text embeddings.*other"),
        ({"embeddings": 2 * random_rows()}, "not normalised"),
        ({"embeddings": np.full((5, 6), np.nan, np.float32)}, "not finite"),
        ({"background_embedding": np.ones(4, np.float32)}, r"shape \(4,\), expected \(6,\)"),
        ({"provenance": '{"format": 3}'}, "format 3, this package reads 2"),
        ({"provenance": "{"}, "not a file of text embeddings"),
    ],
)
def test_file_that_contradicts_itself(tmp_path, changes, message):
    path = tmp_path / "x.safetensors"
    save_text_embeddings(made(), path)
    rewrite(path, **changes)
    with pytest.raises(ValueError, match=rf"x\.safetensors.*{message}"):
        load_text_embeddings(path)


# --- arrays and lists made elsewhere --------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".npy", ".pt", ".pth"])
def test_arrays_made_elsewhere(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    rows = random_rows()
    if suffix == ".npy":
        np.save(path, np.asfortranarray(rows.astype(np.float16)))
    else:
        torch.save(nn.Parameter(torch.from_numpy(rows)).bfloat16(), path)
    found, digest = read_embedding_array(path)
    np.testing.assert_allclose(found, rows, rtol=1e-2)
    assert len(digest) == 64


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("n.txt", "ant\nbee \npolar bear"),
        ("n.txt", "\ufeffant\r\nbee\r\npolar bear\r\n\r\n"),
        ("n.json", '["ant", "bee", "polar bear"]'),
    ],
)
def test_lists(tmp_path, name, content):
    (tmp_path / name).write_text(content, newline="")
    assert read_text_lines(tmp_path / name) == ["ant", "bee", "polar bear"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("n.txt", b"", "no names"),
        ("n.json", b"[]", "no names"),
        ("n.txt", b"a\n\nb", "blank names at positions 1"),
        ("n.txt", b"a\nb\na", "repeats 'a'"),
        ("n.txt", b"\xff\xfe\x00", "cannot be read as text"),
        ("n.json", b'["a", 3]', "expected a JSON list of texts"),
        ("n.json", b'{"a": 3}', "expected a JSON list of texts"),
        ("n.json", b'["a"', "cannot be read as text"),
    ],
)
def test_unusable_lists(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"n\.\w+: {message}"):
        read_text_lines(tmp_path / name)
