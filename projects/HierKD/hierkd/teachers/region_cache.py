"""What CLIP says of every training box and text, on disk: format, writer, reader and checks.

A cache is a folder::

    manifest.json        what the cache was made of; written last, so that it vouches for the rest
    annotation_ids.npy   (B,) int64, of the annotations, in the order of the rows of regions.npy
    regions.npy          (B, 2, D) float16: [:, 0] of the image as stored, [:, 1] mirrored
    text_keys.npy        (T, 2) uint64: the first 128 bits of each text's SHA-256, ascending
    texts.npy            (T, D) float16, in the order of text_keys.npy
    proposal_owners.npy  (I,) int64: the least annotation id of each image
    proposal_boxes.npy   (I, k, 4) float32: XYXY, pixels of the image as stored; zero: no box
    proposals.npy        (I, k, 2, D) float16, as regions.npy; zero: no box
    progress.json        how far the making has got; gone when it is complete

Embeddings are L2-normalised. The two large files are mapped into memory and read row by row;
processes of one machine share them. Nothing in a cache is pickled. Only a cache with proposals has
the three files of theirs.

Letters: B annotations · T texts · D embedding size · M annotations asked for · I images with
annotations · k proposals of an image, at most · q of one image.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hierkd.files import file_hash, replacing, write_json_atomically

__all__ = [
    "MANIFEST",
    "CacheContents",
    "RegionCache",
    "RegionCacheWriter",
    "keys_sha256",
    "sorted_texts",
]

logger = logging.getLogger(__name__)

MANIFEST, _PROGRESS = "manifest.json", "progress.json"
_IDS, _REGIONS, _KEYS, _TEXTS = "annotation_ids.npy", "regions.npy", "text_keys.npy", "texts.npy"
_OWNERS, _BOXES = "proposal_owners.npy", "proposal_boxes.npy"
_PROPOSALS = "proposals.npy"
_FORMAT = 1
_MAX_NAMED = 5  # offenders that a message names

FloatRows = npt.NDArray[np.float32]


@dataclass(frozen=True)
class CacheContents:
    """What a cache is made of: the content of its manifest.

    Attributes:
        clip: MODEL.TEACHER.WEIGHTS, for the reader's eyes.
        weights_sha256: of that file, hex.
        pixel_statistics: MODEL.TEACHER.PIXEL_STATISTICS.
        image_format: INPUT.FORMAT while it was made. The embeddings do not depend on it.
        crop_scale: MODEL.IKD.CROP_SCALE.
        datasets: names of DATASETS.TRAIN.
        annotations_sha256: of the annotation file of each dataset, hex.
        embed_dim: D.
        logit_scale: CLIP's own factor on cosines.
        num_boxes: B.
        num_texts: T.
        texts_sha256: of the keys of all texts, hex.
        proposals_per_image: k, MODEL.IKD.PROPOSALS_PER_IMAGE; 0 without proposals.
        proposals_sha256: of the weights of the detector that proposed, hex.
        num_images: I; 0 without proposals.
    """

    clip: str
    weights_sha256: str
    pixel_statistics: str
    image_format: str
    crop_scale: float
    datasets: list[str]
    annotations_sha256: list[str]
    embed_dim: int
    logit_scale: float
    num_boxes: int
    num_texts: int
    texts_sha256: str
    proposals_per_image: int = 0
    proposals_sha256: str = ""
    num_images: int = 0

    def as_json(self) -> dict[str, Any]:
        """The manifest."""
        return {"format": _FORMAT, **asdict(self)}


def sorted_texts(texts: Sequence[str]) -> tuple[list[str], npt.NDArray[np.uint64]]:
    """Distinct texts in the order of their keys, and the keys (T, 2)."""
    by_key = {_text_key(text): text for text in texts}
    ordered = sorted(by_key)
    keys = np.array(ordered, dtype=np.uint64).reshape(-1, 2)
    return [by_key[key] for key in ordered], keys


def keys_sha256(keys: npt.NDArray[np.uint64]) -> str:
    """SHA-256 of the keys of texts, hex."""
    return hashlib.sha256(keys.astype("<u8").tobytes()).hexdigest()


def _text_key(text: str) -> tuple[int, int]:
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:16], "big")


class RegionCacheWriter:
    """Writes a cache, from the beginning or from where an interrupted run has got to.

    Rows reach the disk before ``progress.json`` counts them; the manifest comes last.

    Args:
        folder: made if missing.
        contents: what the cache will hold.
        annotation_ids: (B,), each once.
        text_keys: (T, 2), of :func:`sorted_texts`.
        owners: (I,) the least annotation id of each image, for proposals.
        overwrite: begin anew, whatever the folder holds.

    Attributes:
        boxes_done: rows of regions that are written.
        texts_done: rows of texts that are written.
        complete: whether the folder holds the whole cache already.

    Raises:
        ValueError: an annotation id occurs twice, or the folder holds something else.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        contents: CacheContents,
        annotation_ids: npt.NDArray[np.int64],
        text_keys: npt.NDArray[np.uint64],
        owners: npt.NDArray[np.int64] | None = None,
        *,
        overwrite: bool = False,
    ) -> None:
        ids, counts = np.unique(annotation_ids, return_counts=True)
        if (counts > 1).any():
            raise ValueError(
                f"annotation ids {ids[counts > 1][:_MAX_NAMED].tolist()} occur more than once in "
                f"{', '.join(contents.datasets)}: a cache is looked up by id, give them other ids"
            )
        self.folder = Path(folder)
        self.contents = contents
        self.boxes_done = self.texts_done = 0
        if overwrite:
            for name in (MANIFEST, _PROGRESS):  # in this order: no manifest without its rows
                (self.folder / name).unlink(missing_ok=True)
        self.complete = self._found(MANIFEST) is not None
        if self.complete:
            self.boxes_done, self.texts_done = contents.num_boxes, contents.num_texts
            return
        if (progress := self._found(_PROGRESS)) is None:
            self._begin({_IDS: annotation_ids, _KEYS: text_keys, _OWNERS: owners})
        else:
            self.boxes_done, self.texts_done = progress["boxes_done"], progress["texts_done"]
        self._regions = self._reopen(_REGIONS)
        self._texts = self._reopen(_TEXTS)
        if contents.proposals_per_image > 0:
            self._boxes, self._proposals = self._reopen(_BOXES), self._reopen(_PROPOSALS)

    def write_proposals(self, first: int, boxes: FloatRows, rows: FloatRows) -> None:
        """Write boxes (n, k, 4) and rows (n, k, 2, D) of n images, before :meth:`write_regions`."""
        self._write(self._boxes, first, boxes)
        self._write(self._proposals, first, rows)

    def write_regions(self, rows: FloatRows) -> None:
        """Append rows (n, 2, D) of the next n annotations."""
        self._write(self._regions, self.boxes_done, rows)
        self.boxes_done += len(rows)
        self._save_progress()

    def write_texts(self, rows: FloatRows) -> None:
        """Append rows (n, D) of the next n texts."""
        self._write(self._texts, self.texts_done, rows)
        self.texts_done += len(rows)
        self._save_progress()

    def finish(self) -> None:
        """Declare the cache complete."""
        write_json_atomically(self.folder / MANIFEST, self.contents.as_json())
        (self.folder / _PROGRESS).unlink(missing_ok=True)
        self.complete = True

    def _found(self, name: str) -> dict[str, Any] | None:
        """The state that a file describes, None without the file."""
        path = self.folder / name
        if not path.exists():
            return None
        try:
            state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            found = state if name == MANIFEST else state["contents"]
            other = [
                f"{key}: found {found.get(key)!r}, expected {value!r}"
                for key, value in self.contents.as_json().items()
                if found.get(key, getattr(CacheContents, key, None)) != value  # its default
            ]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            other = [f"{type(error).__name__}: {error}"]
        if other:
            raise ValueError(
                f"{path} is of another cache ({'; '.join(other)}); choose another folder, or "
                "replace it with --overwrite"
            )
        return state

    def _begin(self, known: Mapping[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, (dtype, shape) in _arrays_of(self.contents).items():
            with replacing(self.folder / name) as making:
                # sparse: takes no room yet
                array = np.lib.format.open_memmap(making, mode="w+", dtype=dtype, shape=shape)
                if name in known:
                    array[:] = known[name]
                array.flush()
        self._save_progress()

    def _reopen(self, name: str) -> Any:
        path = self.folder / name
        try:
            return np.load(path, mmap_mode="r+", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(
                f"{path} cannot be read ({error}); replace the cache with --overwrite"
            ) from error

    @staticmethod
    def _write(target: npt.NDArray[Any], start: int, rows: FloatRows) -> None:
        if not np.isfinite(rows).all():
            raise ValueError(f"CLIP's embeddings of rows {start} to {start + len(rows)} are NaN")
        target[start : start + len(rows)] = rows
        if isinstance(target, np.memmap):
            target.flush()

    def _save_progress(self) -> None:
        progress = {"boxes_done": self.boxes_done, "texts_done": self.texts_done}
        contents = {"contents": self.contents.as_json()}
        write_json_atomically(self.folder / _PROGRESS, contents | progress)


class RegionCache:
    """A complete cache, opened for reading.

    Attributes:
        contents: its manifest.

    Raises:
        FileNotFoundError: there is no such folder, or the cache in it is not complete.
        ValueError: a file is broken, or not what the manifest says.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.contents = found = self._read_manifest()
        arrays = {name: self._load(name, *each) for name, each in _arrays_of(found).items()}
        self._ids, self._keys = np.array(arrays[_IDS]), np.array(arrays[_KEYS])
        self._regions, self._texts = arrays[_REGIONS], arrays[_TEXTS]
        proposals: list[Any] = [arrays.get(name) for name in (_OWNERS, _BOXES, _PROPOSALS)]
        self._owners, self._boxes, self._proposals = proposals
        self._id_order = self._ids.argsort()
        self._sorted_ids = self._ids[self._id_order]

    def check(self, **expected: tuple[object, str]) -> None:
        """Refuse a cache of another training.

        Args:
            expected: Field of :class:`CacheContents` -> its value in a config, and that key.

        Raises:
            ValueError: names the file, both sides, and the command that makes the cache anew.
        """
        for field, (value, key) in expected.items():
            if (found := getattr(self.contents, field)) != value:
                raise self._of_another(field, found, value, key)

    def check_annotations(self, annotation_files: Mapping[str, str]) -> None:
        """The same of the annotations: name of each training dataset -> path, if it is there."""
        known = dict(zip(self.contents.datasets, self.contents.annotations_sha256, strict=True))
        for name, path in annotation_files.items():
            # evaluation does without
            if os.path.isfile(path) and (digest := file_hash(path)) not in known.values():
                key = f"{path}, DATASETS.TRAIN {name!r}"
                raise self._of_another("annotations_sha256", known, digest, key)

    def regions(self, annotation_ids: npt.NDArray[np.int64], *, flipped: bool) -> FloatRows:
        """Embeddings of M regions of an image, or of its mirror image -> (M, D), L2-normalised.

        Raises:
            ValueError: an id is not in the cache, or its image could not be read when it was made.
        """
        places = self._sorted_ids.searchsorted(annotation_ids).clip(max=len(self._ids) - 1)
        absent = self._sorted_ids[places] != annotation_ids
        rows = _normalised(self._regions[self._id_order[places], int(flipped)])
        absent |= ~(np.isfinite(rows).all(axis=1) & rows.any(axis=1))
        if absent.any():
            named = annotation_ids[absent][:_MAX_NAMED].tolist()
            raise self._broken(_REGIONS, f"no embeddings of the annotations {named}")
        return rows

    def proposals(
        self, annotation_ids: npt.NDArray[np.int64], *, flipped: bool
    ) -> tuple[FloatRows, FloatRows]:
        """The proposals of the image that has these annotations, best first.

        Returns:
            Boxes (q, 4) in the image as stored, and the embeddings (q, D), L2-normalised, of the
            regions in it or in its mirror image. An image without annotations has none.
        """
        image = np.isin(self._owners, annotation_ids).nonzero()[0]
        rows = self._proposals[image, :, int(flipped)].reshape(-1, self.contents.embed_dim)
        used = rows.any(axis=1)
        return self._boxes[image].reshape(-1, 4)[used], _normalised(rows[used])

    def texts(self, texts: Sequence[str]) -> dict[str, FloatRows]:
        """Embeddings (D,), L2-normalised, of those texts that the cache holds."""
        wanted, keys = sorted_texts(texts)
        places = self._keys[:, 0].searchsorted(keys[:, 0]).clip(max=len(self._keys) - 1)
        present = (self._keys[places] == keys).all(axis=1)
        rows = _normalised(self._texts[places[present]])
        return dict(zip(np.array(wanted, dtype=object)[present].tolist(), rows, strict=True))

    def _read_manifest(self) -> CacheContents:
        path = self.folder / MANIFEST
        if not path.is_file():
            progress = self.folder / _PROGRESS
            found = "is not complete" if progress.exists() else "holds no cache of the teacher"
            raise FileNotFoundError(
                f"MODEL.TEACHER.CACHE: {self.folder} {found} (expected {path}). Make it, or go on "
                f"where an interrupted run stopped, with {self._command()}; inference does "
                "without: MODEL.TEACHER.CACHE ''"
            )
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            if (version := fields.pop("format", None)) != _FORMAT:
                raise ValueError(f"format {version}, this package reads {_FORMAT}")
            return CacheContents(**fields)
        except (ValueError, TypeError, AttributeError) as error:
            raise self._broken(MANIFEST, f"is no manifest of a cache ({error})") from error

    def _load(self, name: str, dtype: type, shape: tuple[int, ...]) -> Any:
        try:
            array = np.load(self.folder / name, mmap_mode="r", allow_pickle=False)
        # numpy parses a header as Python: a broken one raises SyntaxError, TokenError and others
        except Exception as error:
            raise self._broken(name, f"cannot be read ({error})") from error
        if array.dtype != dtype or array.shape != shape:
            raise self._broken(
                name, f"found {array.dtype} {array.shape}, expected {np.dtype(dtype)} {shape}"
            )
        return array

    def _of_another(self, field: str, found: object, expected: object, key: str) -> ValueError:
        what = f"is of another training: {field} found {found}, expected {expected} ({key})"
        return self._broken(MANIFEST, what)

    def _broken(self, name: str, what: str) -> ValueError:
        command = f"{self._command()} --overwrite"
        return ValueError(f"{self.folder / name}: {what}; make the cache anew with {command}")

    def _command(self) -> str:
        return (
            "python tools/cache_teacher.py --config-file <YAML of the training> "
            f"[its KEY VALUE pairs] [--proposals-from YAML WEIGHTS] --output {self.folder}"
        )


def _arrays_of(contents: CacheContents) -> dict[str, tuple[type, tuple[int, ...]]]:
    """The dtype and the shape of each file of a cache."""
    boxes, texts, size = contents.num_boxes, contents.num_texts, contents.embed_dim
    arrays: dict[str, tuple[type, tuple[int, ...]]] = {
        _IDS: (np.int64, (boxes,)),
        _REGIONS: (np.float16, (boxes, 2, size)),
        _KEYS: (np.uint64, (texts, 2)),
        _TEXTS: (np.float16, (texts, size)),
    }
    if contents.proposals_per_image > 0:
        shape = (contents.num_images, contents.proposals_per_image)
        arrays[_OWNERS] = np.int64, shape[:1]
        arrays[_BOXES], arrays[_PROPOSALS] = (
            (np.float32, (*shape, 4)),
            (np.float16, (*shape, 2, size)),
        )
    return arrays


def _normalised(rows: npt.NDArray[np.float16]) -> FloatRows:
    """(n, D) float32 of length 1; zero rows stay zero."""
    exact = np.asarray(rows, np.float32)
    norms = np.linalg.norm(exact, axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):  # infinite rows become NaN, for the caller to refuse
        normalised: FloatRows = exact / np.maximum(norms, np.finfo(np.float32).tiny)
    return normalised
