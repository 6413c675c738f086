"""What a soak does: training, with inference in between whose vocabulary and pictures change."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import cv2
import numpy as np
from detectron2.engine import HookBase
from numpy.typing import NDArray

from hierkd.inference.predictor import OpenVocabularyPredictor
from hierkd.training.soak import SoakRecorder

__all__ = ["ChangingInference", "SoakHook", "TimeIsUp"]

# Classes of the vocabularies that take turns, and shorter side of the pictures, in pixels. The
# numbers share no factor, so that all pairs come. [ours]
_VOCABULARY_SIZES = (1, 3, 10, 32, 100, 316, 1000)
_PICTURE_SIZES = (64, 90, 128, 200, 320)
# Share of the names of a vocabulary that were never seen before; the others are in the cache.
_NEW_NAMES = 0.02


class TimeIsUp(BaseException):
    """Ends the training loop of a soak, as Ctrl-C would: no failure that detectron2 logs."""


class ChangingInference:
    """Pictures of changing sizes, detected with vocabularies that change every few pictures.

    Attributes:
        cycle: pictures until every size of vocabulary has had its turn.
    """

    def __init__(
        self,
        predictor: OpenVocabularyPredictor,
        pictures: Sequence[NDArray[np.uint8]],
        names: Sequence[str],
        *,
        largest: int = 3000,
        pictures_per_vocabulary: int = 4,
        seed: int = 0,
    ) -> None:
        """Prepare.

        Args:
            predictor: whose vocabulary is changed.
            pictures: (H, W, 3), BGR, 0..255.
            names: real class names; the vocabularies are filled up with made-up ones.
            largest: classes of the largest vocabulary.
            pictures_per_vocabulary: how often each is used.
            seed: of the choice of names.
        """
        self._predictor = predictor
        self._rng = np.random.default_rng(seed)
        self._names = [*names, *(f"thing number {i}" for i in range(max(0, largest - len(names))))]
        sizes = [*(size for size in _VOCABULARY_SIZES if size < largest), largest]
        self._vocabularies = self._draw_vocabularies(sizes)
        self.cycle = pictures_per_vocabulary * len(sizes)
        self._pictures = itertools.cycle(self._resized(pictures))
        self._per_vocabulary = pictures_per_vocabulary
        self._done = 0

    def __call__(self) -> None:
        """Detect in the next picture, with the next vocabulary if it is time."""
        if self._done % self._per_vocabulary == 0:
            self._predictor.set_vocabulary(next(self._vocabularies))
        self._done += 1
        self._predictor(next(self._pictures))

    def _draw_vocabularies(self, sizes: Sequence[int]) -> Iterator[list[str]]:
        fresh = itertools.count()
        for size in itertools.cycle(sizes):
            new = min(size - 1, round(_NEW_NAMES * size))
            drawn = self._rng.choice(len(self._names), size - new, replace=False)
            yield [
                *(self._names[index] for index in drawn),
                *(f"something new {next(fresh)}" for _ in range(new)),
            ]

    @staticmethod
    def _resized(pictures: Sequence[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
        resized: list[NDArray[np.uint8]] = []
        for picture, side in zip(itertools.cycle(pictures), _PICTURE_SIZES * 7, strict=False):
            height, width = picture.shape[:2]
            wider = side * (1 + len(resized) % 3) // 2  # and of several shapes
            size = (max(side, wider), side) if width >= height else (side, max(side, wider))
            resized.append(cv2.resize(picture, size))
        return resized


class SoakHook(HookBase):  # type: ignore[misc]  # detectron2 is untyped
    """Detects between training steps, takes the samples, and ends the training in time."""

    def __init__(
        self,
        recorder: SoakRecorder,
        inference: ChangingInference,
        *,
        seconds: float,
        training_seconds: float,
    ) -> None:
        """Prepare.

        Args:
            recorder: gets both phases, "training" and "inference".
            inference: called for whole cycles, so that all of them cost the same.
            seconds: after which the training ends.
            training_seconds: of training between two turns of inference.
        """
        self._recorder, self._inference = recorder, inference
        self._seconds, self._training_seconds = seconds, training_seconds
        self._turn_began = 0.0

    def after_step(self) -> None:
        """Detect for a turn when it is time.

        Raises:
            TimeIsUp: the time is over.
        """
        if self._recorder.seconds - self._turn_began >= self._training_seconds:
            for _ in range(self._inference.cycle):
                with self._recorder.unit("inference", sampled=False):
                    self._inference()
            self._recorder.sample()
            self._turn_began = self._recorder.seconds
        if self._recorder.seconds >= self._seconds:
            raise TimeIsUp
