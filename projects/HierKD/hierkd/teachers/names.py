"""Class names compared by spelling: which of a vocabulary's names training knew."""

from __future__ import annotations

import re
from functools import lru_cache

__all__ = ["comparable_name"]


@lru_cache(maxsize=2**16)
def comparable_name(name: str) -> str:
    """A name without capitals, "_", "-", a plural s, and what stands in parentheses.

    Names that agree in this are taken for the same class; synonyms ("sofa", "couch") do not.
    """
    text = re.sub(r"\(.*?\)", " ", name.lower())
    plain = " ".join(re.split(r"[\s_-]+", text.strip())) or name.lower()
    is_plural = len(plain) > 3 and plain.endswith("s") and plain[-2] not in "su"
    return plain[:-1] if is_plural else plain
