"""What a demonstration leaves: annotated pictures and videos, JSON, a page; and a window."""

from __future__ import annotations

import io
import json
import os
import sys
import urllib.parse
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import cv2
import numpy as np
from PIL import Image as PILImage

from hierkd.files import replacing
from hierkd.reports.drawing import Image
from hierkd.reports.page import data_uri, escape, img, jpeg_uri, page

__all__ = [
    "VIDEO_CODECS",
    "PageEntry",
    "VideoFile",
    "Window",
    "check_inputs_stay",
    "heat_maps_path",
    "list_names",
    "name_outputs",
    "save_picture",
    "write_json",
    "write_page",
]

# What the OpenCV of PyPI can write without further libraries. Browsers play WebM only. [ours]
VIDEO_CODECS = {".mp4": "mp4v", ".avi": "MJPG", ".webm": "VP80"}

_LISTED_CLASSES = 60  # of the vocabulary, at the top of a page


def name_outputs(sources: Sequence[Path], suffixes: Sequence[str]) -> list[str]:
    """Choose a file name per source; sources of one name are numbered.

    Args:
        sources: Pictures and videos.
        suffixes: The suffix of what becomes of each.

    Returns:
        Names, all different whatever their suffix, and whatever their case.
    """
    taken: set[str] = set()
    names = []
    for source, suffix in zip(sources, suffixes, strict=True):
        stem, number = source.stem, 1
        while stem.casefold() in taken:
            stem, number = f"{source.stem}_{number}", number + 1
        taken.add(stem.casefold())
        names.append(f"{stem}{suffix}")
    return names


def check_inputs_stay(sources: Sequence[Path], folder: Path, names: Sequence[str]) -> None:
    """Refuse to write over the pictures and videos that are looked at.

    Args:
        sources: Of the pictures and videos.
        folder: Where the outputs go.
        names: The outputs' names, from :func:`name_outputs`.

    Raises:
        ValueError: An output, or a picture's heat maps, would replace a source; it is named.
    """
    inputs = {source.resolve() for source in sources}
    for name in names:
        for path in (folder / name, heat_maps_path(folder / name)):
            if path.resolve() in inputs:
                raise ValueError(f"--output: {path} is an input: name another folder")


def heat_maps_path(annotated: Path) -> Path:
    """Where the heat maps of a picture go, beside its annotated copy."""
    return annotated.with_name(f"{annotated.stem}_heat_maps.png")


def save_picture(path: Path, image: Image) -> None:
    """Write an RGB picture as PNG, whole or not at all."""
    buffer = io.BytesIO()
    PILImage.fromarray(image).save(buffer, format="PNG")
    with replacing(path) as making:
        making.write_bytes(buffer.getvalue())


def write_json(path: Path, content: Any) -> None:
    """Write JSON for programs and readers, whole or not at all."""
    with replacing(path) as making:
        making.write_text(json.dumps(content, indent=1), encoding="utf-8")


class VideoFile:
    """A video being written; a context manager that leaves a whole file or, after an error, none.

    The first frame decides the size.
    """

    def __init__(self, path: Path, fps: float) -> None:
        """Prepare to write.

        Args:
            path: With one of the suffixes of :data:`VIDEO_CODECS`.
            fps: Frames per second at which it is to be played.

        Raises:
            ValueError: Another suffix.
        """
        if path.suffix not in VIDEO_CODECS:
            raise ValueError(f"{path}: a video is written to one of {sorted(VIDEO_CODECS)}")
        self.path, self.fps = path, fps
        # The suffix decides the container.
        self._making = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
        self._writer: Any = None
        self._size = (0, 0)
        self.num_frames = 0

    def __enter__(self) -> VideoFile:
        return self

    def write(self, image: Image, until: float | None = None) -> None:
        """Add a frame.

        Args:
            image: (H, W, 3), RGB.
            until: Repeat it until the video is that many seconds long, or leave it out if the video
                is already: keeps what comes at irregular times in real time. None adds it once.

        Raises:
            ValueError: OpenCV cannot write such a video here.
        """
        if self._writer is None:
            self._open(image)
        height, width = image.shape[:2]
        if (width, height) != self._size:
            image = np.asarray(cv2.resize(np.ascontiguousarray(image), self._size), np.uint8)
        bgr = np.ascontiguousarray(image[:, :, ::-1])
        if until is None:
            self._writer.write(bgr)
            self.num_frames += 1
        while until is not None and self.num_frames <= until * self.fps:
            self._writer.write(bgr)
            self.num_frames += 1

    def _open(self, image: Image) -> None:
        # Codecs that halve the colours' resolution want even sides.
        self._size = (image.shape[1] // 2 * 2 or 2, image.shape[0] // 2 * 2 or 2)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        codec = cv2.VideoWriter.fourcc(*VIDEO_CODECS[self.path.suffix])
        self._writer = cv2.VideoWriter(str(self._making), codec, self.fps, self._size)
        if not self._writer.isOpened():
            raise ValueError(
                f"{self.path}: this OpenCV cannot write {VIDEO_CODECS[self.path.suffix]} video of "
                f"{self._size[0]} x {self._size[1]} pixels, or the folder is not writable"
            )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._writer is not None:
            self._writer.release()
        if kind is None and self._making.is_file():
            os.replace(self._making, self.path)
        self._making.unlink(missing_ok=True)


class Window:
    """Shows pictures on the screen."""

    def __init__(self, title: str) -> None:
        """Open it.

        Raises:
            ValueError: OpenCV is built without windows, or there is no screen.
        """
        # Without a screen, OpenCV's own windows end the process instead of raising an error.
        if sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys():
            raise ValueError(
                "--window: there is no screen (neither DISPLAY nor WAYLAND_DISPLAY is set): leave "
                "it out and look at the files in --output"
            )
        self.title = title
        try:
            cv2.namedWindow(title, cv2.WINDOW_NORMAL)
        except (cv2.error, AttributeError) as error:
            raise ValueError(
                "--window: this OpenCV has no windows; opencv-python-headless is installed, "
                "opencv-python has them: pip uninstall opencv-python-headless; "
                "pip install opencv-python"
            ) from error

    def show(self, image: Image, wait_ms: int) -> bool:
        """Show an RGB picture and wait for a key.

        Args:
            image: (H, W, 3), RGB.
            wait_ms: How long; 0 is until a key is pressed.

        Returns:
            False when the user wants no more: q, Escape, or the window was closed.
        """
        cv2.imshow(self.title, np.ascontiguousarray(image[:, :, ::-1]))
        key = cv2.waitKey(wait_ms) & 0xFF
        closed = cv2.getWindowProperty(self.title, cv2.WND_PROP_VISIBLE) < 1
        return not closed and key not in (ord("q"), 27)

    def close(self) -> None:
        """Take it from the screen."""
        cv2.destroyWindow(self.title)


@dataclass(frozen=True)
class PageEntry:
    """A picture or video on a page.

    Attributes:
        source: What it was made from, as text.
        file: The annotated picture or video.
        records: Its detections, as :func:`hierkd.inference.detections.as_records` gives them.
        wide: Whether it takes a row for itself.
        extra: More pictures that belong to it, below.
        note: A line of text.
    """

    source: str
    file: Path
    records: Sequence[Mapping[str, Any]] = ()
    wide: bool = False
    extra: tuple[Path, ...] = ()
    note: str = ""


def write_page(
    path: Path, entries: Sequence[PageEntry], facts: Mapping[str, str], *, embed: bool
) -> None:
    """Write an HTML page of what was detected.

    Args:
        path: Of the page; the files of the entries lie in its folder or below.
        entries: From top to bottom.
        facts: What the page says of the run: a name and a text each.
        embed: Whether the pictures (as JPEG) and videos are put into the page, so that it is one
            file, or stay beside it.
    """
    rows = "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in facts.items())
    wide = "".join(_entry(e, path.parent, embed) for e in entries if e.wide)
    narrow = "".join(_entry(e, path.parent, embed) for e in entries if not e.wide)
    body = f"""<h1>Detections</h1>
<table class="facts"><tbody>{rows}</tbody></table>
<div class="grid" style="margin: 1.5rem 0">{wide}</div>
<div class="grid two">{narrow}</div>"""
    with replacing(path) as making:
        making.write_text(page("Detections", body), encoding="utf-8")


def _entry(entry: PageEntry, folder: Path, embed: bool) -> str:
    counts = Counter(record["class"] for record in entry.records)
    best = {name: max(r["score"] for r in entry.records if r["class"] == name) for name in counts}
    found = [f"{n} × {name} (up to {best[name]:.0%})" for name, n in counts.most_common()]
    caption = entry.note or ", ".join(found) or "nothing above the threshold"
    shown = "".join(
        _shown(file, folder, entry.source, embed) for file in (entry.file, *entry.extra)
    )
    return (
        f"<figure>{shown}<figcaption><b>{escape(entry.source)}</b><br>{escape(caption)}"
        "</figcaption></figure>\n"
    )


def _shown(file: Path, folder: Path, alternative: str, embed: bool) -> str:
    link = escape(urllib.parse.quote(file.relative_to(folder).as_posix()))
    if file.suffix == ".png":
        if not embed:
            return f'<a href="{link}">{img(link, alternative)}</a>'
        with PILImage.open(file) as image:
            return img(jpeg_uri(np.asarray(image.convert("RGB"), np.uint8)), alternative)
    if file.suffix != ".webm":  # the other codecs are not for browsers
        return f'<p><a href="{link}">{escape(file.name)}</a></p>'
    source = data_uri("video/webm", file.read_bytes()) if embed else link
    return f'<video src="{source}" controls muted loop style="width: 100%"></video>'


def list_names(names: Sequence[str]) -> str:
    """Write a vocabulary for the top of a page; a long one is cut."""
    more = len(names) - _LISTED_CLASSES
    return ", ".join(names[:_LISTED_CLASSES]) + (f", and {more} more" if more > 0 else "")
