#!/usr/bin/env python
"""Write the hashes of all published archives behind the versions of a lock.

    pip install uv
    python tools/lock_hashes.py requirements/lock.txt requirements/lock-torch.txt

Change a version in a lock, then run this: the comments at the top and the versions stay, the hashes
are PyPI's of today. It needs ``uv`` (https://docs.astral.sh/uv), which asks PyPI for the listed
packages and for nothing else; it downloads no archives of theirs, installs and resolves nothing.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

OPTIONS = [
    "--universal",  # every platform and Python that pyproject.toml allows
    "--no-deps",
    "--generate-hashes",
    "--no-annotate",
    "--no-header",
    "--python-version=3.11",
    "--default-index=https://pypi.org/simple",
]


def split(lock: str) -> tuple[str, str]:
    """Split a lock into the comments at its top and its requirements, the latter without hashes."""
    lines = lock.splitlines(keepends=True)
    start = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    pins = re.sub(r"\s*\\\n\s*--hash=\S+", "", "".join(lines[start:]))
    return "".join(lines[:start]), pins


def add_hashes(lock: Path) -> None:
    """Rewrite a lock with the hashes of its versions."""
    header, pins = split(lock.read_text())
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / lock.name
        source.write_text(pins)
        command = ["uv", "pip", "compile", "--quiet", *OPTIONS, str(source)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"error: {lock}: uv ended with status {done.returncode}; the lock is unchanged")
    lock.write_text(header + done.stdout)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("locks", nargs="+", type=Path, metavar="LOCK")
    args = parser.parse_args(argv)
    if shutil.which("uv") is None:
        parser.error("uv is not installed: pip install uv")
    for lock in args.locks:
        add_hashes(lock)


if __name__ == "__main__":
    main()
