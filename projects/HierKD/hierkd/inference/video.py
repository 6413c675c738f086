"""Pictures and videos that a command line names, cameras, and videos being written."""

from __future__ import annotations

import glob
import logging
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

__all__ = [
    "VIDEO_CODECS",
    "Frame",
    "Video",
    "VideoFile",
    "find_inputs",
    "is_video",
    "picture_suffixes",
]

logger = logging.getLogger(__name__)

# What FFmpeg, inside OpenCV, reads and cameras, phones and sites write. By content it would read a
# text, a PDF and the cover of an MP3, too.
# fmt: off
VIDEO_SUFFIXES = {
    ".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mp4v", ".mpg", ".mpeg", ".mpe", ".m1v",
    ".m2v", ".vob", ".mod", ".tod", ".wmv", ".asf", ".mts", ".m2ts", ".m2t", ".ts", ".tp", ".trp",
    ".3gp", ".3g2", ".flv", ".f4v", ".ogv", ".ogm", ".divx", ".mxf", ".qt", ".rm", ".rmvb", ".dv",
    ".mjpg", ".mjpeg", ".h264", ".264", ".hevc", ".h265", ".265", ".ivf", ".y4m", ".wtv", ".amv",
    ".gifv", ".insv", ".lrv",
}
# fmt: on
# Formats of Pillow's that are no pictures of pixels, or that it can only write.
_NO_PICTURES = {"MPEG", "PDF", "EPS", "WMF", "BUFR", "GRIB", "HDF5", "IPTC", "PALM"}
# What the OpenCV of PyPI can write without further libraries. Browsers play WebM only. [ours]
VIDEO_CODECS = {".mp4": "mp4v", ".avi": "MJPG", ".webm": "VP80"}

# Frames per second of videos that do not say. [ours]
_DEFAULT_FPS = 25.0
_MAX_FPS = 1000.0


def is_video(path: Path) -> bool:
    """Whether a file is a video, by its suffix."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def picture_suffixes() -> set[str]:
    """The suffixes of what Pillow, with its plugins, reads as pictures."""
    known = Image.registered_extensions().items()
    return {suffix for suffix, name in known if name not in _NO_PICTURES} - VIDEO_SUFFIXES


def find_inputs(inputs: Iterable[str]) -> list[Path]:
    """List the pictures and videos that files, folders (not their subfolders) and globs name.

    Args:
        inputs: As typed by the user. A file that is named itself may have any suffix; it is a
            picture unless its suffix is a video's. What a folder holds besides pictures and videos
            is passed over with a warning, hidden files without one.

    Returns:
        Each path once, in the order of the inputs; folders and globs in the order of the names.

    Raises:
        FileNotFoundError: One of them matches nothing; it is named.
    """
    found: dict[Path, None] = {}
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            known = picture_suffixes() | VIDEO_SUFFIXES
            # a link to nothing is named later on; macOS leaves a hidden file beside each picture
            files = [p for p in sorted(path.iterdir()) if not p.is_dir() and p.name[0] != "."]
            matches = [p for p in files if p.suffix.lower() in known]
            suffixes = [p.suffix.lower() or "no suffix" for p in files]
            if passed := Counter(suffix for suffix in suffixes if suffix not in known):
                logger.warning(
                    "%s: passed over %d of %d files, by their suffixes no pictures or videos: %s",
                    *(text, passed.total(), len(files)),
                    ", ".join(f"{suffix} ({count})" for suffix, count in sorted(passed.items())),
                )
        else:
            names = [text] if path.is_file() else sorted(glob.glob(text, recursive=True))
            matches = [Path(name) for name in names if os.path.isfile(name)]
        if not matches:
            raise FileNotFoundError(f"no picture or video matches {text!r}")
        found.update(dict.fromkeys(matches))
    return list(found)


@dataclass(frozen=True)
class Frame:
    """A picture of a video."""

    image: NDArray[np.uint8]  # (H, W, 3), BGR
    index: int  # in the video, from 0, also where frames are skipped
    seconds: float  # since the beginning; of a camera, by the clock


class Video:
    """A video file, or a (``live``) camera, frame by frame; a context manager.

    ``num_frames`` are those that the file announces: 0 if it does not, or for a camera.
    """

    def __init__(self, source: Path | int) -> None:
        """Open a file, or the camera of a number.

        Raises:
            ValueError: OpenCV can open no such camera, or cannot read the file as a video.
        """
        self.live = isinstance(source, int)
        self.name = f"camera {source}" if self.live else str(source)
        self._capture = cv2.VideoCapture(source if isinstance(source, int) else str(source))
        if not self._capture.isOpened():
            why = "there is none, or it is in use" if self.live else "broken, or no known codec"
            raise ValueError(f"{self.name} cannot be read as a video: {why}")
        fps = self._capture.get(cv2.CAP_PROP_FPS)
        self.fps = fps if 0 < fps <= _MAX_FPS else _DEFAULT_FPS
        announced = self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
        self.num_frames = 0 if self.live else max(0, int(announced))

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *_: object) -> None:
        self._capture.release()

    def frames(self, every: int = 1) -> Iterator[Frame]:
        """Yield every ``every``-th frame, the first one first.

        Raises:
            ValueError: There is not a single frame.
        """
        started, index = time.monotonic(), 0
        while self._capture.grab():
            if index % every == 0:
                decoded, image = self._capture.retrieve()
                if not decoded:
                    break
                seconds = time.monotonic() - started if self.live else index / self.fps
                yield Frame(np.asarray(image, np.uint8), index, seconds)
            index += 1
        if index == 0:
            raise ValueError(f"{self.name}: not a single frame can be read")


class VideoFile:
    """A video being written; a context manager that leaves a whole file or, after an error, none.

    The first frame decides the size.
    """

    def __init__(self, path: Path, fps: float) -> None:
        """Prepare to write at ``fps`` frames per second; the suffix is one of ``VIDEO_CODECS``."""
        self.path, self.fps = path, fps
        # The suffix decides the container.
        self._making = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
        self._writer: Any = None
        self._size = (0, 0)
        self._num_frames = 0

    def __enter__(self) -> VideoFile:
        return self

    def write(self, image: NDArray[np.uint8], until: float | None = None) -> None:
        """Add a frame (H, W, 3), RGB: once, or as often as makes the video ``until`` seconds long.

        Raises:
            ValueError: OpenCV cannot write such a video here.
        """
        if self._writer is None:
            # Codecs that halve the colours' resolution want even sides.
            self._size = (image.shape[1] // 2 * 2 or 2, image.shape[0] // 2 * 2 or 2)
            codec = cv2.VideoWriter.fourcc(*VIDEO_CODECS[self.path.suffix])
            self._writer = cv2.VideoWriter(str(self._making), codec, self.fps, self._size)
            if not self._writer.isOpened():
                raise ValueError(
                    f"{self.path}: this OpenCV cannot write such video of {self._size[0]} x "
                    f"{self._size[1]} pixels, or the folder is not writable"
                )
        bgr = cv2.resize(cv2.cvtColor(image, cv2.COLOR_RGB2BGR), self._size)
        wanted = self._num_frames + 1 if until is None else int(until * self.fps) + 1
        while self._num_frames < wanted:
            self._writer.write(bgr)
            self._num_frames += 1

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._writer is not None:
            self._writer.release()
        if kind is None and self._making.is_file():
            os.replace(self._making, self.path)
        self._making.unlink(missing_ok=True)
