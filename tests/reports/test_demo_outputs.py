"""Names, videos and pages that a demonstration writes."""

import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from hierkd.reports.demo_outputs import PageEntry, VideoFile, Window, name_outputs, write_page


def brightness(path):
    capture = cv2.VideoCapture(str(path))
    values = []
    while True:
        read, frame = capture.read()
        if not read:
            return values, frame
        values.append(frame.mean(axis=(0, 1)))


def picture(value, size=(48, 64)):
    return np.full((*size, 3), value, np.uint8)


@pytest.mark.parametrize("suffix", [".mp4", ".avi", ".webm"])
@pytest.mark.parametrize("size", [(48, 64), (49, 65)])
def test_videos_can_be_read_again(tmp_path, suffix, size):
    path = tmp_path / "new" / f"video{suffix}"
    red = np.zeros((*size, 3), np.uint8)
    red[..., 0] = 250  # RGB
    with VideoFile(path, 5.0) as video:
        for value in (0, 120, 240):
            video.write(picture(value, size))
        video.write(red)
    values, _ = brightness(path)
    assert len(values) == 4
    for found, expected in zip(values, (0, 120, 240), strict=False):
        assert abs(found.mean() - expected) < 15
    blue_green_red = values[3]
    assert blue_green_red[2] > 180 > 80 > blue_green_red[0]
    assert list(path.parent.iterdir()) == [path]


def _write_and_fail(video):
    video.write(picture(1))
    assert len(list(video.path.parent.iterdir())) == 2  # it had begun
    video.write(None)


def test_after_an_error_nothing_is_left(tmp_path):
    path = tmp_path / "video.avi"
    path.write_text("an older one")
    video = VideoFile(path, 5.0)
    with pytest.raises(AttributeError), video:
        _write_and_fail(video)
    assert path.read_text() == "an older one"
    assert list(tmp_path.iterdir()) == [path]


def test_real_time(tmp_path):
    path = tmp_path / "video.avi"
    with VideoFile(path, 10.0) as video:
        for seconds in (0.0, 0.02, 0.55, 1.0):
            video.write(picture(100), until=seconds)
    assert len(brightness(path)[0]) == 11  # a second, and its first frame


def test_unknown_suffix(tmp_path):
    with pytest.raises(ValueError, match=r"\.gif: a video is written to one of"):
        VideoFile(tmp_path / "video.gif", 5.0)


def test_names_are_all_different():
    sources = [Path("a/x.jpg"), Path("b/x.png"), Path("X.bmp"), Path("x_1.jpg"), Path("x.mp4")]
    names = name_outputs(sources, [".png"] * 4 + [".mp4"])
    stems = [Path(name).stem.casefold() for name in names]
    assert names[0] == "x.png"
    assert len(set(stems)) == 5


@pytest.mark.parametrize("embed", [False, True])
def test_page_is_escaped_and_complete(tmp_path, embed):
    name = '<script>alert("1")</script> & %41#.png'.replace("/", "_")
    Image.fromarray(picture(3)).save(tmp_path / name)
    records = [{"class": "<b>cat</b>", "score": 0.914, "box_xyxy": [0, 0, 1, 1]}] * 2
    entry = PageEntry(name, tmp_path / name, records)
    write_page(tmp_path / "index.html", [entry], {"Vocabulary": "<i>a</i>"}, embed=embed)
    text = (tmp_path / "index.html").read_text()
    assert "<script" not in text
    assert "<b>cat" not in text
    assert "<i>a" not in text
    assert "2 × &lt;b&gt;cat&lt;/b&gt; (up to 91%)" in text
    (source,) = re.findall(r'<img src="([^"]*)"', text)
    assert source.startswith("data:image/jpeg;base64,") == embed
    if not embed:
        assert source == "%3Cscript%3Ealert%28%221%22%29%3C_script%3E%20%26%20%2541%23.png"


def test_window_without_a_screen(monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    with pytest.raises(ValueError, match="no screen"):
        Window("title")


def test_window_without_an_opencv_that_has_windows(monkeypatch):
    if "GUI:                           NONE" not in cv2.getBuildInformation():
        pytest.skip("this OpenCV has windows")
    monkeypatch.setenv("DISPLAY", ":99")
    with pytest.raises(ValueError, match="pip install opencv-python"):
        Window("title")
