"""Class embeddings in a file: names, rows, and where the rows come from.

`datasets/extract_text_embeddings.py` makes such files, from a CLIP or from an array that somebody
else made; ``MODEL.TEXT_CLASSIFIER.EMBEDDINGS`` uses them.  This module knows the file and its
checks, not CLIP.

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
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy
from torch import Tensor

from hierkd.files import file_hash, read_torch_file, replacing

__all__ = [
    "PROMPT_ENSEMBLE",
    "TextEmbeddings",
    "as_read",
    "check_known_order",
    "check_names",
    "check_provenance",
    "check_rows",
    "check_same_rows",
    "check_template",
    "comparable_name",
    "load_text_embeddings",
    "make_text_embeddings",
    "read_embedding_array",
    "read_templates",
    "read_text_lines",
    "save_text_embeddings",
]

logger = logging.getLogger(__name__)

# Plain phrasings whose embeddings are averaged. [ours; averaging is what CLIP's authors do]
PROMPT_ENSEMBLE = (
    "a photo of a {}.",
    "a picture of a {}.",
    "a close photo of a {}.",
    "a photo of a small {}.",
    "a photo of a {} far away.",
    "there is a {} in the picture.",
    "a {} among other things.",
)

# A row is CLIP's if its cosine with CLIP's own embedding is at least the first figure, and no other
# row is closer by more than the second. [ours: half precision costs less than 0.001; other names,
# templates and CLIPs differ by more than 0.01]
_MIN_COSINE = 0.99
_TIE_COSINE = 1e-4

_FORMAT = 2
_SUFFIX = ".safetensors"
_MAX_NAMED = 5  # offenders that a message names before it only counts them
# Characters. A longer name is a list that was not taken apart: CLIP reads some 300. [ours]
_MAX_NAME_LENGTH = 500
_UNIT_TOLERANCE = 1e-3
_ROUNDING = 1e-6

FloatArray = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True, eq=False)
class TextEmbeddings:
    """Embeddings of K class names with their provenance; "", () and None stand for "unknown".

    Attributes:
        names: K class names, each once.
        embeddings: (K, D) float32, L2-normalised.
        templates: prompts with one "{}" each; a row is the normalised mean of their embeddings.
        clip: name of the CLIP, or of its weights file.
        weights_sha256: SHA-256 (hex) of its weights.
        background_prompt: text of `background_embedding`.
        background_embedding: (D,) float32, L2-normalised.
        source: name of the file of the array that the rows were converted from.
        source_sha256: its SHA-256 (hex).
        verified_rows: how many rows were compared with CLIP's own.
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
    source: str = ""
    source_sha256: str = ""
    verified_rows: int = 0
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
    rows: npt.NDArray[Any],
    *,
    background: npt.NDArray[Any] | None = None,
    rows_from: str = "the embeddings",
    names_from: str = "the names",
    **provenance: Any,
) -> TextEmbeddings:
    """Check rows and names, and normalise the rows.

    Args:
        names: K class names.
        rows: (K, D) floating point, normalised or not.
        background: (D,) embedding of the background prompt.
        rows_from: what errors call the rows, usually a path.
        names_from: what errors call the names.
        **provenance: other attributes of `TextEmbeddings`.

    Raises:
        ValueError: see `check_names` and `check_rows`.
    """
    check_names(names, names_from)
    check_rows(rows, names, rows_from=rows_from, names_from=names_from)
    if background is not None:
        background = np.atleast_2d(background)
        check_rows(
            background,
            ["the background"],
            rows_from="the background's embedding",
            names_from="the background prompt",
            embed_dim=rows.shape[1],
        )
        background = _normalised(background)[0]
    return TextEmbeddings(
        tuple(names), _normalised(rows), background_embedding=background, **provenance
    )


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
        if (other := first_of.setdefault(as_read(name), name)) != name:
            raise ValueError(
                f"{names_from}: {other!r} and {name!r} are one name to CLIP, which reads neither "
                "capitals, surplus blanks nor ways to write an accent; keep one"
            )


def as_read(name: str) -> str:
    """A name as CLIP reads it: without capitals, surplus blanks and ways to write an accent."""
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


def check_rows(
    rows: npt.NDArray[Any],
    names: Sequence[str],
    *,
    rows_from: str,
    names_from: str,
    embed_dim: int | None = None,
) -> None:
    """Raise ValueError unless `rows` can be the embeddings of `names`.

    They must be floating point numbers (K, D), every row finite and not zero. Errors call the rows
    `rows_from`, the names `names_from`.
    """
    if rows.ndim != 2 or rows.dtype.kind != "f":
        raise ValueError(
            f"{rows_from}: expected floating point numbers of shape (K, D), found {rows.dtype} of "
            f"shape {rows.shape}"
        )
    count, size = rows.shape
    if count != len(names):
        turned = " (it looks transposed: D rows, K columns)" if size == len(names) else ""
        raise ValueError(
            f"{rows_from} has {count} rows, but {names_from} has {len(names)} names{turned}"
        )
    if embed_dim is not None and size != embed_dim:
        raise ValueError(f"{rows_from}: embeddings of size {size}, expected {embed_dim}")
    for what, wrong in (
        ("not finite", ~np.isfinite(rows).all(axis=1)),
        ("all zero", ~rows.any(axis=1)),
    ):
        if wrong.any():
            found = [names[row] for row in np.flatnonzero(wrong).tolist()]
            raise ValueError(f"{rows_from}: {what}: the rows of {_some(found)}")


def check_known_order(
    names: Sequence[str], known: Mapping[str, Sequence[str]], names_from: str
) -> None:
    """Raise ValueError if the names are those of a known list, but in another order.

    Arrays of a dataset's class embeddings come in the order of the category ids.

    Args:
        names: as given for an array.
        known: title of a list -> its names in order.
        names_from: what errors call the names.
    """
    for title, order in known.items():
        if len(names) == len(order) and set(names) == set(order) and tuple(names) != tuple(order):
            row = next(i for i, name in enumerate(order) if names[i] != name)
            raise ValueError(
                f"{names_from}: the names of {title}, but not in the order of the category ids, "
                f"in which such arrays come: row {row} is {names[row]!r} instead of "
                f"{order[row]!r}. Put the names into the order of the rows; if they are, prove it "
                "with --verify, or vouch for it with --trust-order"
            )


def check_same_rows(
    stored: TextEmbeddings, rows: Sequence[int], expected: npt.NDArray[np.float32]
) -> None:
    """Compare rows with what CLIP itself gives for their names.

    Args:
        stored: the embeddings in question.
        rows: n row numbers.
        expected: (n, D) CLIP's embeddings of the names of these rows, L2-normalised.

    Raises:
        ValueError: names the rows, and says whether the order is wrong (CLIP's embedding of a name
            is another row) or the rows come from another CLIP or template.
    """
    where = stored.source or stored.path
    if expected.shape[1] != stored.embed_dim:
        raise ValueError(
            f"{where}: embeddings of size {stored.embed_dim}, the CLIP {stored.clip!r} has "
            f"{expected.shape[1]}: another CLIP"
        )
    cosines = expected @ stored.embeddings.T  # (n, K)
    own = cosines[np.arange(len(rows)), list(rows)]
    best = cosines.argmax(axis=1)
    wrong = (own < _MIN_COSINE) | (own < cosines.max(axis=1) - _TIE_COSINE)
    if not wrong.any():
        return
    elsewhere = wrong & (cosines.max(axis=1) >= _MIN_COSINE)
    found = []
    for index in np.flatnonzero(elsewhere if elsewhere.any() else wrong)[:_MAX_NAMED]:
        name = stored.names[rows[index]]
        text = f"row {rows[index]} ({name!r}) has cosine {own[index]:.3f} with CLIP's {name!r}"
        if elsewhere[index]:
            text += f", which is row {best[index]} ({stored.names[best[index]]!r})"
        found.append(text)
    cause = (
        "the names are in another order than the rows"
        if elsewhere.any()
        else f"made by another CLIP than {stored.clip!r}, or with other templates than "
        f"{list(stored.templates)}"
    )
    raise ValueError(
        f"{where}: {cause}; {wrong.sum()} of {len(rows)} compared rows are not CLIP's: "
        f"{'; '.join(found)}"
    )


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
    about = {
        field.name: getattr(stored, field.name)
        for field in dataclasses.fields(stored)
        if field.name not in ("embeddings", "background_embedding", "path", "names")
    }
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
        about = json.loads(header["provenance"])
        if (version := about.pop("format")) != _FORMAT:
            raise ValueError(f"format {version}, this package reads {_FORMAT}")
        about |= {"names": tuple(json.loads(header["names"])), "path": path}
        stored = TextEmbeddings(**arrays, **about | {"templates": tuple(about["templates"])})
    # safetensors raises an error of its own; a file of others lacks keys or has other ones
    except Exception as error:
        raise ValueError(
            f"{path} is not a file of text embeddings ({type(error).__name__}: {error}); {make}"
        ) from error
    check_names(stored.names, path)
    rows, background = stored.embeddings, stored.background_embedding
    check_rows(rows, stored.names, rows_from=path, names_from="its list")
    if background is not None:
        if background.shape != rows.shape[1:]:
            raise ValueError(
                f"{path}: the background's embedding has shape {background.shape}, expected "
                f"{rows.shape[1:]}; {make}"
            )
        rows = np.vstack([rows, background])
    norms = np.linalg.norm(rows, axis=1)
    if rows.dtype != np.float32 or not (abs(norms - 1) < _UNIT_TOLERANCE).all():
        raise ValueError(f"{path}: the embeddings are not normalised float32; {make}")
    return stored


def check_provenance(
    stored: TextEmbeddings, *, weights: str, weights_sha256: str | None, templates: Sequence[str]
) -> None:
    """Refuse embeddings that were made with another CLIP or other prompts than a config names.

    What cannot be compared is a warning.

    Args:
        stored: embeddings with their provenance.
        weights: MODEL.TEACHER.WEIGHTS.
        weights_sha256: SHA-256 (hex) of these weights, None if they are not at hand.
        templates: the config's.

    Raises:
        ValueError: names the file and both sides.
    """
    unknown = []
    if not stored.weights_sha256:
        unknown.append("the file does not say which CLIP made it")
    elif weights_sha256 is None:
        unknown.append(f"MODEL.TEACHER.WEIGHTS {weights!r} is not at hand")
    elif stored.weights_sha256 != weights_sha256:
        raise ValueError(
            f"{stored.path}: made with the CLIP {stored.clip!r} (SHA-256 "
            f"{stored.weights_sha256[:12]}...), but MODEL.TEACHER.WEIGHTS is {weights!r} (SHA-256 "
            f"{weights_sha256[:12]}...): name that CLIP, make the file anew with "
            'datasets/extract_text_embeddings.py, or set MODEL.TEXT_CLASSIFIER.EMBEDDINGS to ""'
        )
    if not stored.templates:
        unknown.append("the file does not say which templates made it")
    elif stored.templates != tuple(templates):
        raise ValueError(
            f"{stored.path}: made with the templates {list(stored.templates)}, but "
            f"MODEL.TEXT_CLASSIFIER.TEMPLATES (or TEMPLATE) says {list(templates)}: make "
            "the file anew with datasets/extract_text_embeddings.py, or set the key to its own"
        )
    if unknown:
        logger.warning("%s is used unchecked: %s", stored.path, "; ".join(unknown))


def read_embedding_array(path: str | os.PathLike[str]) -> tuple[npt.NDArray[Any], str]:
    """Read an array that somebody else made: a .npy, or a .pt / .pth holding one tensor.

    Pickled code is never run: files that need it are refused.

    Returns:
        The array as it is, and the file's SHA-256 (hex).

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is of another kind, or cannot be read without running pickled code.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file of embeddings {str(path)!r}")
    if path.suffix not in (".npy", ".pt", ".pth"):
        raise ValueError(f"{path}: expected embeddings as .npy, .pt or .pth")
    try:
        is_numpy = path.suffix == ".npy"
        loaded: Any = np.load(path, allow_pickle=False) if is_numpy else read_torch_file(path)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(
            f"{path} cannot be read as a plain array; a file with pickled objects is refused "
            f"({error})"
        ) from error
    if isinstance(loaded, Tensor):
        loaded = loaded.detach().float().numpy()
    if not isinstance(loaded, np.ndarray):
        raise ValueError(
            f"{path}: expected one array of shape (K, D), found a {type(loaded).__name__}"
        )
    return loaded, file_hash(path)


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


def _normalised(rows: npt.NDArray[Any]) -> FloatArray:
    exact = rows.astype(np.float64)  # half precision overflows in the sum of squares
    norms = np.linalg.norm(exact, axis=1, keepdims=True)
    if rows.dtype == np.float32 and abs(norms - 1).max() < _ROUNDING:
        exact, norms = rows, np.ones_like(norms, dtype=np.float32)  # CLIP's rows stay as they are
    normalised: FloatArray = (exact / norms).astype(np.float32)
    return normalised


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(map(repr, names[:_MAX_NAMED])) + more
