"""Where this package keeps what it can make anew."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_root"]


def cache_root() -> Path:
    """``$HIERKD_CACHE``; ``~/.cache/hierkd`` where that is not set or empty."""
    return Path(os.environ.get("HIERKD_CACHE") or "~/.cache/hierkd").expanduser()
