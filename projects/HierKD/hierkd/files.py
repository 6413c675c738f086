"""Files: written whole or not at all, read without running anything that they hold.

A pickle is a program, and so is a TorchScript archive: loading either the usual way runs it. Here
arrays and tensors are taken out of the file and everything else is refused by name.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import pickle
import re
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = [
    "cache_root",
    "check_hash",
    "check_hash_in_name",
    "is_torchscript",
    "read_pickled_arrays",
    "read_torch_file",
    "read_torchscript_state_dict",
    "remove_unfinished",
    "replacing",
    "write_json_atomically",
]

_REFUSED = "it holds {}, which would run code when it is loaded; only {} are read"
_SCRIPT = "__torch__"  # where the classes of a TorchScript archive live

_Global = tuple[str, str]


def cache_root() -> Path:
    """``$HIERKD_CACHE``; ``~/.cache/hierkd`` where that is not set or empty."""
    return Path(os.environ.get("HIERKD_CACHE") or "~/.cache/hierkd").expanduser()


@contextmanager
def replacing(path: str | os.PathLike[str], *, durable: bool = False) -> Iterator[Path]:
    """Give a temporary path in the same folder, which replaces ``path`` when the block ends well.

    Missing parent folders are made. After an error ``path`` is what it was, and nothing is left.

    Args:
        path: the file to write.
        durable: the content is on the disk before it gets its name, and the name before this
            returns, so that a power cut cannot leave an empty file either.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if durable:
            _sync(temporary)
        os.replace(temporary, path)
        if durable:
            _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json_atomically(path: str | os.PathLike[str], content: object) -> bool:
    """Write ``content`` as compact JSON so that ``path`` holds the old or the new file, whole.

    Missing parent folders are made. An interrupted call leaves ``path`` as it was, and so does one
    that has nothing new to say.

    Returns:
        Whether the file is new or has changed.
    """
    data = (json.dumps(content, separators=(",", ":")) + "\n").encode()
    path = Path(path)
    if path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data:
        return False
    with replacing(path) as temporary:
        temporary.write_bytes(data)
    return True


def remove_unfinished(folder: str | os.PathLike[str], pattern: str) -> list[Path]:
    """Remove what :func:`replacing` had begun in processes that were killed.

    Args:
        folder: where to look; need not exist.
        pattern: glob of the final names, such as ``model_*.pth``. Nobody else may be writing such
            files there now.

    Returns:
        The removed paths.
    """
    left = sorted(Path(folder).glob(f".{pattern}.*.tmp"))
    for path in left:
        path.unlink(missing_ok=True)
    return left


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- PyTorch files --------------------------------------------------------------------------------


def read_torch_file(path: str | os.PathLike[str]) -> Any:
    """Read what ``torch.save`` wrote: tensors, numbers, texts and containers of them, on the CPU.

    Raises:
        ValueError: the file is no such file, or needs more than that; the message names it.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    # torch raises anything from EOFError to UnpicklingError for broken files
    except Exception as error:
        found = re.search(r"(?i)unsupported (?:global: )?GLOBAL (\S+)", str(error))
        reason = (
            _REFUSED.format(found[1], "tensors and plain containers")
            if found
            else f"{type(error).__name__}: {error}"
        )
        raise ValueError(f"{str(path)!r} cannot be read as tensors: {reason}") from error


# --- Pickled arrays: detectron2's model zoo -------------------------------------------------------


def read_pickled_arrays(path: str | os.PathLike[str]) -> Any:
    """Read a pickle of numbers, texts, numeric numpy arrays and dicts, lists and tuples of them.

    This is what detectron2's model zoo (``.pkl``) holds, also the files written by Python 2.
    Numpy's own unpickling is not used either: an array is made from its bytes.

    Raises:
        ValueError: the file is no such pickle, or names a function or a class, which is named.
    """
    try:
        with open(path, "rb") as file:
            return _without_placeholders(_ArrayUnpickler(file, encoding="latin1").load())
    # a damaged pickle makes the unpickler raise almost anything
    except Exception as error:
        raise ValueError(f"{str(path)!r} cannot be read as arrays: {_reason(error)}") from error


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        found = _ARRAY_GLOBALS.get((module_name, global_name))
        if found is None:
            refused = f"{module_name}.{global_name}"
            raise pickle.UnpicklingError(_REFUSED.format(refused, "arrays and plain containers"))
        return found


class _Dtype:
    """Stands for ``numpy.dtype``; numbers and truth values only."""

    def __init__(self, code: str | bytes, *_: object) -> None:
        code = code.decode("latin1") if isinstance(code, bytes) else code
        self.value = np.dtype(str(code))
        if self.value.kind not in "biufc":
            raise ValueError(f"an array of {self.value}; expected numbers")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.value = self.value.newbyteorder(state[1])


class _Array:
    """Stands for an array, and for numpy's functions and class that make an empty one."""

    def __init__(self, *_: object) -> None:
        self.value: npt.NDArray[Any] = np.zeros(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, is_fortran, content = state
        self.value = _array_of(content, dtype, shape, "F" if is_fortran else "C")


class _Scalar:
    """Stands for ``numpy.core.multiarray.scalar``."""

    def __init__(self, dtype: _Dtype, content: str | bytes) -> None:
        self.value = _array_of(content, dtype, (), "C")[()]


class _ArrayFromBuffer:
    """Stands for the function that newer pickles make arrays with."""

    def __init__(self, content: Any, dtype: _Dtype, shape: tuple[int, ...], order: str) -> None:
        self.value = _array_of(content, dtype, shape, order)


class _Bytes:
    """Stands for what Python 3 writes bytes into old pickles with: encode, or bytes if empty."""

    def __init__(self, text: str = "", encoding: str = "latin1") -> None:
        if encoding not in ("latin1", "latin-1"):
            raise ValueError(f"bytes in the encoding {encoding!r}")
        self.value = text.encode("latin1")


_PLACEHOLDERS = (_Dtype, _Array, _Scalar, _ArrayFromBuffer, _Bytes)
_ARRAY_GLOBALS: dict[_Global, Any] = {
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _Array,
    ("_codecs", "encode"): _Bytes,
    ("__builtin__", "bytes"): _Bytes,
    ("collections", "OrderedDict"): OrderedDict,
}
for _numpy in ("numpy.core", "numpy._core"):
    _ARRAY_GLOBALS[f"{_numpy}.multiarray", "_reconstruct"] = _Array
    _ARRAY_GLOBALS[f"{_numpy}.multiarray", "scalar"] = _Scalar
    _ARRAY_GLOBALS[f"{_numpy}.numeric", "_frombuffer"] = _ArrayFromBuffer


def _array_of(content: Any, dtype: Any, shape: tuple[int, ...], order: Any) -> npt.NDArray[Any]:
    if isinstance(content, _Bytes):
        content = content.value
    if isinstance(content, str):  # bytes of Python 2, read as latin1
        content = content.encode("latin1")
    if not isinstance(dtype, _Dtype):
        raise ValueError("an array without a type")
    array = np.frombuffer(content, dtype.value).reshape(shape, order=order)
    return array.astype(dtype.value.newbyteorder("="))  # a copy, writable, in this machine's order


def _without_placeholders(value: Any) -> Any:
    if isinstance(value, _PLACEHOLDERS):
        return value.value
    if isinstance(value, dict):
        return {_without_placeholders(k): _without_placeholders(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_without_placeholders, value))
    if isinstance(value, type):
        raise ValueError(f"the class {value.__name__} as a value")
    return value


# --- TorchScript archives: OpenAI's CLIP ----------------------------------------------------------


def is_torchscript(path: str | os.PathLike[str]) -> bool:
    """Return whether a file is an archive as ``torch.jit.save`` writes it."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_torchscript_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the parameters and buffers of a TorchScript archive; its code is not even compiled.

    ``torch.jit.load`` runs the methods ``__setstate__`` of the archive, which may write files.

    Args:
        path: what ``torch.jit.save`` wrote, of PyTorch 1.6 or newer.

    Returns:
        The same as ``torch.jit.load(path).state_dict()``, on the CPU.

    Raises:
        ValueError: the file is no such archive, or holds more than modules and plain values.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            (data,) = (n for n in archive.namelist() if re.fullmatch(r"[^/]+/data\.pkl", n))
            reader = _ScriptUnpickler(archive, data.removesuffix("data.pkl"))
            module = reader.load()
        if not isinstance(module, _Module):
            raise ValueError(f"a {type(module).__name__}; expected a module")
        return dict(_tensors_of(module, ""))
    # a damaged archive makes zipfile and the unpickler raise almost anything
    except Exception as error:
        raise ValueError(
            f"{str(path)!r} cannot be read as a TorchScript archive: {_reason(error)}"
        ) from error


class _Module:
    """Stands for every class of an archive: keeps what the archive sets, and does nothing."""

    tensor_names: frozenset[str] | None = None  # of parameters and buffers; None: not said
    state: Mapping[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise ValueError(f"a module whose state is a {type(state).__name__}")
        self.state = state


class _ScriptUnpickler(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, folder: str) -> None:
        self._archive, self._folder = archive, folder
        self._names = set(archive.namelist())
        self._storages: dict[str, Tensor] = {}
        self._classes: dict[_Global, type[_Module]] = {}
        byteorder = f"{folder}byteorder"
        if byteorder in self._names and archive.read(byteorder).decode() != sys.byteorder:
            raise ValueError("written on a machine with another byte order")
        file: IO[bytes] = archive.open(f"{folder}data.pkl")
        super().__init__(file)

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        key = (module_name, global_name)
        if module_name.split(".")[0] == _SCRIPT:
            if key not in self._classes:
                names = {"tensor_names": self._tensor_names(*key)}
                self._classes[key] = type("_ArchivedModule", (_Module,), names)
            return self._classes[key]
        if key not in _SCRIPT_GLOBALS:
            refused = f"{module_name}.{global_name}"
            raise pickle.UnpicklingError(_REFUSED.format(refused, "tensors and modules"))
        return _SCRIPT_GLOBALS[key]

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, _, count = pid
        name = f"{self._folder}data/{key}"
        if name not in self._storages:
            content = bytearray(self._archive.read(name))
            values = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0)
            if len(values) != count:
                raise ValueError(f"{name} has {len(values)} values, {count} are announced")
            self._storages[name] = values.to(dtype)
        return self._storages[name]

    def _tensor_names(self, module_name: str, class_name: str) -> frozenset[str] | None:
        """Names of a class's parameters and buffers, which its source lists; it is not run."""
        source = f"{self._folder}code/{module_name.replace('.', '/')}.py"
        if source not in self._names:
            return None
        text = self._archive.read(source).decode()
        body = re.search(rf"^class {re.escape(class_name)}\(Module\):\n((?:  .*\n)*)", text, re.M)
        lists = re.findall(
            r"^  __(?:parameters|buffers)__ = (\[.*\])$", body[1] if body else "", re.M
        )
        if not lists:
            return None
        return frozenset(str(name) for names in lists for name in ast.literal_eval(names))


def _rebuild_tensor(
    storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object
) -> Tensor:
    return storage.as_strided(size, stride, offset).clone()


def _first(value: Any, *_: object) -> Any:
    return value


_SCRIPT_GLOBALS: dict[_Global, Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "device"): _first,
    **{
        ("torch.jit._pickle", name): _first
        for name in (
            "build_intlist",
            "build_doublelist",
            "build_boollist",
            "build_tensorlist",
            "restore_type_tag",
        )
    },
    **{
        ("torch", f"{name}Storage"): dtype
        for name, dtype in {
            "Double": torch.float64,
            "Float": torch.float32,
            "Half": torch.float16,
            "BFloat16": torch.bfloat16,
            "Long": torch.int64,
            "Int": torch.int32,
            "Short": torch.int16,
            "Char": torch.int8,
            "Byte": torch.uint8,
            "Bool": torch.bool,
        }.items()
    },
}


def _tensors_of(module: _Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, value in module.state.items():
        if isinstance(value, _Module):
            yield from _tensors_of(value, f"{prefix}{name}.")
        elif isinstance(value, Tensor) and (
            module.tensor_names is None or name in module.tensor_names
        ):
            yield f"{prefix}{name}", value


# --- Hashes ---------------------------------------------------------------------------------------

# Published file names that carry the first digits of the file's hash.
_HASHED_NAMES: tuple[tuple[str, str], ...] = (
    # torch.hub's convention: resnet50-0676ba61.pth
    (r"-([0-9a-f]{8,64})\.[a-z]+$", "sha256"),
    # detectron2's MODEL_ZOO.md: model_final_f10217.pkl
    (r"^model_final_([0-9a-f]{6})\.pkl$", "md5"),
)


def check_hash(path: str | os.PathLike[str], expected: str, algorithm: str = "sha256") -> None:
    """Refuse a file that is not the expected one.

    Args:
        path: the file.
        expected: first digits of its hash, hexadecimal.
        algorithm: a name of :mod:`hashlib`.

    Raises:
        ValueError: the hash differs; the message names the file and both.
    """
    found = file_hash(path, algorithm)
    if not expected or not found.startswith(expected.lower()):
        raise ValueError(
            f"{str(path)!r} is not the expected file: its {algorithm} is {found}, expected "
            f"{expected}{'...' if len(expected) < len(found) else ''}; remove it and get it again"
        )


def check_hash_in_name(path: str | os.PathLike[str]) -> bool:
    """Check a downloaded file whose published name carries the first digits of its hash.

    Returns:
        Whether the name carries any.

    Raises:
        ValueError: it does, and they differ.
    """
    for pattern, algorithm in _HASHED_NAMES:
        if digits := re.search(pattern, Path(path).name):
            check_hash(path, digits[1], algorithm)
            return True
    return False


def file_hash(path: str | os.PathLike[str], algorithm: str = "sha256") -> str:
    """Compute a file's hash, hexadecimal."""
    make: Callable[[], Any] = lambda: hashlib.new(algorithm, usedforsecurity=False)  # noqa: E731
    with open(path, "rb") as file:
        return hashlib.file_digest(file, make).hexdigest()


def _reason(error: Exception) -> str:
    text = str(error) or "no text"
    return text if isinstance(error, pickle.UnpicklingError) else f"{type(error).__name__}: {text}"
