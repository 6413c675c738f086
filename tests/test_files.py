"""Reading foreign weights: what is read equals what the usual loaders give, and nothing runs."""

import contextlib
import pickle
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import clip_files
from hierkd.files import (
    is_torchscript,
    read_pickled_arrays,
    read_torchscript_state_dict,
    replacing,
)

# ------------------------------------------------------------------------------ pickled arrays

NUMBERS = st.one_of(
    hnp.boolean_dtypes(),
    hnp.integer_dtypes(endianness="?"),
    hnp.floating_dtypes(sizes=(16, 32, 64), endianness="?"),
)
ARRAYS = hnp.arrays(NUMBERS, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), ARRAYS
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(st.text(max_size=5), inner, max_size=3),
    ),
    max_leaves=8,
)


def assert_same(found, expected):
    if isinstance(expected, np.ndarray | np.generic):
        assert found.dtype == expected.dtype.newbyteorder("=")
        np.testing.assert_array_equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert type(found) is type(expected)
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert (type(found), found) == (type(expected), expected)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(tree=TREES, protocol=st.integers(2, pickle.HIGHEST_PROTOCOL), fortran=st.booleans())
def test_benign_pickles_are_read_as_pickle_reads_them(tmp_path, tree, protocol, fortran):
    if fortran:
        tree = [tree, np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.float32(2.5)]
    path = tmp_path / "weights.pkl"
    path.write_bytes(pickle.dumps(tree, protocol))
    assert_same(read_pickled_arrays(path), tree)


def test_a_pickle_of_python_2(tmp_path):
    # What Python 2 and an old numpy wrote: protocol 2, bytes as str.
    raw = np.array([1.5, -2.0], "<f4").tobytes()
    old = (
        b"\x80\x02}U\x01wcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b"
        b"\x87Rq\x00(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff"
        b"\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x08" + raw + b"tbs."
    )
    (tmp_path / "old.pkl").write_bytes(old)
    expected = pickle.loads(old, encoding="latin1")
    found = read_pickled_arrays(tmp_path / "old.pkl")
    assert_same(found, expected)
    assert expected["w"].tolist() == [1.5, -2.0]
    found["w"][0] = 1  # torch.from_numpy wants to write, too


GADGETS = {
    "builtins.eval": b"cbuiltins\neval\n(X\x01\x00\x00\x001tR.",
    "python 2's builtins": b"c__builtin__\neval\n(X\x01\x00\x00\x001tR.",
    "an attribute of what is allowed": b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__reduce__\x93.",
    "numpy's loader": b"cnumpy\nload\n(X\x01\x00\x00\x00atR.",
    "an instance": b"(iposix\nmkdir\n.",
    "an extension code": b"\x82\x01.",
    "a persistent id": b"Pfile\n.",
    "an encoding that decompresses": (
        b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x04\x00\x00\x00zlibtR."
    ),
    "a type with objects": b"cnumpy\ndtype\n(X\x01\x00\x00\x00OK\x00K\x01tR.",
    # numpy's own type takes this state, and would read the eight bytes as an address
    "numbers that become objects": (
        b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(X\x02\x00\x00\x00f8K\x00K\x01tR"
        b"(K\x04X\x01\x00\x00\x00<(cnumpy\ndtype\n(X\x01\x00\x00\x00OtR)tNNK\x08K\x08K\x00tbC\x08"
        b"AAAAAAAAtR."
    ),
    "a state for a class": b"cnumpy\nndarray\n(K\x01tb.",
    "more values than there are": (
        b"cnumpy._core.numeric\n_frombuffer\n(C\x04abcdcnumpy\ndtype\n(X\x02\x00\x00\x00f4tR"
        b"(K\x09tX\x01\x00\x00\x00CtR."
    ),
    "nothing": b"",
    "no pickle": b"hello",
}


@pytest.mark.parametrize("gadget", GADGETS)
def test_handmade_pickles(tmp_path, gadget):
    (tmp_path / "g.pkl").write_bytes(GADGETS[gadget])
    with pytest.raises(ValueError, match=r"g\.pkl' cannot be read as arrays: .+"):
        read_pickled_arrays(tmp_path / "g.pkl")


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damaged_pickles_end_as_one_kind_of_error(tmp_path, data):
    whole = pickle.dumps({"model": {"w": np.arange(4.0), "b": np.float32(1)}, "__author__": "x"}, 2)
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(damaged)))
    path = tmp_path / "damaged.pkl"
    path.write_bytes(bytes(damaged[:cut] if data.draw(st.booleans()) else damaged))
    with contextlib.suppress(ValueError):  # nothing else may come out
        read_pickled_arrays(path)


# ------------------------------------------------------------------------------- PyTorch files


# -------------------------------------------------------------------------- TorchScript archives


def load_by_torch(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.load(str(path), map_location="cpu")


@pytest.mark.parametrize("shape", ["tiny_vit", "tiny_resnet"])
def test_archives_give_what_torch_gives(tmp_path, shape):
    model = clip_files.random_clip(shape, vocab_size=300)
    path = clip_files.write_torchscript(tmp_path / "clip.pt", model)
    assert is_torchscript(path)
    expected = load_by_torch(path).state_dict()
    found = read_torchscript_state_dict(path)
    assert set(found) == set(expected)
    assert len(found) > 30
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


# ------------------------------------------------------------------------------ whole or not at all


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "figures.json"
    with replacing(path, durable=True) as making:
        making.write_text("first")
        assert not path.exists()
    with pytest.raises(TypeError), replacing(path) as making:
        making.write_text(b"second")
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]


# --------------------------------------------------------------------------------------- hashes
