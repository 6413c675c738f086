"""Text embeddings of a CLIP in an SQLite file, so that each text is encoded once on a machine."""

import contextlib
import hashlib
import logging
import os
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

__all__ = ["TextCache", "Vector"]

logger = logging.getLogger(__name__)

_TIMEOUT = 30.0  # seconds to wait while another process writes. [ours]
_TEXTS_PER_QUERY = 900  # SQLite allows 32,766 parameters, before 3.32 only 999
_PAGE_SIZE = 16384  # bytes; of SQLite's own 4,096, one row of 512 numbers leaves half empty

Vector = npt.NDArray[np.float32]


class TextCache:
    """Normalised text embeddings of one set of CLIP weights in an SQLite file.

    Rows hold the SHA-256 of the exact text, the text itself for inspection, and D float32 values
    (little-endian, L2-normalised). A second table holds the model's D and exp(logit_scale).

    Any number of processes may share the file. It keeps SQLite's rollback journal, which unlike the
    write-ahead log works on network file systems, and is opened anew for each operation, so that
    nothing is carried through a fork. A corrupted file is set aside and begun anew, one that cannot
    be used is passed over, each with a warning.

    Args:
        path: the file; it and its folder are created by the first write.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._properties: tuple[int, float] | None = None
        self._warned = False

    def properties(self) -> tuple[int, float] | None:
        """(D, exp(logit_scale)) of the model, or None when nothing is stored yet."""
        if self._properties is None and self.path.exists():
            with self._guard(), self._connect() as connection:
                # Another process may not have got further than creating the file.
                if connection.execute("SELECT 1 FROM sqlite_master").fetchone() is not None:
                    query = "SELECT embed_dim, logit_scale FROM model"
                    embed_dim, logit_scale = connection.execute(query).fetchone()
                    self._properties = (int(embed_dim), float(logit_scale))
        return self._properties

    def read(self, texts: Sequence[str]) -> dict[str, Vector]:
        """Embeddings of those texts that are stored."""
        found: dict[str, Vector] = {}
        properties = self.properties()
        if properties is None:
            return found
        by_key = {_text_key(text): text for text in texts}
        keys = list(by_key)
        with self._guard(), self._connect() as connection:
            for start in range(0, len(keys), _TEXTS_PER_QUERY):
                part = keys[start : start + _TEXTS_PER_QUERY]
                marks = ",".join("?" * len(part))
                query = f"SELECT key, embedding FROM texts WHERE key IN ({marks})"
                for key, blob in connection.execute(query, part):
                    # bytes after the values are a checksum that earlier files have
                    vector = np.frombuffer(blob[: 4 * properties[0]], "<f4").astype(np.float32)
                    if len(vector) == properties[0] and abs(np.linalg.norm(vector) - 1) < 0.01:
                        found[by_key[key]] = vector
        return found

    def write(self, embeddings: dict[str, Vector], embed_dim: int, logit_scale: float) -> None:
        """Store embeddings; texts that are there already are replaced."""
        rows = [
            (
                _text_key(text),
                text.encode("utf-8", "replace").decode("utf-8"),
                vector.astype("<f4").tobytes(),
            )
            for text, vector in embeddings.items()
        ]
        with self._guard():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._connect() as connection, connection:  # one transaction
                connection.execute("BEGIN IMMEDIATE")
                connection.execute(
                    "CREATE TABLE IF NOT EXISTS model "
                    "(id INTEGER PRIMARY KEY CHECK (id = 0), embed_dim INTEGER, logit_scale REAL)"
                )
                connection.execute(
                    "CREATE TABLE IF NOT EXISTS texts "
                    "(key TEXT PRIMARY KEY, text TEXT, embedding BLOB) WITHOUT ROWID"
                )
                connection.execute(
                    "INSERT OR REPLACE INTO model VALUES (0, ?, ?)", (embed_dim, logit_scale)
                )
                connection.executemany("INSERT OR REPLACE INTO texts VALUES (?, ?, ?)", rows)

    @contextlib.contextmanager
    def _connect(self) -> Iterator[sqlite3.Connection]:
        connection = sqlite3.connect(self.path, timeout=_TIMEOUT, isolation_level=None)
        with contextlib.closing(connection):
            # Without waiting for the disk: what a power cut may corrupt can be computed again.
            connection.execute("PRAGMA synchronous = OFF")
            connection.execute(f"PRAGMA page_size = {_PAGE_SIZE}")  # of a file that is still empty
            yield connection

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        """Turn trouble with the file into warnings."""
        try:
            yield
        except (sqlite3.OperationalError, OSError) as error:
            if not self._warned:
                logger.warning("Text cache %s cannot be used: %s", self.path, error)
                self._warned = True
        except (sqlite3.DatabaseError, TypeError, ValueError) as error:
            aside = self.path.with_name(f"{self.path.name}.corrupt")
            logger.warning(
                "Text cache %s is corrupted (%s); it is moved to %s and begun anew",
                *(self.path, error, aside),
            )
            with contextlib.suppress(OSError):
                os.replace(self.path, aside)
                self.path.with_name(f"{self.path.name}-journal").unlink(missing_ok=True)


def _text_key(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
