"""Reading foreign weights: what is read equals what the usual loaders give, and nothing runs."""

import contextlib
import hashlib
import pickle
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

import clip_files
from hierkd.files import (
    check_hash,
    is_torchscript,
    read_pickled_arrays,
    read_torch_file,
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


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_benign_torch_file(tmp_path, zipped):
    content = OrderedDict(model={"w": torch.arange(3.0)}, iteration=7, names=["a", "é"])
    torch.save(content, tmp_path / "m.pth", _use_new_zipfile_serialization=zipped)
    found = read_torch_file(tmp_path / "m.pth")
    assert torch.equal(found["model"]["w"], content["model"]["w"])
    assert (found["iteration"], found["names"]) == (7, ["a", "é"])


# -------------------------------------------------------------------------- TorchScript archives


class Spy(nn.Module):
    """A module whose archive writes a file when ``torch.jit.load`` reads it."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(4.0))
        self.path = path

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x

    @torch.jit.export
    def __getstate__(self):
        return (self.weight, self.path, self.training)

    @torch.jit.export
    def __setstate__(self, state):
        # type: (Tuple[Tensor, str, bool]) -> None
        self.weight = state[0]
        self.path = state[1]
        self.training = state[2]
        torch.save(self.weight, self.path)


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


class Mixture(nn.Module):
    """Buffers, plain tensors, half precision, views, shared and empty tensors, nested modules."""

    def __init__(self) -> None:
        super().__init__()
        base = torch.arange(24.0).reshape(4, 6)
        self.view = nn.Parameter(base[1:3, ::2])
        self.halves = nn.Parameter(torch.full((3,), 0.1).half(), requires_grad=False)
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("empty", torch.zeros(0, 3))
        self.register_buffer("shared", base)
        self.plain = torch.ones(2)  # neither parameter nor buffer: not in a state dict
        self.layers = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
        self.sizes = [1, 2]
        self.name = "x"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x) + self.plain * self.sizes[0]


def test_archives_of_other_modules(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Mixture()).save(str(tmp_path / "m.pt"))
    expected = load_by_torch(tmp_path / "m.pt").state_dict()
    found = read_torchscript_state_dict(tmp_path / "m.pt")
    assert set(found) == set(expected)
    assert "plain" not in found
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


def test_the_code_of_an_archive_does_not_run(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(Spy(str(tmp_path / "ran")))
        scripted.save(str(tmp_path / "spy.pt"))
    (tmp_path / "ran").unlink(missing_ok=True)
    with pytest.raises(ValueError, match=r"spy\.pt.*state is a tuple"):
        read_torchscript_state_dict(tmp_path / "spy.pt")
    assert not (tmp_path / "ran").exists()
    load_by_torch(tmp_path / "spy.pt")  # the plant works
    assert (tmp_path / "ran").exists()


def rewrite(source: Path, target: Path, **changed: bytes) -> None:
    """Copy an archive with other contents of some of its files."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, changed.get(name.split("/", 1)[1], old.read(name)))


def test_damaged_archives(tmp_path):
    whole = clip_files.write_torchscript(
        tmp_path / "clip.pt", clip_files.random_clip(vocab_size=300)
    )
    rewrite(whole, tmp_path / "short.pt", **{"data/0": b"\0" * 4})
    with pytest.raises(ValueError, match=r"short\.pt.*data/0 has 1 values"):
        read_torchscript_state_dict(tmp_path / "short.pt")
    rewrite(whole, tmp_path / "other.pt", byteorder=b"big")
    with pytest.raises(ValueError, match="byte order"):
        read_torchscript_state_dict(tmp_path / "other.pt")
    (tmp_path / "half.pt").write_bytes(whole.read_bytes()[:5000])
    assert not is_torchscript(tmp_path / "half.pt")
    with pytest.raises(ValueError, match=r"half\.pt"):
        read_torchscript_state_dict(tmp_path / "half.pt")


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


def test_a_hash_is_compared(tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes(b"weights")
    digits = hashlib.sha256(b"weights").hexdigest()
    check_hash(path, digits)
    check_hash(path, digits[:8].upper())
    for wrong in ("0" * 64, "", digits[1:]):
        with pytest.raises(ValueError, match=rf"model\.pth.*sha256 is {digits}"):
            check_hash(path, wrong)
