"""Frames of real videos, read and written, and what a command line names."""

import contextlib

import cv2
import numpy as np
import pytest

from hierkd.inference.video import Video, VideoFile, find_inputs, is_video


def grey(value, size=(48, 64)):
    return np.full((*size, 3), value, np.uint8)


def write_video(path, count=12, fps=8.0):
    """Frame i is grey of brightness 20 i."""
    with VideoFile(path, fps) as video:
        for i in range(count):
            video.write(grey(20 * i % 256))
    return path


@pytest.mark.parametrize("every", [1, 5])
def test_every_nth_frame(tmp_path, every):
    with Video(write_video(tmp_path / "v.mp4")) as video:
        assert (video.fps, video.num_frames, video.live) == (8.0, 12, False)
        frames = list(video.frames(every))
    assert [frame.index for frame in frames] == list(range(0, 12, every))
    for frame in frames:
        assert frame.image.shape == (48, 64, 3)
        assert abs(float(frame.image.mean()) - 20 * frame.index) < 6
        assert frame.seconds == pytest.approx(frame.index / 8)


@pytest.mark.parametrize("suffix", [".mp4", ".avi", ".webm"])
@pytest.mark.parametrize("size", [(48, 64), (49, 65)])
def test_videos_can_be_read_again(tmp_path, suffix, size):
    path = tmp_path / f"video{suffix}"
    red = grey(0, size)
    red[..., 0] = 250  # RGB
    with VideoFile(path, 5.0) as video:
        for image in (grey(0, size), grey(120, size), grey(240, size), red):
            video.write(image)
    with Video(path) as video:
        colours = [frame.image.mean(axis=(0, 1)) for frame in video.frames()]
    for found, expected in zip(colours[:3], (0, 120, 240), strict=True):
        assert abs(found.mean() - expected) < 15
    blue, _, red = colours[3]
    assert red > 180 > 80 > blue
    assert list(tmp_path.iterdir()) == [path]


def test_after_an_error_nothing_is_left(tmp_path):
    path = tmp_path / "video.avi"
    path.write_text("an older one")
    with contextlib.suppress(ZeroDivisionError), VideoFile(path, 5.0) as video:
        video.write(grey(1))
        assert len(list(tmp_path.iterdir())) == 2  # it had begun
        _ = 1 / 0
    assert path.read_text() == "an older one"
    assert list(tmp_path.iterdir()) == [path]


def test_real_time(tmp_path):
    with VideoFile(tmp_path / "video.avi", 10.0) as video:
        for seconds in (0.0, 0.02, 0.55, 1.0):
            video.write(grey(100), until=seconds)
    capture = cv2.VideoCapture(str(tmp_path / "video.avi"))
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 11  # a second, and its first frame


def test_folders_globs_and_files(tmp_path, caplog):
    for name in (
        "b.JPG",
        "a.png",
        "c.mp4",
        "d.WMV",
        "e.jfif",
        "f.HEIC",
        "i.psd",
        "j.pdf",
        "k.mpg",
        "odd.name",
        "g",
        ".h",
    ):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "below").mkdir()
    (tmp_path / "._a.png").touch()
    (tmp_path / "lost.png").symlink_to("nowhere")
    names = [p.name for p in find_inputs([str(tmp_path / "*.mp4"), str(tmp_path)])]
    assert names == ["c.mp4", "a.png", "b.JPG", "d.WMV", "e.jfif", "i.psd", "k.mpg", "lost.png"]
    assert "passed over 4 of 12 files" in caplog.text
    assert ": .heic (1), .name (1), .pdf (1), no suffix (1)" in caplog.text
    assert [p.name for p in find_inputs([str(tmp_path / "odd.name")])] == ["odd.name"]
    assert is_video(tmp_path / "c.MP4")
    assert is_video(tmp_path / "k.mpg")  # a picture to Pillow, which cannot decode it
    for missing in ("gone*", "below", "gone.png"):
        with pytest.raises(FileNotFoundError, match=rf"'.*{missing.replace('*', '.')}'"):
            find_inputs([str(tmp_path / missing)])


def test_what_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"\x00\x00\x00\x18ftypmp42 and more")
    with pytest.raises(ValueError, match=r"broken\.mp4 cannot be read as a video"):
        Video(tmp_path / "broken.mp4")
    with pytest.raises(ValueError, match="camera 93"):
        Video(93)
