"""Checkpoints: detectron2's checkpointer, safe against kills, with errors that say what to do.

The files are detectron2's. What differs is how they come to be (whole or not at all) and what
``--resume`` does when some of them are not whole.
"""

from __future__ import annotations

import logging
import os
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from torch import Tensor

from hierkd.files import read_pickled_arrays, read_torch_file, replacing

__all__ = ["HierKDCheckpointer"]

logger = logging.getLogger(__name__)

_BACKGROUND = "text_classifier.background_embedding"
# Where the background started: what the teacher of the training says of a text.
_TRACE = "teacher_trace"
# Least cosine of two traces of one CLIP. [ours] The same weights in another format or precision
# differ by rounding, and other words for the background by little (any two prompts of COCO's
# classes have 0.66 and more in ViT-B/32), while the directions of two CLIPs have nothing in common.
_SAME_TEACHER = 0.5
_LAST = "last_checkpoint"
_PATTERN = "model_*.pth"  # what detectron2's PeriodicCheckpointer writes


class HierKDCheckpointer(DetectionCheckpointer):  # type: ignore[misc]  # detectron2 is untyped
    """Loads and saves detectors; a checkpoint holds the detector alone, never the teacher.

    Nothing that a file holds is run: detectron2 would unpickle it.

    Attributes:
        saved_iteration: of the last checkpoint that this object wrote; None before.
        loaded: path or URL of the weights that were loaded last; "" before.
    """

    saved_iteration: int | None = None
    loaded: str = ""
    _missing_keys: Sequence[str] | None = None  # of the file loaded last; None before

    # ------------------------------------------------------------------------------------- saving

    def save(self, name: str, **kwargs: Any) -> None:
        """Write a checkpoint, then let ``last_checkpoint`` name it.

        Each of the two files appears whole or not at all: it is written beside its final place,
        brought to the disk, and renamed. What killed runs had begun is removed first.

        Args:
            name: without ``.pth``.
            **kwargs: what the checkpoint holds besides model and trainer, such as ``iteration``.

        Raises:
            OSError: it cannot be written, e.g. on a full disk. Names the file and the free bytes;
                the last checkpoint is what it was.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict()}
        data.update({key: each.state_dict() for key, each in self.checkpointables.items()})
        if (trace := self._trace()) is not None:
            data[_TRACE] = trace
        data.update(kwargs)
        path = Path(self.save_dir) / f"{name}.pth"
        for left in (f for each in (_PATTERN, _LAST) for f in path.parent.glob(f".{each}.*.tmp")):
            logger.warning("Removing %s, which a killed run had begun to write", left)
            left.unlink(missing_ok=True)
        self.logger.info("Saving checkpoint to %s", path)
        try:
            with replacing(path, durable=True) as making, making.open("wb") as file:
                torch.save(data, file)
            self.tag_last_checkpoint(path.name)
        except (OSError, RuntimeError) as error:
            cause = error if isinstance(error, OSError) else error.__context__  # torch has its own
            if not isinstance(cause, OSError):
                raise
            free = shutil.disk_usage(path.parent).free / 1e6
            raise OSError(
                cause.errno,
                f"{path}: the checkpoint could not be written: {cause.strerror}; the file system "
                f"has {free:,.1f} MB free. The checkpoints before it are intact: make room and go "
                "on with --resume",
            ) from error
        self.saved_iteration = kwargs.get("iteration")

    def _trace(self) -> Tensor | None:
        """(D,) the trace of this detector's teacher; None of a detector without names."""
        return getattr(getattr(self.model, "text_classifier", None), "start_embedding", None)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Let ``last_checkpoint`` name a file; at no moment does it name another or nothing."""
        with replacing(Path(self.save_dir) / _LAST, durable=True) as making:
            making.write_text(last_filename_basename, encoding="utf-8")

    # ----------------------------------------------------------------------------------- resuming

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Resume from the last checkpoint that is whole, or load ``path`` if there is none at all.

        With several processes the first one decides for all.

        Args:
            path: ``MODEL.WEIGHTS``.
            resume: False: load the weights of ``path`` and nothing else.

        Raises:
            ValueError: as :meth:`load`; also if there are checkpoints or a ``last_checkpoint``,
                but nothing is whole.
            FileNotFoundError: as :meth:`load`; also if only other processes see the checkpoint.
            ConnectionError: as :meth:`load`.
        """
        if resume:
            found = self._find_checkpoint() if comm.is_main_process() else ""
            if last := comm.all_gather(found)[0]:
                return self.load(last)
            logger.info("--resume: %r holds no checkpoint: starting afresh", self.save_dir)
        elif self.save_to_disk and self.checkpointables and self.has_checkpoint():
            logger.warning(
                "%r holds checkpoints of an earlier run, which this one will overwrite; --resume "
                "would go on with them",
                self.save_dir,
            )
        return self.load(path, checkpointables=[])

    def has_checkpoint(self) -> bool:
        """Whether there is anything to resume from, be it ``last_checkpoint`` or a checkpoint."""
        return bool(super().has_checkpoint() or any(Path(self.save_dir).glob(_PATTERN)))

    def _find_checkpoint(self) -> str:
        """What ``last_checkpoint`` names, or the newest that is whole; "" = there never was one."""
        folder = Path(self.save_dir)
        paths = sorted(folder.glob(_PATTERN), reverse=True)  # model_final is the last of all
        problems = ["there is no last_checkpoint"]
        if super().has_checkpoint():
            name = (folder / _LAST).read_bytes().decode("utf-8", "replace").strip()
            last = folder / name.replace("\0", "?")
            if (damage := _find_damage(last)) is None:
                return str(last)
            problems = [f"last_checkpoint names {name!r}, which {damage}"]
            paths = [path for path in paths if path != last]
        elif not paths:
            return ""
        for path in paths:
            if damage := _find_damage(path):
                problems.append(f"{path.name} {damage}")
                continue
            told = "; ".join(problems)
            logger.warning("--resume: %s: %s. Going on from %s", folder, told, path)
            return str(path)
        raise ValueError(
            f"--resume: {str(folder)!r}: no checkpoint is whole: {'; '.join(problems)}. Put a "
            "whole one there, or, to start afresh, leave --resume out"
        )

    # ------------------------------------------------------------------------------------ loading

    def load_detector(self, path: str) -> None:
        """Load the weights of a trained detector, for uses that make no sense with random ones.

        Raises:
            Exception: as :meth:`load`, and as :meth:`check_trained`.
        """
        self.load(path)
        self.check_trained()

    def check_trained(self) -> None:
        """Refuse what is no trained detector, such as a backbone or another backbone's detector.

        Raises:
            ValueError: the file loaded last lacks weights of the detector, or none was loaded.
        """
        missing = self.model.state_dict() if self._missing_keys is None else self._missing_keys
        if missing:
            first = min(missing, key=lambda key: not key.startswith("head."))
            raise ValueError(
                f"MODEL.WEIGHTS: {self.loaded!r} is no trained detector of this config: it lacks "
                f"{len(missing)} of its weights, for example {first!r}; give a checkpoint "
                "that was trained with this config"
            )

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load weights from a file or a URL that detectron2 knows.

        Args:
            path: ``MODEL.WEIGHTS`` or a checkpoint; "" loads nothing. May end in detectron2's
                ``?matching_heuristics=True``.
            checkpointables: as in detectron2: what to load besides the model; None: everything.

        Returns:
            What the checkpoint holds besides the model and the trace of its teacher.

        Raises:
            FileNotFoundError: if a local file does not exist.
            ConnectionError: if weights have to be downloaded and cannot be.
            ValueError: if the file cannot be read as a checkpoint, holds another embedding size
                than this detector's, or was trained with another teacher; the last is a warning
                where a new training starts from it.
        """
        if path and "://" not in path and not os.path.isfile(path.partition("?")[0]):
            raise FileNotFoundError(
                f"MODEL.WEIGHTS: no file {path!r} (looked from {os.getcwd()!r}); "
                'give a checkpoint, a URL, or "" to start from random weights'
            )
        self._loading = path
        try:
            loaded: dict[str, Any] = super().load(path, checkpointables)
        except (URLError, ConnectionError, TimeoutError) as error:
            raise ConnectionError(
                f"MODEL.WEIGHTS: could not download {path!r} ({error}). Fetch the file where there "
                "is a network and pass its path as MODEL.WEIGHTS, or put it into "
                "detectron2's cache ($FVCORE_CACHE, by default ~/.torch/iopath_cache)"
            ) from error
        starts_training = bool(self.checkpointables) and checkpointables == []
        self._check_teacher(loaded.pop(_TRACE, None), only_warn=starts_training)
        self.loaded = self._loading
        return loaded

    def _check_teacher(self, found: Any, *, only_warn: bool) -> None:
        """Compare the trace that was found in a checkpoint with that of this detector's teacher."""
        expected = self._trace()
        if found is None or expected is None or len(found) != len(expected):
            return  # a backbone; of other sizes the background has told
        cosine = torch.cosine_similarity(found.float(), expected, dim=0).item()
        if cosine >= _SAME_TEACHER:
            return
        message = (
            f"MODEL.WEIGHTS: {self._loading!r} was trained with another CLIP than this config's: "
            f"what they say of the background has a cosine of {cosine:.2f}, expected nearly 1. "
            "MODEL.TEACHER.WEIGHTS, and MODEL.TEXT_CLASSIFIER.EMBEDDINGS and BACKGROUND_PROMPT, "
            "must be those of its training (config.yaml beside it)"
        )
        if not only_warn:
            raise ValueError(message)
        logger.warning("%s; this training teaches it the new one's", message)

    def _load_file(self, filename: str) -> Any:
        try:
            if filename.endswith(".pkl"):
                return _read_model_zoo(filename)
            if filename.endswith(".pyth"):
                raise ValueError("checkpoints of pycls (.pyth) are not read")
            return super()._load_file(filename)  # which calls _torch_load
        except (ValueError, OSError, RuntimeError) as error:
            raise ValueError(
                f"MODEL.WEIGHTS: {filename!r} cannot be read as a checkpoint: {error}"
            ) from error

    def _torch_load(self, f: str) -> Any:
        loaded = read_torch_file(f)
        if not isinstance(loaded, dict):
            raise ValueError(f"it holds a {type(loaded).__name__}, expected a dict of weights")
        return loaded

    def _load_model(self, checkpoint: Any) -> Any:
        found = checkpoint["model"].get(_BACKGROUND)
        expected = self.model.state_dict().get(_BACKGROUND)
        if found is not None and expected is not None and len(found) != len(expected):
            raise ValueError(
                f"{self._loading}: its embeddings have {len(found)} dimensions, this detector's "
                f"{len(expected)}: MODEL.TEXT_CLASSIFIER.EMBED_DIM, MODEL.TEACHER.WEIGHTS "
                "and MODEL.TEXT_CLASSIFIER.EMBEDDINGS, if set, must be those of the CLIP the "
                "checkpoint was trained with"
            )
        incompatible = super()._load_model(checkpoint)
        self._missing_keys = list(incompatible.missing_keys)
        return incompatible


def _find_damage(path: Path) -> str | None:
    """The end of a sentence that says what is wrong with a checkpoint, None if it is whole.

    Compares the checksums of the file, which ``torch.load`` does not, then has torch map it, which
    reads no tensor. Half a second per gigabyte or so.
    """
    if not path.is_file():
        return "is not there"
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is None:
            torch.load(path, map_location="cpu", weights_only=True, mmap=True)["model"]
    except Exception as error:  # zipfile and torch raise almost anything for half a file
        broken = str(error).split("\n")[0]
    return None if broken is None else f"is damaged ({broken})"


def _read_model_zoo(path: str) -> dict[str, Any]:
    """Read the two kinds of .pkl that detectron2 reads; Caffe2's names are matched by it later."""
    data = read_pickled_arrays(path)
    if not isinstance(data, dict):
        raise ValueError(f"it holds a {type(data).__name__}, expected a dict of weights")
    if "model" in data and "__author__" in data:
        return data
    weights = data.get("blobs", data)
    weights = {name: w for name, w in weights.items() if not str(name).endswith("_momentum")}
    return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}
