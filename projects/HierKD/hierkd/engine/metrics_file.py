"""detectron2's ``metrics.json``, also of runs that were killed while they wrote it."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

__all__ = ["mend_metrics", "read_metric_lines"]

logger = logging.getLogger(__name__)


def read_metric_lines(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read the file line by line; a last line that was not written to its end is left out.

    A resumed run appends, so what was done twice is there twice: the later line counts.

    Args:
        path: of ``metrics.json``, one JSON object a line.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a line is not JSON; the line is named.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no metrics of a training run")
    lines = Path(path).read_bytes().split(b"\n")
    if lines.pop():
        logger.warning("%s: left out the last line, which was not written to its end", path)
    entries = []
    for number, line in enumerate(lines, start=1):
        try:
            entries.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
    return entries


def mend_metrics(path: str | os.PathLike[str]) -> None:
    """Cut off a last line that was not written to its end, before more lines are appended.

    Args:
        path: of ``metrics.json``; need not exist.
    """
    if not Path(path).is_file():
        return
    content = Path(path).read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
        logger.warning("%s: cut off the last line, which was not written to its end", path)
