"""Memory that glibc's allocator keeps, so that the maps of a network find their pages again.

PyTorch has no cache of its own on a CPU. glibc gives a block of many megabytes back to the system
as soon as it is freed, and the next layer's map has all its pages faulted in and cleared anew: each
layer of each step, and the more the larger the maps are. Kept, they are faulted in once.
"""

from __future__ import annotations

import ctypes
import os

__all__ = ["keep_freed_memory"]

# mallopt's parameters, from glibc's malloc.h, and the values that turn them off
_TRIM_THRESHOLD, _NEVER = -1, -1
_MMAP_MAX, _NONE = -4, 0
# Who sets one of these has decided; GLIBC_TUNABLES may.
_DECIDED = (
    "MALLOC_MMAP_MAX_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_TOP_PAD_",
)


def keep_freed_memory() -> bool:
    """Keep what is freed in this process, from now on, for the allocations to come.

    The process stays at its peak of resident memory. Meant for a command that owns its process; a
    library has no business doing this. Another allocator (jemalloc, tcmalloc) is not concerned.

    Returns:
        Whether it is so: False where the C library is not glibc, or where the environment says how
        glibc is to allocate.
    """
    told = any(name in os.environ for name in _DECIDED)
    if told or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    return _set(_MMAP_MAX, _NONE) and _set(_TRIM_THRESHOLD, _NEVER)


def _set(parameter: int, value: int) -> bool:
    """Call ``mallopt``; musl, macOS and Windows have none."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(parameter, value))
