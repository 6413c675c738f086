"""Checkpoints: detectron2's checkpointer, with errors that say what to do."""

from __future__ import annotations

import os
import pickle
from typing import Any
from urllib.error import URLError

from detectron2.checkpoint import DetectionCheckpointer

__all__ = ["HierKDCheckpointer"]

_BACKGROUND = "text_classifier.background_embedding"


class HierKDCheckpointer(DetectionCheckpointer):  # type: ignore[misc]  # detectron2 is untyped
    """Loads and saves detectors; a checkpoint holds the detector alone, never the teacher."""

    def load_detector(self, path: str) -> None:
        """Load the weights of a trained detector, for uses that make no sense with random ones.

        Args:
            path: as for :meth:`load`, but not empty.

        Raises:
            FileNotFoundError: as :meth:`load`.
            ConnectionError: as :meth:`load`.
            ValueError: as :meth:`load`; also if the file lacks weights of the detector's head, as
                those of a backbone do.
        """
        self._missing_keys = list(self.model.state_dict())
        self.load(path)
        missing = [key for key in self._missing_keys if key.startswith("head.")]
        if missing:
            raise ValueError(
                f"MODEL.WEIGHTS: {path!r} is no trained detector of this config: it lacks "
                f"{len(missing)} weights of the head, for example {missing[0]!r}; give a "
                "checkpoint that was trained with this config"
            )

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Load weights from a file or a URL that detectron2 knows.

        Args:
            path: ``MODEL.WEIGHTS`` or a checkpoint; "" loads nothing. May end in detectron2's
                ``?matching_heuristics=True``.
            *args: as in detectron2.
            **kwargs: as in detectron2.

        Returns:
            What the checkpoint holds besides the model.

        Raises:
            FileNotFoundError: if a local file does not exist.
            ConnectionError: if weights have to be downloaded and cannot be.
            ValueError: if the file cannot be read as a checkpoint, or holds another embedding size
                than this detector's.
        """
        if path and "://" not in path and not os.path.isfile(path.partition("?")[0]):
            raise FileNotFoundError(
                f"MODEL.WEIGHTS: no file {path!r} (looked from {os.getcwd()!r}); "
                'give a checkpoint, a URL, or "" to start from random weights'
            )
        self._loading = path
        try:
            loaded: dict[str, Any] = super().load(path, *args, **kwargs)
        except (URLError, ConnectionError, TimeoutError) as error:
            raise ConnectionError(
                f"MODEL.WEIGHTS: could not download {path!r} ({error}). Fetch the file where there "
                "is a network and pass its path as MODEL.WEIGHTS, or put it into "
                "detectron2's cache ($FVCORE_CACHE, by default ~/.torch/iopath_cache)"
            ) from error
        finally:
            self._parsed_url_during_load = None  # detectron2 keeps it when loading fails
        return loaded

    def _load_file(self, filename: str) -> Any:
        try:
            return super()._load_file(filename)
        except (pickle.UnpicklingError, EOFError, OSError, RuntimeError) as error:
            raise ValueError(
                f"MODEL.WEIGHTS: {filename!r} cannot be read as a checkpoint: {error}"
            ) from error

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
