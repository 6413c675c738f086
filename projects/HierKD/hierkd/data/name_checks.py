"""Whether CLIP can make sense of class names: spelling, length, and names that it confuses."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor

from hierkd.teachers.protocol import TokenCounter

__all__ = ["check_embeddings", "check_spelling", "check_tokens"]

# Two names whose text embeddings have at least this cosine are one class to CLIP. [ours: with
# ViT-B/32 no two of the 1,203 names of LVIS come closer than 0.965 ("book", "hardback book"), while
# two spellings of one name, "wine glass" and "wineglass", have 0.982]
SAME_COSINE = 0.98
_MAX_NAMED = 8


def check_spelling(names: Sequence[str]) -> list[str]:
    """Names that are spelt as an identifier, not as words.

    Returns:
        A sentence per finding; empty if all is well.
    """
    lower = {name.lower() for name in names}
    findings = {
        "names written with '_' (clean_names: true reads it as a space)": [
            name for name in names if "_" in name
        ],
        "names written as oneWord": [
            name for name in names if re.search(r"[a-z][A-Z]", name) and "_" not in name
        ],
        "names that look like codes": [
            name for name in names if re.search(r"\d", name) or not re.search(r"[^\W\d_]{2}", name)
        ],
        "names with letters beyond English, which CLIP hardly read": [
            name for name in names if not name.isascii()
        ],
        "names with a comma or slash (CLIP is asked for the whole)": [
            name for name in names if re.search(r"[,/;|]", name)
        ],
        "names in singular and plural": [
            name for name in names if name.lower().endswith("s") and name.lower()[:-1] in lower
        ],
        "names with blanks at an end or twice": [
            name for name in names if name != " ".join(name.split())
        ],
    }
    return [f"{text}: {_some(found)}" for text, found in findings.items() if found]


def check_tokens(
    names: Sequence[str],
    templates: Sequence[str],
    tokens: TokenCounter,
) -> list[str]:
    """Names whose prompt is longer than CLIP reads, or that hold nothing it reads.

    Args:
        names: K class names.
        templates: Prompts with one "{}".
        tokens: The teacher's tokeniser.
    """
    longest = max(templates, key=len)
    prompts = tokens.count([longest.replace("{}", name) for name in names])
    nothing, *alone = tokens.count(["", *names])
    limit = tokens.context_length
    findings = {
        f"prompts longer than the {limit} tokens that CLIP reads": [
            name for name, number in zip(names, prompts, strict=True) if number > limit
        ],
        "names without anything that CLIP reads": [
            name for name, number in zip(names, alone, strict=True) if number <= nothing
        ],
    }
    return [f"{text}: {_some(found)}" for text, found in findings.items() if found]


def check_embeddings(names: Sequence[str], embeddings: Tensor) -> list[str]:
    """Pairs of names that are nearly the same to CLIP.

    Args:
        names: K class names.
        embeddings: (K, D) L2-normalised.
    """
    cosines = (embeddings @ embeddings.T).triu(diagonal=1)
    pairs = (cosines >= SAME_COSINE).nonzero().tolist()
    pairs.sort(key=lambda pair: -float(cosines[pair[0], pair[1]]))
    found = [f"{names[i]} = {names[j]} ({cosines[i, j]:.3f})" for i, j in pairs]
    text = "names that are nearly the same to CLIP (cosine of their embeddings)"
    return [f"{text}: {_some(found)}"] if found else []


def _some(names: Sequence[str]) -> str:
    more = len(names) - _MAX_NAMED
    return ", ".join(names[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
