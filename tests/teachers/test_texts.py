import dataclasses
import json

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from hierkd.teachers.texts import (
    load_text_embeddings,
    make_text_embeddings,
    read_text_lines,
    save_text_embeddings,
)

NAMES = ("ant", "bee", "polar bear", "dôme", "elk")


ROWS = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
ROWS /= np.linalg.norm(ROWS, axis=1, keepdims=True)


def made(**provenance):
    return make_text_embeddings(NAMES, ROWS, **provenance)


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("background", [None, ROWS[2]])
def test_round_trip(tmp_path, background):
    stored = made(
        background=background,
        templates=("a {}.", "the {}."),
        clip="ViT-B/32",
        weights_sha256="ab" * 32,
        background_prompt="nothing",
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
        ({"names": json.dumps(NAMES[:4])}, r"4 names, embeddings of shape \(5, 6\)"),
        ({"names": '["a", "b", "c", "d", "a"]'}, "repeats 'a'"),
        ({"names": None}, "not a file of text embeddings.*names"),
        ({"other": np.ones(3, np.float32)}, "not a file of text embeddings.*other"),
        ({"embeddings": 2 * ROWS}, "not normalised"),
        ({"embeddings": np.full((5, 6), np.nan, np.float32)}, "not normalised"),
        ({"background_embedding": np.ones(4, np.float32)}, r"background's of \(4,\)"),
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


# --- lists ----------------------------------------------------------------------------------------


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
