"""A detector, or several side by side, as a command line names them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.structures import Instances
from numpy.typing import NDArray

from hierkd.data.coco_json import some
from hierkd.inference.detections import DetectionFilter, as_records
from hierkd.inference.examples import Examples
from hierkd.inference.predictor import (
    FINAL_WEIGHTS,
    MINIATURE_PREFIX,
    OpenVocabularyPredictor,
    find_checkpoint,
    registered_names,
)
from hierkd.load_config import load_config

__all__ = ["Detectors", "icons_only", "load_detectors", "unknown_to_icons"]

DEFAULT_RUN = "output/demo/hierkd"  # where `make demo` leaves its detector


def load_detectors(
    run: str | None,
    config_file: str | None,
    opts: Sequence[str] = (),
    *,
    compared: Iterable[str] = (),
    device: str | None = None,
    opts_of_all: Sequence[str] = (),
) -> dict[str, OpenVocabularyPredictor]:
    """Load a detector, and those to compare it with.

    Args:
        run: A training's folder or a checkpoint. None takes the weights that ``opts`` names, or
            else those beside ``config_file``; without either, the detector of ``make demo``.
        config_file: Its config; None is the config.yaml of ``run``.
        opts: Config overrides of the first detector: KEY, VALUE, ...
        compared: TITLE=PATH or PATH of each other detector.
        device: "cpu", "cuda", ...; None is the config's.
        opts_of_all: Config overrides of each detector.

    Returns:
        Detectors by title, the first one first. A path's title is the name of its folder.

    Raises:
        FileNotFoundError: A run, config or checkpoint is missing.
        ValueError: A config or an override is wrong, or two detectors have one title.
    """
    if run is None and config_file is None:
        run = DEFAULT_RUN
        if not Path(run, "config.yaml").is_file():
            raise FileNotFoundError(f"no detector in {run!r}: run `make demo` first, or name one")
    first = _title_of(run or config_file or "")
    detectors = {first: _load(run, config_file, [*opts, *opts_of_all], device)}
    for text in compared:
        title, equals, path = text.partition("=")
        if not equals or Path(text).exists():
            title, path = _title_of(text), text
        if title in detectors:
            raise ValueError(f"two detectors are called {title!r}: name one, TITLE=PATH")
        detectors[title] = _load(path, None, opts_of_all, device)
    return detectors


def _load(
    run: str | None, config_file: str | None, opts: Sequence[str], device: str | None
) -> OpenVocabularyPredictor:
    if run is None and "MODEL.WEIGHTS" not in opts[::2]:
        trained = Path(config_file or "").parent / FINAL_WEIGHTS
        run = str(trained) if trained.is_file() else None
    if run is not None:
        config_file, weights = find_checkpoint(run, config_file)
        opts = ["MODEL.WEIGHTS", weights, *opts]
    overrides = [*opts, *(("MODEL.DEVICE", device) if device else ())]
    predictor: OpenVocabularyPredictor
    predictor = OpenVocabularyPredictor(load_config(config_file or "", overrides))
    return predictor


def _title_of(path: str) -> str:
    """Name of a training's folder; a config not called config.yaml gives its own name."""
    resolved = Path(path).resolve()
    if resolved.suffix in (".yaml", ".yml") and resolved.stem != "config":
        return resolved.stem
    return resolved.parent.name if resolved.suffix else resolved.name


def icons_only(predictors: Mapping[str, OpenVocabularyPredictor]) -> str:
    """Say which detectors saw the miniature alone and find noise in photographs; "" if none."""
    titles = [title for title, predictor in predictors.items() if predictor.knows_icons_only]
    text = (
        f"Trained on the miniature's rendered icons only: {', '.join(titles)}. Detections in "
        "photographs are noise; these need a detector that was trained on photographs."
    )
    return text if titles else ""


def unknown_to_icons(
    predictors: Mapping[str, OpenVocabularyPredictor], vocabulary: Sequence[str]
) -> str:
    """Say which names hold a word that the miniature's CLIP has not learnt; "" if none does."""
    if not any(predictor.knows_icons_only for predictor in predictors.values()):
        return ""
    known = registered_names(MINIATURE_PREFIX)
    unknown = [name for name in vocabulary if not known.issuperset(name.lower().split())]
    text = (
        f"The miniature's CLIP knows the {len(known)} words of its world alone. What is found as "
        f"{some(unknown)} is noise."
    )
    return text if unknown else ""


class Detectors:
    """One detector, or several to compare, with one vocabulary and one rule of what is shown."""

    def __init__(
        self,
        predictors: Mapping[str, OpenVocabularyPredictor],
        keep: DetectionFilter,
        vocabulary: Sequence[str] | None = None,
        examples: Examples | None = None,
    ) -> None:
        """Give all of them, the first of which is the main one, its vocabulary or another one."""
        self.predictors = dict(predictors)
        self.main = next(iter(self.predictors.values()))
        if vocabulary is None:
            vocabulary = () if examples else self.main.vocabulary
        self.vocabulary = tuple(dict.fromkeys([*vocabulary, *(examples or ())]))
        self.keep = keep
        keep.check_vocabulary(self.vocabulary)
        for predictor in self.predictors.values():
            predictor.set_vocabulary(vocabulary, examples)
        self.best: tuple[float, str] = (0.0, "")  # score and class of all that was detected so far

    def detect(self, images: Sequence[NDArray[np.uint8]]) -> list[dict[str, Instances]]:
        """Detect in BGR pictures: per picture, the detections of each detector by its title."""
        all_found = [predictor.predict(images) for predictor in self.predictors.values()]
        for found in filter(len, all_found[0]):
            best = (float(found.scores[0]), self.vocabulary[int(found.pred_classes[0])])
            self.best = max(self.best, best)
        of_detectors = [
            [self.keep(found, self.vocabulary) for found in of_one] for of_one in all_found
        ]
        pictures = zip(*of_detectors, strict=True)
        return [dict(zip(self.predictors, found, strict=True)) for found in pictures]

    def records(self, found: Mapping[str, Instances]) -> dict[str, Any]:
        """Write detections as plain values: ``detections`` of the main detector, the others'."""
        records = {title: as_records(each, self.vocabulary) for title, each in found.items()}
        main, *others = records
        compared = {"compared": {title: records[title] for title in others}} if others else {}
        return {"detections": records[main], **compared}
