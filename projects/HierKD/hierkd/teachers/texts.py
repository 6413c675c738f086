"""Class embeddings in a file: names, rows, and where the rows come from.

`datasets/extract_text_embeddings.py` makes such files; ``MODEL.TEXT_CLASSIFIER.EMBEDDINGS`` uses
them.  This module knows the file and its checks, not CLIP.

Letters: K names · D embedding size.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy

from hierkd.files import replacing

__all__ = [
    "OWN_EMBEDDINGS",
    "TextEmbeddings",
    "check_names",
    "check_provenance",
    "check_template",
    "comparable_name",
    "each_once",
    "load_text_embeddings",
    "make_text_embeddings",
    "read_templates",
    "read_text_lines",
    "save_text_embeddings",
]

logger = logging.getLogger(__name__)

OWN_EMBEDDINGS = "vocabulary.safetensors"  # what a training leaves in its folder

_FORMAT = 2
_SUFFIX = ".safetensors"
_MAX_NAMED = 5  # offenders that a message names before it only counts them
# Characters. A longer name is a list that was not taken apart: CLIP reads some 300. [ours]
_MAX_NAME_LENGTH = 500
_UNIT_TOLERANCE = 1e-3
# What a file says of its origin.
_PROVENANCE = ("templates", "clip", "weights_sha256", "background_prompt", "version")

FloatArray = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True, eq=False)
class TextEmbeddings:
    """Embeddings of K class names with their provenance.

    Attributes:
        names: K class names, each once.
        embeddings: (K, D) float32, L2-normalised.
        templates: prompts with one "{}" each; a row is the normalised mean of their embeddings.
        clip: name of the CLIP, or of its weights file.
        weights_sha256: SHA-256 (hex) of its weights.
        background_prompt: text of `background_embedding`.
        background_embedding: (D,) float32, L2-normalised.
        version: of this package, when the file was made.
        path: of the file, once it has one; not stored.
    """

    names: tuple[str, ...]
    embeddings: FloatArray
    templates: tuple[str, ...] = ()
    clip: str = ""
    weights_sha256: str = ""
    background_prompt: str = ""
    background_embedding: FloatArray | None = None
    version: str = ""
    path: str = ""

    @property
    def embed_dim(self) -> int:
        """D."""
        return int(self.embeddings.shape[1])

    def rows_of(self, names: Sequence[str]) -> FloatArray:
        """Rows of these names, in their order -> (len(names), D).

        Raises:
            ValueError: some names are not in the file.
        """
        row_of = {name: row for row, name in enumerate(self.names)}
        missing = [name for name in names if name not in row_of]
        if missing:
            raise ValueError(
                f"{self.path}: no embedding of {_some(missing)}: it holds {len(self.names)} other "
                "names; make it anew with datasets/extract_text_embeddings.py --names, or set "
                'MODEL.TEXT_CLASSIFIER.EMBEDDINGS to "" to let CLIP encode the names'
            )
        rows: FloatArray = self.embeddings[[row_of[name] for name in names]]
        return rows


# --- Making ---------------------------------------------------------------------------------------


def make_text_embeddings(
    names: Sequence[str],
    rows: FloatArray,
    *,
    background: FloatArray | None = None,
    **provenance: Any,
) -> TextEmbeddings:
    """Put names, their rows (K, D) and the background's (D,), all L2-normalised, together.

    ``provenance`` are other attributes of `TextEmbeddings`.

    Raises:
        ValueError: see `check_names`.
    """
    check_names(names, "the names")
    return TextEmbeddings(tuple(names), rows, background_embedding=background, **provenance)


def check_names(names: Sequence[str], names_from: str) -> None:
    """Check a list of class names.

    Args:
        names: K class names.
        names_from: what errors call them.

    Raises:
        ValueError: there are none; one is not a text, is blank or invisible, holds a control
            character or half a character, or is longer than a name can be; or two are the same to
            CLIP, which would share the probability of one class.
    """
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{names_from}: expected a list of names, found {str(names)[:100]!r}")
    if not names:
        raise ValueError(f"{names_from}: no names, the list is empty")
    for found, wrong in (
        (
            "blank names",
            [not any(each.isprintable() and not each.isspace() for each in name) for name in names],
        ),
        (
            "names with line breaks, control characters or halves of characters",
            [any(unicodedata.category(each) in ("Cc", "Cs") for each in name) for name in names],
        ),
        (
            f"names of more than {_MAX_NAME_LENGTH} characters",
            [len(name) > _MAX_NAME_LENGTH for name in names],
        ),
    ):
        if any(wrong):
            positions = np.flatnonzero(wrong)[:_MAX_NAMED].tolist()
            first = names[positions[0]][:100]
            raise ValueError(
                f"{names_from}: {found} at positions {', '.join(map(str, positions))}: {first!r}"
            )
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"{names_from}: repeats {_some(repeated)}; each name must occur once")
    first_of: dict[str, str] = {}
    for name in names:
        if (other := first_of.setdefault(_as_clip_reads(name), name)) != name:
            raise ValueError(
                f"{names_from}: {other!r} and {name!r} are one name to CLIP, which reads neither "
                "capitals, surplus blanks nor ways to write an accent; keep one"
            )


def each_once(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Part names into those that CLIP reads as no earlier one, and the others."""
    first: dict[str, str] = {}
    repeated = []
    for name in names:
        if (read := _as_clip_reads(name)) in first:
            repeated.append(name)
        else:
            first[read] = name
    return list(first.values()), repeated


def _as_clip_reads(name: str) -> str:
    """A name without what CLIP does not read: capitals, surplus blanks, ways to write an accent."""
    return " ".join(unicodedata.normalize("NFC", name).lower().split())


@lru_cache(maxsize=2**16)
def comparable_name(name: str) -> str:
    """A name without capitals, "_", "-", a plural s, and what stands in parentheses.

    Names that agree in this are taken for the same class; synonyms ("sofa", "couch") do not.
    """
    text = re.sub(r"\(.*?\)", " ", name.lower())
    plain = " ".join(re.split(r"[\s_-]+", text.strip())) or name.lower()
    is_plural = len(plain) > 3 and plain.endswith("s") and plain[-2] not in "su"
    return plain[:-1] if is_plural else plain


def check_template(template: str, key: str = "MODEL.TEXT_CLASSIFIER.TEMPLATE") -> None:
    """Raise ValueError unless the prompt has one "{}", and no other brace, for the class name."""
    around = template.split("{}")
    if len(around) != 2 or any(brace in part for part in around for brace in "{}"):
        raise ValueError(f"{key}: expected one {{}} for the class name, found {template!r}")


# --- Files ----------------------------------------------------------------------------------------


def save_text_embeddings(stored: TextEmbeddings, path: str | os.PathLike[str]) -> None:
    """Write a .safetensors file, whole or not at all.

    It holds ``embeddings`` (K, D) and maybe ``background_embedding`` (D,), float32; names and
    provenance are JSON in its header.

    Raises:
        ValueError: `path` does not end in ".safetensors".
    """
    path = Path(path)
    if path.suffix != _SUFFIX:
        raise ValueError(f"{path}: text embeddings are stored as {_SUFFIX}")
    arrays = {"embeddings": stored.embeddings}
    if stored.background_embedding is not None:
        arrays["background_embedding"] = stored.background_embedding
    about = {field: getattr(stored, field) for field in _PROVENANCE}
    header = {
        "names": json.dumps(stored.names),
        "provenance": json.dumps({"format": _FORMAT, **about}),
    }
    with replacing(path) as making:
        making.write_bytes(safetensors.numpy.save(arrays, header))


def load_text_embeddings(path: str | os.PathLike[str]) -> TextEmbeddings:
    """Read what `save_text_embeddings` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a file, or its content contradicts itself.
    """
    path = str(path)
    make = "make it with datasets/extract_text_embeddings.py"
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"MODEL.TEXT_CLASSIFIER.EMBEDDINGS: no file {path!r} (looked from {os.getcwd()!r}); "
            f"{make}"
        )
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no dict)
            header = file.metadata() or {}
        found = json.loads(header["provenance"])
        if found["format"] != _FORMAT:
            raise ValueError(f"format {found['format']}, this package reads {_FORMAT}")
        about = {field: found[field] for field in _PROVENANCE}
        about |= {"templates": tuple(about["templates"]), "path": path}
        stored = TextEmbeddings(tuple(json.loads(header["names"])), **arrays, **about)
    # safetensors raises an error of its own; a file of others lacks keys or has other ones
    except Exception as error:
        raise ValueError(
            f"{path} is not a file of text embeddings ({type(error).__name__}: {error}); {make}"
        ) from error
    check_names(stored.names, path)
    rows, background = stored.embeddings, stored.background_embedding
    fits = rows.ndim == 2 and len(rows) == len(stored.names)
    if not fits or (background is not None and background.shape != rows.shape[1:]):
        raise ValueError(
            f"{path}: {len(stored.names)} names, embeddings of shape {rows.shape}, and the "
            f"background's of {None if background is None else background.shape}; {make}"
        )
    norms = np.linalg.norm(rows if background is None else [*rows, background], axis=1)
    if rows.dtype != np.float32 or not (abs(norms - 1) < _UNIT_TOLERANCE).all():
        raise ValueError(f"{path}: the embeddings are not normalised float32; {make}")
    return stored


def check_provenance(
    stored: TextEmbeddings, *, weights: str, weights_sha256: str | None, templates: Sequence[str]
) -> None:
    """Refuse embeddings that were made with another CLIP or other prompts than a config names.

    Weights that are not at hand are a warning.

    Args:
        stored: embeddings with their provenance.
        weights: MODEL.TEACHER.WEIGHTS.
        weights_sha256: SHA-256 (hex) of these weights, None if they are not at hand.
        templates: the config's.

    Raises:
        ValueError: names the file and both sides.
    """
    if weights_sha256 is None:
        logger.warning(
            "%s is used unchecked: MODEL.TEACHER.WEIGHTS %r is not at hand", stored.path, weights
        )
    elif stored.weights_sha256 != weights_sha256:
        raise ValueError(
            f"{stored.path}: made with the CLIP {stored.clip!r} (SHA-256 "
            f"{stored.weights_sha256[:12]}...), but MODEL.TEACHER.WEIGHTS is {weights!r} (SHA-256 "
            f"{weights_sha256[:12]}...): name that CLIP, make the file anew with "
            'datasets/extract_text_embeddings.py, or set MODEL.TEXT_CLASSIFIER.EMBEDDINGS to ""'
        )
    if stored.templates != tuple(templates):
        raise ValueError(
            f"{stored.path}: made with the templates {list(stored.templates)}, but "
            f"MODEL.TEXT_CLASSIFIER.TEMPLATES (or TEMPLATE) says {list(templates)}: make "
            "the file anew with datasets/extract_text_embeddings.py, or set the key to its own"
        )


def read_templates(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Read prompt templates: one a line, blank lines and lines that begin with "#" left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no text or holds no template, or a line, which is named, has not exactly
            one "{}".
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no file {str(path)!r} (looked from {os.getcwd()!r}): expected one prompt template a "
            "line"
        )
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: cannot be read as text ({error})") from error
    templates = []
    for number, line in enumerate(lines, start=1):
        if line.strip() and not line.strip().startswith("#"):
            check_template(line.strip(), f"{path}, line {number}")
            templates.append(line.strip())
    if not templates:
        raise ValueError(f"{path}: no templates; expected one a line, with {{}} for the class name")
    return tuple(templates)


def read_text_lines(path: str | os.PathLike[str]) -> list[str]:
    """Read names: a .json with a list of texts, else a text file with one a line.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no text, or no list of texts, is empty or has a blank or repeated entry.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}: expected one name a line, or a JSON list")
    try:
        content = path.read_text(encoding="utf-8-sig")
        entries = json.loads(content) if path.suffix == ".json" else content.rstrip().split("\n")
    except ValueError as error:  # includes UnicodeDecodeError and JSONDecodeError
        raise ValueError(f"{path}: cannot be read as text ({error})") from error
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise ValueError(f"{path}: expected a JSON list of texts")
    entries = [entry.strip() for entry in entries]
    check_names([] if entries == [""] else entries, str(path))
    return entries


# --- Small things ---------------------------------------------------------------------------------


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(map(repr, names[:_MAX_NAMED])) + more
