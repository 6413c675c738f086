"""Writing files whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["remove_unfinished", "replacing"]


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
