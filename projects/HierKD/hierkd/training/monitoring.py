"""Hooks that show how a training goes: the background's drift, and pictures with detections.

Both look and change nothing: weights, buffers, modes and vocabulary are afterwards what they were,
so that a run with them ends with the same weights as one without. They do nothing that other
processes would have to join; register them in the main process alone.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase
from torch import nn

from hierkd.inference.predictor import OpenVocabularyPredictor
from hierkd.reports.charts import draw_comparison
from hierkd.reports.gallery import (
    build_samples,
    choose_in_turn,
    choose_test_dataset,
    judged_classes,
    keep_best,
)

__all__ = ["BackgroundDrift", "DetectionPictures", "build_monitoring_hooks"]

logger = logging.getLogger(__name__)

_WRITER_PERIOD = 20  # iterations between two lines of metrics.json. [detectron2]


class BackgroundDrift(HookBase):  # type: ignore[misc]  # detectron2 is untyped
    """Records how far the learned background embedding T_bg has gone, and where to.

    ``background_start_cosine``: its cosine with the embedding it was built with, that of
    ``MODEL.TEXT_CLASSIFIER.BACKGROUND_PROMPT``, also in a run that was resumed.
    ``background_class_cosine``: its largest cosine with a class of the training vocabulary.
    """

    def __init__(self, detector: Any) -> None:
        """Take a :class:`hierkd.modeling.detector.HierKD`."""
        self._classifier = detector.text_classifier

    def after_step(self) -> None:
        """Record, as often as the scalars are written."""
        if (self.trainer.iter + 1) % _WRITER_PERIOD == 0 or _is_last(self.trainer):
            weight = self._classifier.background_embedding.detach().float()
            background = nn.functional.normalize(weight, dim=0)
            classes = self._classifier.text_embeddings
            start = self._classifier.start_embedding.to(background)
            cosines = {"background_start_cosine": start @ background}
            if len(classes) > 0:
                cosines["background_class_cosine"] = (classes @ background).max()
            for name, cosine in cosines.items():
                self.trainer.storage.put_scalar(name, cosine.item(), smoothing_hint=False)


class DetectionPictures(HookBase):  # type: ignore[misc]  # detectron2 is untyped
    """Draws the same test pictures again and again: ground truth beside detections.

    The pictures show the novel classes in turn; all names of the dataset compete. Drawn are the
    best detections of novel and of base classes, of each as many as the picture has objects. A
    drawing that fails is logged and does not end the training.
    """

    def __init__(self, cfg: Any, detector: Any, dataset_name: str) -> None:
        """Choose ``TEST.VIS_PICTURES`` pictures of a dataset."""
        self._cfg, self._detector = cfg, detector
        self._vocabulary = list(MetadataCatalog.get(dataset_name).thing_classes)
        self._judged = judged_classes(dataset_name)
        records, number = DatasetCatalog.get(dataset_name), cfg.TEST.VIS_PICTURES
        self._records = choose_in_turn(records, self._vocabulary, self._judged, number)

    def after_step(self) -> None:
        """Draw, every so often and after the last step."""
        if not ((self.trainer.iter + 1) % self._cfg.VIS_PERIOD == 0 or _is_last(self.trainer)):
            return
        try:
            with _undisturbed(self._detector):
                for number, record in enumerate(self._records, start=1):
                    self.trainer.storage.put_image(f"detections/{number}", self._draw(record))
        except Exception:
            logger.warning("pictures with detections could not be drawn", exc_info=True)

    def _draw(self, record: dict[str, Any]) -> Any:
        """(3, H, W) RGB: the ground truth beside the detections."""
        predictor = OpenVocabularyPredictor(  # puts the detector into eval mode
            model=self._detector,
            min_size=self._cfg.INPUT.MIN_SIZE_TEST,
            max_size=self._cfg.INPUT.MAX_SIZE_TEST,
            image_format=self._cfg.INPUT.FORMAT,
        )
        samples = build_samples(
            [record],
            lambda _, image: predictor.predict(image, vocabulary=self._vocabulary),
            self._vocabulary,
            self._judged,
        )
        caption = f"{Path(record['file_name']).name}, iteration {self.trainer.iter + 1}"
        return draw_comparison({"detected": keep_best(samples)}, [caption]).transpose(2, 0, 1)


def build_monitoring_hooks(cfg: Any, detector: Any) -> list[HookBase]:
    """Build the hooks that a config asks for; none for a model without text."""
    if not hasattr(detector, "text_classifier"):
        return []
    hooks: list[HookBase] = [BackgroundDrift(detector)]
    dataset_name = choose_test_dataset(cfg.DATASETS.TEST)
    if cfg.VIS_PERIOD > 0 and cfg.TEST.VIS_PICTURES > 0 and dataset_name is not None:
        hooks.append(DetectionPictures(cfg, detector, dataset_name))
    return hooks


@contextmanager
def _undisturbed(detector: Any) -> Iterator[None]:
    """Keep the modes of a detector's modules, and ``TEST.COMPILE`` off, in the block.

    It would compile for a minute per size of picture.
    """
    modes = [(module, module.training) for module in detector.modules()]
    compiled = detector.compile_test
    try:
        detector.compile_test = False
        yield
    finally:
        detector.compile_test = compiled
        for module, mode in modes:
            module.training = mode


def _is_last(trainer: Any) -> bool:
    return bool(trainer.iter + 1 >= trainer.max_iter)
