"""Frames of real videos, and what a command line names."""

import cv2
import numpy as np
import pytest

from hierkd.inference.video import Video, find_inputs, is_video


def write_video(path, count=12, fps=8.0, size=(64, 48)):
    """Frame i is grey of brightness 20 i."""
    codec = "MJPG" if path.suffix == ".avi" else "mp4v"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), fps, size)
    assert writer.isOpened()
    for i in range(count):
        writer.write(np.full((size[1], size[0], 3), 20 * i % 256, np.uint8))
    writer.release()
    return path


@pytest.mark.parametrize("suffix", [".mp4", ".avi"])
@pytest.mark.parametrize("every", [1, 3, 5, 100])
def test_every_nth_frame(tmp_path, suffix, every):
    with Video(write_video(tmp_path / f"v{suffix}")) as video:
        assert (video.fps, video.num_frames, video.live) == (8.0, 12, False)
        frames = list(video.frames(every))
    assert [frame.index for frame in frames] == list(range(0, 12, every))
    for frame in frames:
        assert frame.image.shape == (48, 64, 3)
        assert abs(float(frame.image.mean()) - 20 * frame.index) < 6
        assert frame.seconds == pytest.approx(frame.index / 8)


@pytest.mark.parametrize("content", [b"", b"no video at all", b"\x00\x00\x00\x18ftypmp42 and more"])
def test_broken_videos(tmp_path, content):
    (tmp_path / "broken.mp4").write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.mp4: cannot be read as a video"):
        Video(tmp_path / "broken.mp4")


def test_truncated_video_warns(tmp_path, caplog):
    path = write_video(tmp_path / "long.avi", count=100)
    # The header, which says 100 frames, stays.
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with Video(path) as video:
        announced = video.num_frames
        read = len(list(video.frames()))
    assert 0 < read < 100
    assert announced <= read + 2 or "truncated or broken" in caplog.text


def test_no_camera():
    with pytest.raises(ValueError, match="no camera 93"):
        Video(93)


def test_every_must_be_positive(tmp_path):
    with (
        Video(write_video(tmp_path / "v.avi")) as video,
        pytest.raises(ValueError, match="at least 1"),
    ):
        next(video.frames(0))


def test_folders_globs_and_files(tmp_path):
    for name in ("b.JPG", "a.png", "c.mp4", "notes.txt", "odd.name"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "below.png").mkdir()
    names = [p.name for p in find_inputs([str(tmp_path / "*.mp4"), str(tmp_path)])]
    assert names[0] == "c.mp4"
    assert {"a.png", "b.JPG", "c.mp4"} <= set(names)
    assert "notes.txt" not in names
    assert len(names) == len(set(names))
    assert [p.name for p in find_inputs([str(tmp_path / "odd.name")])] == ["odd.name"]
    assert is_video(tmp_path / "c.MP4")
    with pytest.raises(FileNotFoundError, match=r"no picture or video matches '.*gone\*'"):
        find_inputs([str(tmp_path / "gone*")])
