"""Detecting in pictures, videos and from a camera, and writing down what was found."""

from __future__ import annotations

import argparse
import itertools
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.structures import Instances
from numpy.typing import NDArray
from tqdm import tqdm

from hierkd.data.coco_json import get_entries, read_coco_json
from hierkd.data.mapper import read_picture
from hierkd.evaluation.heat_maps import score_heat_maps
from hierkd.files import replacing
from hierkd.inference.detections import DetectionFilter, as_coco_results, as_records
from hierkd.inference.predictor import OpenVocabularyPredictor
from hierkd.inference.video import Frame, Video
from hierkd.load_config import load_config
from hierkd.reports.charts import draw_heat_map_sheet, draw_side_by_side
from hierkd.reports.demo_outputs import (
    PageEntry,
    VideoFile,
    Window,
    heat_maps_path,
    save_picture,
)
from hierkd.reports.drawing import Image, draw_instances

__all__ = [
    "DEFAULT_RUN",
    "CocoIds",
    "Detectors",
    "add_detector_options",
    "annotate_picture",
    "annotate_video",
    "icons_only",
    "load_detector",
    "parse_compared",
    "title_of",
]

logger = logging.getLogger(__name__)

DEFAULT_RUN = "output/demo/hierkd"  # where `make demo` leaves its detector
_TRAINED_WEIGHTS = "model_final.pth"  # what detectron2's trainer calls its last checkpoint

_FRAMES_PER_PASS = 8  # of a video file. [ours]
_HEAT_MAPS = 4  # classes of a picture whose heat maps are drawn, if none are named. [ours]
_CAMERA_FPS = 10.0  # of the video that a camera's pictures become. [ours]


def add_detector_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which detectors are shown, ``--opts`` as the last one."""
    add = parser.add_argument_group("with which detector").add_argument
    add(
        "--run",
        metavar="PATH",
        help="a training's folder, or a checkpoint with its config.yaml beside it or with "
        f"--config-file; default: {DEFAULT_RUN}",
    )
    add(
        "--compare",
        nargs="+",
        default=[],
        metavar="[TITLE=]PATH",
        help="more of them, side by side with the first, for the same class names",
    )
    add("--config-file", metavar="YAML", help="config; default: the config.yaml of --run")
    add(
        "--device",
        metavar="DEVICE",
        help="cpu, cuda, cuda:1, ...; default: the config's; the CPU where there is no GPU",
    )
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="KEY VALUE",
        help="config overrides of the first detector, last on the line, e.g. MODEL.WEIGHTS "
        f"model.pth; without --run and MODEL.WEIGHTS, a {_TRAINED_WEIGHTS} beside the config file "
        "is taken",
    )


def load_detector(
    run: str | None, config_file: str | None, opts: Sequence[str], device: str | None
) -> OpenVocabularyPredictor:
    """Build the detector; a config without named weights finds its run's own beside it.

    Raises:
        FileNotFoundError: There is no such run or config, or no weights.
        ValueError: The config or the overrides are wrong.
    """
    if run is None and config_file is None:
        run = DEFAULT_RUN
        if not Path(run, "config.yaml").is_file():
            raise FileNotFoundError(
                f"--run: no detector in {run!r}; run `make demo` first, or name one: --run PATH, "
                "or --config-file YAML --opts MODEL.WEIGHTS FILE"
            )
    if run is not None and "MODEL.WEIGHTS" not in opts[::2]:
        predictor: OpenVocabularyPredictor = OpenVocabularyPredictor.from_checkpoint(
            run, config_file, device=device, opts=opts
        )
        return predictor
    config_file = config_file or str(Path(run or "") / "config.yaml")
    overrides = list(opts) + (["MODEL.DEVICE", device] if device else [])
    trained = Path(config_file).parent / _TRAINED_WEIGHTS
    if "MODEL.WEIGHTS" not in opts[::2] and trained.is_file():
        overrides += ["MODEL.WEIGHTS", str(trained)]
    predictor = OpenVocabularyPredictor(load_config(config_file, overrides))
    return predictor


def icons_only(predictors: Mapping[str, OpenVocabularyPredictor]) -> str:
    """Say which detectors are useless on photographs, since they saw the miniature alone.

    Args:
        predictors: By title.

    Returns:
        A sentence or two for the user; "" if there is no such detector.
    """
    titles = [title for title, predictor in predictors.items() if predictor.knows_icons_only]
    if not titles:
        return ""
    return (
        f"Trained on the miniature's rendered icons only: {', '.join(titles)}. Detections in "
        "photographs are noise; these need a detector that was trained on photographs."
    )


def parse_compared(texts: Sequence[str], first: str) -> dict[str, str]:
    """Read TITLE=PATH or PATH; a path's title is its last folder's name.

    Args:
        texts: As typed.
        first: Title of the first detector.

    Returns:
        Title to path.

    Raises:
        ValueError: Two detectors have one title.
    """
    runs: dict[str, str] = {}
    for text in texts:
        title, equals, path = text.partition("=")
        if not equals or Path(text).exists():
            title, path = title_of(text), text
        if title in runs or title == first:
            raise ValueError(f"--compare: two detectors are called {title!r}: name one, TITLE=PATH")
        runs[title] = path
    return runs


def title_of(path: str) -> str:
    """Name of a training's folder, or of the folder of its checkpoint or config.yaml.

    A config of another name gives its own name.
    """
    resolved = Path(path).resolve()
    if resolved.suffix in (".yaml", ".yml") and resolved.stem != "config":
        return resolved.stem
    return resolved.parent.name if resolved.suffix else resolved.name


class Detectors:
    """One detector, or several to compare, with one vocabulary and one rule of what is shown."""

    def __init__(
        self,
        predictors: Mapping[str, OpenVocabularyPredictor],
        keep: DetectionFilter,
        vocabulary: Sequence[str] | None = None,
    ) -> None:
        """Give all of them one vocabulary.

        Args:
            predictors: By name; the first one is the main one.
            keep: Which detections are shown and written.
            vocabulary: Class names; None is the main detector's own.

        Raises:
            ValueError: The vocabulary is unusable, or a class with a threshold is not in it.
        """
        self.predictors = dict(predictors)
        self.main = next(iter(self.predictors.values()))
        self.vocabulary = tuple(self.main.vocabulary if vocabulary is None else vocabulary)
        self.keep = keep
        keep.check_vocabulary(self.vocabulary)
        for predictor in self.predictors.values():
            predictor.set_vocabulary(self.vocabulary)

    def detect(self, images: Sequence[NDArray[np.uint8]]) -> list[dict[str, Instances]]:
        """Detect in BGR pictures: per picture, the detections of each detector by its name."""
        of_detectors = [
            [self.keep(found, self.vocabulary) for found in predictor.predict(images)]
            for predictor in self.predictors.values()
        ]
        return [
            dict(zip(self.predictors, found, strict=True))
            for found in zip(*of_detectors, strict=True)
        ]

    def draw(self, image: NDArray[np.uint8], found: Mapping[str, Instances]) -> Image:
        """Draw detections on a BGR picture -> RGB; several detectors side by side."""
        rgb = image[:, :, ::-1]
        if len(found) == 1:
            return draw_instances(rgb, next(iter(found.values())), self.vocabulary)
        return draw_side_by_side(rgb, found, self.vocabulary)

    def records(self, found: Mapping[str, Instances]) -> dict[str, Any]:
        """Write detections as plain values: ``detections`` of the main detector, the others'."""
        main, *others = [
            (name, as_records(instances, self.vocabulary)) for name, instances in found.items()
        ]
        return {"detections": main[1]} | ({"compared": dict(others)} if others else {})

    def draw_heat_maps(
        self, image: NDArray[np.uint8], found: Instances, classes: Sequence[str]
    ) -> Image | None:
        """Draw the main detector's heat maps over a BGR picture -> RGB.

        Args:
            image: (H, W, 3).
            found: The main detector's detections.
            classes: Which; none means the first few classes that were detected.

        Returns:
            The sheet; None where there is no class to draw.
        """
        detected = [self.vocabulary[index] for index in found.pred_classes.tolist()]
        chosen = list(classes) or list(dict.fromkeys(detected))[:_HEAT_MAPS]
        if not chosen:
            return None
        maps = score_heat_maps(self.main.model, self.main.prepare(image), chosen)
        return draw_heat_map_sheet(image[:, :, ::-1], maps)


@dataclass(frozen=True)
class CocoIds:
    """The ids by which an annotation file calls pictures and classes.

    Attributes:
        images: File name without its folder, to id; without names that several images have.
        categories: Class name to id.
    """

    images: Mapping[str, int]
    categories: Mapping[str, int]

    @classmethod
    def read(cls, path: str) -> CocoIds:
        """Read them.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is no annotation file.
        """
        content = read_coco_json(path)
        images = get_entries(content, "images", {"id": int, "file_name": str}, path)
        categories = get_entries(content, "categories", {"id": int, "name": str}, path)
        names = [Path(entry["file_name"]).name for entry in images]
        times = Counter(names)
        return cls(
            {
                name: entry["id"]
                for name, entry in zip(names, images, strict=True)
                if times[name] == 1
            },
            {entry["name"]: entry["id"] for entry in categories},
        )

    def check(self, pictures: Iterable[Path], vocabulary: Sequence[str]) -> None:
        """Raise ValueError if a picture or a class has no id."""
        unknown = [str(path) for path in pictures if path.name not in self.images]
        if unknown:
            raise ValueError(
                f"--coco-results: the file has no image, or several, of the name of {unknown[:5]}"
            )
        classes = [name for name in vocabulary if name not in self.categories]
        if classes:
            raise ValueError(f"--coco-results: the file has no categories {classes[:10]}")

    def results(self, picture: Path, records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Entries of a COCO results file for the detections in a picture."""
        return as_coco_results(records, self.images[picture.name], self.categories)


def annotate_picture(
    detectors: Detectors,
    picture: Path,
    output: Path,
    *,
    heat_maps: Sequence[str] | None = None,
    window: Window | None = None,
) -> tuple[dict[str, Any], PageEntry, bool]:
    """Detect in a picture and write its annotated copy.

    Args:
        detectors: Detect and draw.
        picture: A file.
        output: PNG to write.
        heat_maps: Classes whose heat maps are written, too, as OUTPUT_heat_maps.png; none in the
            list are those detected. None is no heat maps.
        window: Where to show it.

    Returns:
        Its entry of ``detections.json`` and of the page, and False if the user wants no more.

    Raises:
        ValueError: The picture cannot be decoded; it is named.
    """
    image = read_picture(str(picture))
    (found,) = detectors.detect([image])
    drawn = detectors.draw(image, found)
    save_picture(output, drawn)
    entry = {
        "file_name": str(picture),
        "annotated": output.name,
        "height": image.shape[0],
        "width": image.shape[1],
        **detectors.records(found),
    }
    extra: tuple[Path, ...] = ()
    if heat_maps is not None:
        sheet = detectors.draw_heat_maps(image, next(iter(found.values())), heat_maps)
        if sheet is not None:
            extra = (heat_maps_path(output),)
            save_picture(extra[0], sheet)
            entry["heat_maps"] = extra[0].name
    go_on = window is None or window.show(drawn, wait_ms=0)
    wide = len(found) > 1 or bool(extra)
    return entry, PageEntry(picture.name, output, entry["detections"], wide, extra), go_on


def annotate_video(
    detectors: Detectors,
    source: Path | int,
    output: Path,
    *,
    every: int = 1,
    max_frames: int | None = None,
    window: Window | None = None,
) -> tuple[dict[str, Any], PageEntry]:
    """Detect in the frames of a video file, or of a camera until the user stops it.

    Writes the annotated frames as a video of the same speed, and beside it a .jsonl with a line per
    frame: ``frame``, ``seconds`` and its detections. A camera ends with Ctrl-C, or q in the window.

    Args:
        detectors: Detect and draw.
        source: A file, or the number of a camera.
        output: Video to write; its suffix is one of ``VIDEO_CODECS``.
        every: Only every so many frames are looked at; the others are left out.
        max_frames: Stop after so many frames; None is all of them.
        window: Where to show them.

    Returns:
        Its entries of ``detections.json`` and of the page.

    Raises:
        ValueError: It cannot be read, or the video cannot be written.
    """
    lines = output.with_suffix(".jsonl")
    count = detections = 0
    size = (0, 0)
    with Video(source) as video:
        fps = _CAMERA_FPS if video.live else video.fps / every
        total = -(-video.num_frames // every) or None
        total = max_frames if total is None else min(total, max_frames or total)
        frames = itertools.islice(video.frames(every), max_frames)
        one_by_one = video.live or window is not None
        with (
            replacing(lines) as making,
            making.open("w", encoding="utf-8") as file,
            VideoFile(output, fps) as annotated,
            tqdm(total=total, desc=Path(video.name).name, unit="frame", disable=None) as bar,
        ):
            for frame, found in _until_stopped(
                _detect_in(detectors, frames, 1 if one_by_one else _FRAMES_PER_PASS), video.live
            ):
                drawn = detectors.draw(frame.image, found)
                annotated.write(drawn, frame.seconds if video.live else None)
                records = detectors.records(found)
                line = {"frame": frame.index, "seconds": round(frame.seconds, 3), **records}
                file.write(json.dumps(line) + "\n")
                size = frame.image.shape[:2]
                count, detections = count + 1, detections + len(records["detections"])
                bar.update()
                if window is not None and not window.show(drawn, wait_ms=1):
                    break
            if count == 0:
                raise ValueError(f"{video.name}: stopped before the first frame")
    entry = {
        "file_name": video.name,
        "annotated": output.name,
        "frames": lines.name,
        "height": size[0],
        "width": size[1],
        "fps": round(video.fps, 3),
        "every": every,
        "num_frames": count,
        "num_detections": detections,
    }
    note = f"{count} frames, {detections / count:.1f} detections per frame"
    return entry, PageEntry(Path(video.name).name, output, wide=True, note=note)


def _detect_in(
    detectors: Detectors, frames: Iterator[Frame], size: int
) -> Iterator[tuple[Frame, dict[str, Instances]]]:
    """Detect in frames, several at a time."""
    while part := list(itertools.islice(frames, size)):
        yield from zip(part, detectors.detect([frame.image for frame in part]), strict=True)


def _until_stopped(
    found: Iterator[tuple[Frame, dict[str, Instances]]], live: bool
) -> Iterator[tuple[Frame, dict[str, Instances]]]:
    """Pass frames on; Ctrl-C while waiting for a camera's is its regular end."""
    while True:
        try:
            each = next(found, None)
        except KeyboardInterrupt:
            if not live:
                raise
            logger.info("stopped")
            return
        if each is None:
            return
        yield each
