"""What ``demo.py`` leaves: annotated pictures and videos, ``detections.json`` and a page."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import urllib.parse
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.structures import Instances
from numpy.typing import NDArray
from PIL import Image as PILImage
from tqdm import tqdm

from hierkd.data.mapper import read_picture
from hierkd.evaluation.heat_maps import score_heat_maps
from hierkd.files import replacing
from hierkd.inference.detectors import Detectors
from hierkd.inference.drawing import Image, draw_instances, save_picture
from hierkd.inference.video import Frame, Video, VideoFile, picture_suffixes
from hierkd.reports.charts import draw_heat_map_sheet, draw_side_by_side
from hierkd.reports.page import Figure, Page, Picture, Section, data_uri, embedded, write_page

__all__ = [
    "Annotated",
    "annotate_pictures",
    "annotate_video",
    "name_outputs",
    "write_annotated_page",
    "write_detections",
]

logger = logging.getLogger(__name__)

PICTURES_AT_ONCE = 8  # of a folder or a video file: those of one size share a pass. [ours]
UNDRAWN = ".jsonl"  # suffix of an output that is not drawn
_HEAT_MAPS = 4  # classes of a picture whose heat maps are drawn, if none are named. [ours]
_CAMERA_FPS = 10.0  # of the video that a camera's pictures become. [ours]
_LISTED_CLASSES = 60  # of the vocabulary, at the top of a page. [ours]


@dataclass(frozen=True)
class Annotated:
    """What became of a picture or a video."""

    files: tuple[Path, ...]  # the annotated copy, if there is one, and after it the heat maps
    entry: Mapping[str, Any]  # in detections.json
    num_detections: int  # the main detector's
    caption: str
    is_video: bool = False


def name_outputs(sources: Sequence[Path], folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """Choose a file per source, with its suffix; all names, with heat maps', differ beyond case.

    Raises:
        ValueError: One, or a picture's heat maps, would replace a source; it is named.
    """
    taken: set[str] = set()
    inputs = {source.resolve() for source in sources}
    outputs = []
    for source, suffix in zip(sources, suffixes, strict=True):
        stem, number = source.stem, 1
        while taken & (names := {stem.casefold(), f"{stem}_heat_maps".casefold()}):
            stem, number = f"{source.stem}_{number}", number + 1
        taken |= names
        outputs.append(folder / f"{stem}{suffix}")
        for path in (outputs[-1], _heat_maps_path(outputs[-1])):
            if path.resolve() in inputs:
                raise ValueError(f"{path} is an input: write into another folder")
    return outputs


def _heat_maps_path(annotated: Path) -> Path:
    return annotated.with_name(f"{annotated.stem}_heat_maps{annotated.suffix}")


def annotate_pictures(
    detectors: Detectors,
    pictures: Sequence[tuple[Path, Path]],
    heat_maps: Sequence[str] | None = None,
) -> Iterator[Annotated | ValueError]:
    """Detect in pictures, in one go, and write their annotated copies.

    Args:
        pictures: Each, and its copy: a JPEG or PNG by its suffix, or not written (`UNDRAWN`).
        heat_maps: Classes whose heat maps are written beside the copy, too; an empty list stands
            for those detected, None for no heat maps.

    Yields:
        What became of each picture; of one that cannot be decoded the error, which names it.
    """
    images: dict[tuple[Path, Path], NDArray[np.uint8]] = {}
    for picture, output in pictures:
        try:
            images[picture, output] = read_picture(str(picture))
        except ValueError as error:
            known = picture.suffix.lower() in picture_suffixes()
            hint = "" if known else " A video is known by its suffix, such as .mp4."
            yield ValueError(f"{error}{hint}")
            continue
        # Beyond the first picture a file may be broken; Pillow's decoders then raise what they like
        with contextlib.suppress(Exception), PILImage.open(picture) as opened:
            count = getattr(opened, "n_frames", 1)
            if count > 1 and opened.format != "MPO":  # a phone's, with a second view of the same
                logger.warning("%s: the first of its %d pictures is taken", picture, count)
    everything = detectors.detect(list(images.values()))
    for ((picture, output), image), found in zip(images.items(), everything, strict=True):
        yield _annotate(detectors, picture, image, found, output, heat_maps)


def _annotate(
    detectors: Detectors,
    picture: Path,
    image: NDArray[np.uint8],
    found: Mapping[str, Instances],
    output: Path,
    heat_maps: Sequence[str] | None,
) -> Annotated:
    """Write what was found in a picture."""
    drawn = output.suffix != UNDRAWN
    if drawn:
        save_picture(output, _draw(detectors, image, found))
    files = [output] if drawn else []
    entry = {
        "file_name": str(picture),
        **({"annotated": output.name} if drawn else {}),
        "height": image.shape[0],
        "width": image.shape[1],
        **detectors.records(found),
    }
    classes = [record["class"] for record in entry["detections"]]
    mapped = list(heat_maps or ()) or list(dict.fromkeys(classes))[:_HEAT_MAPS]
    if heat_maps is not None and mapped:
        maps = score_heat_maps(detectors.main.model, detectors.main.prepare(image), mapped)
        files.append(_heat_maps_path(output))
        save_picture(files[-1], draw_heat_map_sheet(image[:, :, ::-1], maps))
        entry["heat_maps"] = files[-1].name
    best = {record["class"]: record["score"] for record in reversed(entry["detections"])}
    counts = Counter(classes).most_common()
    caption = ", ".join(f"{count} × {name} (up to {best[name]:.0%})" for name, count in counts)
    caption = caption or "nothing above the threshold"
    return Annotated(tuple(files), entry, len(classes), caption)


def annotate_video(
    detectors: Detectors,
    source: Path | int,
    output: Path,
    *,
    every: int = 1,
    max_frames: int | None = None,
) -> Annotated:
    """Detect in the frames of a video file, or of a camera until Ctrl-C.

    Writes the annotated frames as a video of the same speed, unless ``output`` is `UNDRAWN`, and
    beside it a .jsonl with a line per frame: ``frame``, ``seconds`` and its detections.

    Raises:
        ValueError: It cannot be read, or the video cannot be written.
    """
    lines = output.with_suffix(UNDRAWN)
    drawn = lines != output
    count = detections = 0
    size = (0, 0)
    with Video(source) as video:
        total = -(-video.num_frames // every) or None
        frames = itertools.islice(video.frames(every), max_frames)
        at_once = 1 if video.live else PICTURES_AT_ONCE
        with (
            replacing(lines) as making,
            making.open("w", encoding="utf-8") as file,
            VideoFile(output, _CAMERA_FPS if video.live else video.fps / every) as annotated,
            tqdm(total=max_frames or total, desc=video.name, unit="frame", disable=None) as bar,
        ):
            try:
                for frame, found in _detect_in(detectors, frames, at_once):
                    if drawn:
                        picture = _draw(detectors, frame.image, found)
                        annotated.write(picture, frame.seconds if video.live else None)
                    records = detectors.records(found)
                    line = {"frame": frame.index, "seconds": round(frame.seconds, 3), **records}
                    file.write(json.dumps(line) + "\n")
                    size = frame.image.shape[:2]
                    count, detections = count + 1, detections + len(records["detections"])
                    bar.update()
            except KeyboardInterrupt:  # the regular end of a camera
                if not video.live:
                    raise
                logger.info("stopped")
            if count == 0:
                raise ValueError(f"{video.name}: stopped before the first frame")
    entry = {
        "file_name": video.name,
        **({"annotated": output.name} if drawn else {}),
        "frames": lines.name,
        "height": size[0],
        "width": size[1],
        "fps": round(video.fps, 3),
        "every": every,
        "num_frames": count,
        "num_detections": detections,
    }
    caption = f"{count} frames, {detections / count:.1f} detections per frame"
    return Annotated((output,) if drawn else (), entry, detections, caption, is_video=True)


def _detect_in(
    detectors: Detectors, frames: Iterator[Frame], at_once: int
) -> Iterator[tuple[Frame, dict[str, Instances]]]:
    """Detect in frames, so many in a pass."""
    while part := list(itertools.islice(frames, at_once)):
        yield from zip(part, detectors.detect([each.image for each in part]), strict=True)


def _draw(detectors: Detectors, image: NDArray[np.uint8], found: Mapping[str, Instances]) -> Image:
    """Draw detections on a BGR picture -> RGB; several detectors side by side."""
    rgb = image[:, :, ::-1]
    if len(found) > 1:
        return draw_side_by_side(rgb, found, detectors.vocabulary)
    return draw_instances(rgb, next(iter(found.values())), detectors.vocabulary)


def write_detections(path: Path, detectors: Detectors, done: Sequence[Annotated]) -> None:
    """Write all detections, and what they were made with, as JSON."""
    keep = detectors.keep
    content = {
        "vocabulary": list(detectors.vocabulary),
        "detectors": list(detectors.predictors),
        "confidence_threshold": keep.score_threshold,
        "class_thresholds": dict(keep.class_thresholds),
        "top_k": keep.top_k,
        "images": [each.entry for each in done if not each.is_video],
        "videos": [each.entry for each in done if each.is_video],
    }
    with replacing(path) as making:
        making.write_text(json.dumps(content, indent=1), encoding="utf-8")


def write_annotated_page(
    path: Path, detectors: Detectors, done: Sequence[Annotated], *, embed: bool
) -> None:
    """Write an HTML page into the folder of the annotated files, or, to ``embed``, with them."""
    names = detectors.vocabulary
    more = len(names) - _LISTED_CLASSES
    facts = {
        "Vocabulary": ", ".join(names[:_LISTED_CLASSES]) + (f", and {more} more" * (more > 0)),
        "Detectors": ", ".join(detectors.predictors),
        "Score threshold": str(detectors.keep.score_threshold),
        **{f"Threshold of {k}": str(v) for k, v in detectors.keep.class_thresholds.items()},
    }
    figures: dict[bool, list[Figure]] = {True: [], False: []}
    for each in done:
        title = Path(each.entry["file_name"]).name
        annotated, *heat_maps = [_picture(file, title, embed) for file in each.files]
        is_wide = each.is_video or heat_maps or "compared" in each.entry
        figures[bool(is_wide)].append(Figure([annotated], title, each.caption))
        figures[True] += [Figure([sheet], caption="heat maps") for sheet in heat_maps]
    sections = [
        Section(facts=facts),
        Section(figures=figures[True], columns=1),
        Section(figures=figures[False], columns=2),
    ]
    write_page(path, Page("Detections", sections))


def _picture(file: Path, alternative: str, embed: bool) -> Picture:
    """An annotated file on a page in its folder."""
    link = urllib.parse.quote(file.name)
    if file.suffix == ".webm":
        source = data_uri("video/webm", file.read_bytes()) if embed else link
        return Picture(source, alternative, video=True)
    if file.suffix not in (".jpg", ".png"):  # a video that browsers do not play
        return Picture("", file.name, link=link)
    with PILImage.open(file) as image:
        if not embed:
            return Picture(link, alternative, link=link, size=image.size)
        return embedded(np.asarray(image.convert("RGB"), np.uint8), alternative)
