"""Freed memory is kept or given back, as page faults tell; in processes of their own."""

import os
import subprocess
import sys

import pytest

from hierkd.training import cpu_memory

# The module by itself: the package would bring PyTorch. A kept answer, then the page faults.
ALLOCATE_AGAIN = """
import resource, runpy, sys

module = runpy.run_path(sys.argv[1])
kept = sys.argv[2] == "keep" and module["keep_freed_memory"]()
for _ in range(3):
    b"x" * 2**26
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    b"x" * 2**26  # 64 MiB: 16,384 pages of 4 KiB, or 32 of 2 MiB
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc is Linux's")


def allocate(way, **environment):
    """Whether memory was kept in a new process, and the page faults of five allocations."""
    undecided = {name: text for name, text in os.environ.items() if "MALLOC" not in name.upper()}
    done = subprocess.run(
        [sys.executable, "-c", ALLOCATE_AGAIN, cpu_memory.__file__, way],
        env={**undecided, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    kept, faults = done.stdout.split()
    return kept == "True", int(faults)


@on_linux
def test_pages_are_found_again():
    kept, faults = allocate("keep")
    if not kept:
        pytest.skip("this C library is not glibc")
    _, otherwise = allocate("leave")
    assert otherwise >= 5 * 32
    assert faults < otherwise / 20


@on_linux
@pytest.mark.parametrize(
    "decided",
    [{"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=100"}],
)
def test_who_has_decided_is_left_alone(decided):
    assert not allocate("keep", **decided)[0]


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(cpu_memory.ctypes, "CDLL", lambda name: object())
    assert not cpu_memory.keep_freed_memory()
