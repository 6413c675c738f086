"""What all command lines share."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, ParamSpec, TypeVar

__all__ = ["one_line_errors", "run_command"]

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def one_line_errors(main: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Let a script's ``main`` end with one line and status 2 where its user's input is at fault."""

    @functools.wraps(main)
    def run(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        try:
            return main(*args, **kwargs)
        except (ValueError, OSError, ImportError) as error:
            sys.stderr.write(f"{Path(inspect.getfile(main)).name}: error: {error}\n")
            raise SystemExit(2) from None

    return run


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """End the program with ``main``'s status; after Ctrl-C with one line and 130, as shells do."""
    try:
        status = main()
    except KeyboardInterrupt:
        sys.stderr.write(f"\n{Path(sys.argv[0]).name}: stopped by Ctrl-C\n")
        status = 130
    sys.exit(status)
