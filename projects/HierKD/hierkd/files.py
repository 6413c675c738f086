"""Files: written whole or not at all, read without running anything that they hold.

A pickle is a program, and so is a TorchScript archive: loading either the usual way runs it. Here
arrays and tensors are taken out of the file, and everything else is refused by name.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "cache_root",
    "file_hash",
    "is_torchscript",
    "read_pickled_arrays",
    "read_torch_file",
    "read_torchscript_state_dict",
    "replacing",
    "write_json_atomically",
]


def cache_root() -> Path:
    """``$HIERKD_CACHE``; ``~/.cache/hierkd`` where that is not set or empty."""
    return Path(os.environ.get("HIERKD_CACHE") or "~/.cache/hierkd").expanduser()


@contextmanager
def replacing(path: str | os.PathLike[str], *, durable: bool = False) -> Iterator[Path]:
    """Give a temporary path in the same folder, which replaces ``path`` when the block ends well.

    Missing parent folders are made. After an error ``path`` is what it was, and nothing is left.

    Args:
        path: the file to write.
        durable: a power cut cannot leave an empty file either: the content is on the disk before
            it gets its name, and the name before this returns.
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


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json_atomically(path: str | os.PathLike[str], content: object) -> bool:
    """Write ``content`` as compact JSON by :func:`replacing`, if ``path`` holds anything else.

    Returns:
        Whether the file is new or has changed.
    """
    data = (json.dumps(content, separators=(",", ":")) + "\n").encode()
    path = Path(path)
    if path.is_file() and path.read_bytes() == data:
        return False
    with replacing(path) as temporary:
        temporary.write_bytes(data)
    return True


def read_torch_file(path: str | os.PathLike[str]) -> Any:
    """Read what ``torch.save`` wrote: tensors, numbers, texts and containers of them, on the CPU.

    Raises:
        ValueError: the file is no such file, or needs more than that; the message names it.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # anything from EOFError to UnpicklingError
        found = re.search(r"(?i)unsupported (?:global: )?GLOBAL (\S+)", str(error))
        reason = _refusal(found[1]) if found else _reason(error)
        raise ValueError(f"{str(path)!r} cannot be read as tensors: {reason}") from error


# --- Pickled arrays: detectron2's model zoo -------------------------------------------------------


def read_pickled_arrays(path: str | os.PathLike[str]) -> Any:
    """Read a pickle of numbers, texts, numeric numpy arrays and dicts, lists and tuples of them.

    This is what detectron2's model zoo (``.pkl``) holds, also the files written by Python 2.

    Raises:
        ValueError: the file is no such pickle, or names a function or a class, which is named.
    """
    try:
        with open(path, "rb") as file:
            return _ArrayUnpickler(file, encoding="latin1").load()
    except Exception as error:  # a damaged pickle makes the unpickler raise almost anything
        raise ValueError(f"{str(path)!r} cannot be read as arrays: {_reason(error)}") from error


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        name = f"{module_name}.{global_name}".replace("numpy._core.", "numpy.core.")
        if name not in _ARRAY_GLOBALS:
            raise pickle.UnpicklingError(_refusal(name))
        return _ARRAY_GLOBALS[name]


class _NumberType:
    """Stands for ``numpy.dtype``, whose state could declare the bytes of an array to be objects."""

    def __init__(self, code: str, *_: object) -> None:
        self.dtype = np.dtype(str(code))
        if self.dtype.kind not in "biufc":
            raise ValueError(f"an array of {self.dtype}; expected numbers")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray[Any, Any]):
    """An array that takes its values from bytes alone."""

    def __setstate__(self, state: tuple[Any, ...], /) -> None:
        version, shape, number, is_fortran, content = state
        content = content.encode("latin1") if isinstance(content, str) else content  # Python 2's
        super().__setstate__((version, shape, number.dtype, is_fortran, content))


def _from_buffer(content: Any, number: _NumberType, shape: tuple[int, ...], order: str) -> Any:
    content = content.encode("latin1") if isinstance(content, str) else content
    values = np.frombuffer(content, number.dtype).reshape(shape, order=order)  # type: ignore[call-overload]
    return values.astype(number.dtype.newbyteorder("="))


def _encode(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise ValueError(f"bytes in the encoding {encoding!r}")
    return text.encode("latin1")


_ARRAY_GLOBALS: dict[str, Any] = {
    "numpy.dtype": _NumberType,
    "numpy.ndarray": _Array,
    "numpy.core.multiarray._reconstruct": lambda *_: _Array((0,)),
    "numpy.core.multiarray.scalar": lambda number, raw: _from_buffer(raw, number, (), "C")[()],
    "numpy.core.numeric._frombuffer": _from_buffer,
    "_codecs.encode": _encode,  # how Python 3 writes bytes into old pickles
    "__builtin__.bytes": bytes,
    "collections.OrderedDict": OrderedDict,
}


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

    Returns:
        The same as ``torch.jit.load(path).state_dict()``, on the CPU.

    Raises:
        ValueError: the file is no such archive, or holds more than modules and plain values.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            (data,) = (n for n in archive.namelist() if re.fullmatch(r"[^/]+/data\.pkl", n))
            return dict(_ScriptUnpickler(archive, data.removesuffix("data.pkl")).load().tensors())
    except Exception as error:  # a damaged archive makes zipfile and the unpickler raise anything
        raise ValueError(
            f"{str(path)!r} cannot be read as a TorchScript archive: {_reason(error)}"
        ) from error


class _Module:
    """Stands for every class of an archive: keeps what the archive sets, and does nothing."""

    tensor_names: tuple[str, ...] = ()  # of parameters and buffers
    state: Mapping[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict):
            raise ValueError(f"a module whose state is a {type(state).__name__}")
        self.state = state

    def tensors(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        for name, value in self.state.items():
            if isinstance(value, _Module):
                yield from value.tensors(f"{prefix}{name}.")
            elif name in self.tensor_names:
                yield f"{prefix}{name}", value


class _ScriptUnpickler(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile, folder: str) -> None:
        super().__init__(archive.open(f"{folder}data.pkl"))
        self._archive, self._folder = archive, folder
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        name = f"{module_name}.{global_name}"
        if name.startswith("__torch__."):  # where the classes of an archive live
            names = {"tensor_names": self._tensor_names(module_name, global_name)}
            return type("_ArchivedModule", (_Module,), names)
        if name not in _SCRIPT_GLOBALS:
            raise pickle.UnpicklingError(_refusal(name))
        return _SCRIPT_GLOBALS[name]

    def persistent_load(self, pid: Any) -> Tensor:
        _, dtype, key, *_ = pid
        if key not in self._storages:
            content = bytearray(self._archive.read(f"{self._folder}data/{key}"))
            self._storages[key] = torch.frombuffer(content, dtype=dtype)
        return self._storages[key]

    def _tensor_names(self, module_name: str, class_name: str) -> tuple[str, ...]:
        """Names of a class's parameters and buffers, which its source lists; it is not run."""
        source = f"{self._folder}code/{module_name.replace('.', '/')}.py"
        text = self._archive.read(source).decode()
        body = re.search(rf"^class {re.escape(class_name)}\(Module\):\n((?:  .*\n)*)", text, re.M)
        listed = r"^  __(?:parameters|buffers)__ = (\[.*\])$"
        lists = re.findall(listed, body[1], re.M) if body else []
        return tuple(str(name) for names in lists for name in ast.literal_eval(names))


def _rebuild_tensor(
    storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object
) -> Tensor:
    return storage.as_strided(size, stride, offset).clone()


_STORED = ("double", "float", "half", "long", "int", "bool")  # kinds of numbers
_PASSED_ON = (
    *("torch.device", "torch.jit._pickle.restore_type_tag"),
    *(f"torch.jit._pickle.build_{kind}list" for kind in ("int", "double", "bool", "tensor")),
)
_SCRIPT_GLOBALS: dict[str, Any] = {
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "collections.OrderedDict": OrderedDict,
    **{f"torch.{kind.title()}Storage": getattr(torch, kind) for kind in _STORED},
    **dict.fromkeys(_PASSED_ON, lambda value, *_: value),
}


def _refusal(name: str) -> str:
    return f"it holds {name}, which would run code when it is loaded; only numbers are read"


def _reason(error: Exception) -> str:
    text = str(error) or "no text"
    return text if isinstance(error, pickle.UnpicklingError) else f"{type(error).__name__}: {text}"


# --- Hashes ---------------------------------------------------------------------------------------


def file_hash(path: str | os.PathLike[str]) -> str:
    """Compute a file's SHA-256, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
