"""What all command lines share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

__all__ = ["run_command"]


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """End the program with ``main``'s status; after Ctrl-C with one line and 130, as shells do."""
    try:
        status = main()
    except KeyboardInterrupt:
        sys.stderr.write(f"\n{Path(sys.argv[0]).name}: stopped by Ctrl-C\n")
        status = 130
    sys.exit(status)
