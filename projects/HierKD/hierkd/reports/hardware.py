"""What figures were measured on."""

from __future__ import annotations

import platform
import re
from pathlib import Path

__all__ = ["processor_name"]


def processor_name() -> str:
    """The processor's name, as the system gives it; "" if it does not."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()
