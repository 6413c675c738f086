"""Reading foreign weights: what is read equals what the usual loaders give, and nothing runs."""

import pickle
import warnings

import numpy as np
import pytest
import torch

import clip_files
from hierkd.files import (
    is_torchscript,
    read_pickled_arrays,
    read_torchscript_state_dict,
    replacing,
)

# ------------------------------------------------------------------------------ pickled arrays


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("dtype", ["?", "<f4", ">f4", "f8", "f2", "i8", "u1"])
def test_benign_pickles_are_read_as_pickle_reads_them(tmp_path, protocol, dtype):
    array = np.arange(6).reshape(2, 3).astype(dtype)
    arrays = {"w": array, "f": np.asfortranarray(array), "0": array[0, 1], "n": array[:0]}
    rest = {"text": "é", "list": [1, None, (True, 2.5)]}
    (tmp_path / "weights.pkl").write_bytes(pickle.dumps({"model": arrays, **rest}, protocol))
    found = read_pickled_arrays(tmp_path / "weights.pkl")
    assert {key: found[key] for key in rest} == rest
    assert found["model"].keys() == arrays.keys()
    for key, each in arrays.items():
        assert found["model"][key].dtype == each.dtype.newbyteorder("=")
        np.testing.assert_array_equal(found["model"][key], each)


def test_a_pickle_of_python_2(tmp_path):
    # What Python 2 and an old numpy wrote: protocol 2, bytes as str.
    raw = np.array([1.5, -2.0], "<f4").tobytes()
    old = (
        b"\x80\x02}U\x01wcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b"
        b"\x87Rq\x00(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff"
        b"\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x08" + raw + b"tbs."
    )
    (tmp_path / "old.pkl").write_bytes(old)
    found = read_pickled_arrays(tmp_path / "old.pkl")
    assert found["w"].tolist() == [1.5, -2.0]
    found["w"][0] = 1  # torch.from_numpy wants to write, too


GADGETS = {
    "builtins.eval": b"cbuiltins\neval\n(X\x01\x00\x00\x001tR.",
    "an attribute of what is allowed": b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__reduce__\x93.",
    "an instance": b"(iposix\nmkdir\n.",
    "a type with objects": b"cnumpy\ndtype\n(X\x01\x00\x00\x00OK\x00K\x01tR.",
    # numpy's own type takes this state, and would read the eight bytes as an address
    "numbers that become objects": (
        b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(X\x02\x00\x00\x00f8K\x00K\x01tR"
        b"(K\x04X\x01\x00\x00\x00<(cnumpy\ndtype\n(X\x01\x00\x00\x00OtR)tNNK\x08K\x08K\x00tbC\x08"
        b"AAAAAAAAtR."
    ),
    "nothing": b"",
    "no pickle": b"hello",
}


@pytest.mark.parametrize("gadget", GADGETS)
def test_handmade_pickles(tmp_path, gadget):
    (tmp_path / "g.pkl").write_bytes(GADGETS[gadget])
    with pytest.raises(ValueError, match=r"g\.pkl' cannot be read as arrays: .+"):
        read_pickled_arrays(tmp_path / "g.pkl")


# -------------------------------------------------------------------------- TorchScript archives


@pytest.mark.parametrize("shape", ["tiny_vit", "tiny_resnet"])
def test_archives_give_what_torch_gives(tmp_path, shape):
    model = clip_files.random_clip(shape, vocab_size=300)
    path = clip_files.write_torchscript(tmp_path / "clip.pt", model)
    assert is_torchscript(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = torch.jit.load(str(path), map_location="cpu").state_dict()
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
