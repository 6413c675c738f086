"""Where frames come from: pictures and videos that a command line names, and cameras."""

from __future__ import annotations

import glob
import logging
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import cv2
import numpy as np
from numpy.typing import NDArray

__all__ = ["PICTURE_SUFFIXES", "VIDEO_SUFFIXES", "Frame", "Video", "find_inputs", "is_video"]

logger = logging.getLogger(__name__)

PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm"}
VIDEO_SUFFIXES = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg"}

# Frames per second of videos that do not say. [ours]
_DEFAULT_FPS = 25.0
_MAX_FPS = 1000.0
# Frames that a container may announce and not have before it is worth a warning. [ours] Containers
# estimate; a truncated file lacks more.
_TOLERATED_MISSING = 0.02


def is_video(path: Path) -> bool:
    """Whether a file is a video, by its suffix."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def find_inputs(inputs: Iterable[str]) -> list[Path]:
    """List the pictures and videos that files, folders (not their subfolders) and globs name.

    Args:
        inputs: As typed by the user. A file that is named itself may have any suffix; it is a
            picture unless its suffix is a video's.

    Returns:
        Each path once, in the order of the inputs; folders and globs in the order of the names.

    Raises:
        FileNotFoundError: One of them matches nothing; it is named.
    """
    known = PICTURE_SUFFIXES | VIDEO_SUFFIXES
    found: dict[Path, None] = {}
    for text in inputs:
        path = Path(text)
        if path.is_file():
            matches = [path]
        elif path.is_dir():
            matches = [p for p in sorted(path.iterdir()) if p.suffix.lower() in known]
        else:
            matches = [Path(p) for p in sorted(glob.glob(text, recursive=True))]
            matches = [p for p in matches if p.is_file()]
        if not matches:
            raise FileNotFoundError(f"--input: no picture or video matches {text!r}")
        found.update(dict.fromkeys(matches))
    return list(found)


@dataclass(frozen=True)
class Frame:
    """A picture of a video.

    Attributes:
        image: (H, W, 3), BGR, 0..255.
        index: Its number in the video, from 0, also where frames are skipped.
        seconds: Its time since the beginning; of a camera, by the clock.
    """

    image: NDArray[np.uint8]
    index: int
    seconds: float


class Video:
    """A video file, or a camera, frame by frame; a context manager.

    Attributes:
        name: For messages.
        live: Whether it is a camera.
        fps: Frames per second.
        num_frames: How many the file announces; 0 if it does not, or for a camera.
    """

    def __init__(self, source: str | Path | int) -> None:
        """Open it.

        Args:
            source: Path of a file, or number of a camera.

        Raises:
            ValueError: OpenCV can open no such camera, or cannot read the file as a video.
        """
        self.live = isinstance(source, int)
        self.name = f"camera {source}" if self.live else str(source)
        try:
            self._capture = cv2.VideoCapture(source if isinstance(source, int) else str(source))
            opened = self._capture.isOpened()
        except cv2.error as error:
            raise ValueError(f"{self.name}: cannot be opened as a video ({error.err})") from error
        if not opened and self.live:
            raise ValueError(
                f"there is no {self.name}, or another program uses it, or its use is not allowed"
            )
        if not opened:
            raise ValueError(f"{self.name}: cannot be read as a video: broken, or no known codec")
        fps = self._capture.get(cv2.CAP_PROP_FPS)
        self.fps = fps if math.isfinite(fps) and 0 < fps <= _MAX_FPS else _DEFAULT_FPS
        announced = self._capture.get(cv2.CAP_PROP_FRAME_COUNT)
        usable = not self.live and math.isfinite(announced) and announced > 0
        self.num_frames = int(announced) if usable else 0

    def __enter__(self) -> Video:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._capture.release()

    def frames(self, every: int = 1) -> Iterator[Frame]:
        """Yield every ``every``-th frame, the first one first.

        Raises:
            ValueError: There is not a single frame, or ``every`` is not positive.
        """
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
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
        if self.num_frames - index > max(2, _TOLERATED_MISSING * self.num_frames):
            logger.warning(
                "%s: it announces %d frames, but ends after %d: truncated or broken",
                *(self.name, self.num_frames, index),
            )
