"""What the web page accepts, and what it shows: without a browser and without a model."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image

from hierkd.reports.drawing import class_color
from hierkd.reports.web_page import (
    Found,
    Limits,
    PageError,
    detect,
    make_filter,
    parse_names,
    read_upload,
    safe_name,
    show,
)

LIMITS = Limits(max_bytes=50_000, max_pixels=10_000, max_names=5, max_name_length=20)


class OneBox:
    """A detector that finds the white part of a picture, if its first class is asked for."""

    def __init__(self, score=0.9):
        self.score = score
        self.calls = []

    def predict(self, image, vocabulary):
        self.calls.append((image, vocabulary))
        rows, columns = (image == 255).all(axis=2).nonzero()
        instances = Instances(image.shape[:2])
        box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        instances.pred_boxes = Boxes(torch.tensor([box, [0, 0, 9, 9]], dtype=torch.float32))
        instances.scores = torch.tensor([self.score, 0.2])
        instances.pred_classes = torch.tensor([0, len(vocabulary) - 1])
        return instances


@pytest.fixture
def picture(tmp_path):
    """80 x 60 pixels, dark, with a white rectangle from (20, 10) to (60, 40)."""
    pixels = np.full((60, 80, 3), 40, np.uint8)
    pixels[10:40, 20:60] = 255
    path = tmp_path / "street corner.png"
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("cat", ("cat",)),
        (" cat ,  traffic \t cone,", ("cat", "traffic cone")),
        ("cat\ndog\r\ncow; bee", ("cat", "dog", "cow", "bee")),
        ("/etc/hostname", ("/etc/hostname",)),  # a name like any other
        ("кот, 猫", ("кот", "猫")),
    ],
)
def test_names(text, names):
    assert parse_names(text, LIMITS) == names


@pytest.mark.parametrize("text", [None, "", "  ", ",;\n , "])
def test_no_names(text):
    with pytest.raises(PageError, match="Type the classes"):
        parse_names(text, LIMITS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b,c,d,e,f", "6 classes are too many: at most 5"),
        ("a," + 21 * "b", "21 characters is too long: at most 20"),
        ("cat, dog, Cat", "“Cat” is named twice"),
        ("caf\u00e9, cafe\u0301", "named twice"),  # two ways to write one word
        ("cat, \u200b", "cannot be seen"),
        ("c\x00at", "cannot be seen"),
    ],
)
def test_unusable_names(text, message):
    with pytest.raises(PageError, match=message):
        parse_names(text, LIMITS)


def test_a_name_is_never_a_file(tmp_path, monkeypatch):
    (tmp_path / "names.txt").write_text("secret\n")
    (tmp_path / "a=0.1").write_text("secret=0.5\n")
    monkeypatch.chdir(tmp_path)
    assert parse_names("names.txt", LIMITS) == ("names.txt",)
    assert make_filter(0.3, 5, "a=0.1", ["a"]).class_thresholds == {"a": 0.1}
    with pytest.raises(PageError) as caught:
        make_filter(0.3, 5, "names.txt", ["a"])
    assert "secret" not in str(caught.value)


def test_filter():
    keep = make_filter(0.25, 7.0, "dog=0.6\ntraffic cone = 0.1", ["dog", "cat", "traffic cone"])
    assert (keep.score_threshold, keep.top_k) == (0.25, 7)
    assert keep.class_thresholds == {"dog": 0.6, "traffic cone": 0.1}
    assert make_filter(0, 1, None, []).class_thresholds == {}


@pytest.mark.parametrize(
    ("threshold", "top_k", "classes", "message"),
    [
        (1.5, 5, "", "must be 0 to 1, got 1.5"),
        (float("nan"), 5, "", "must be 0 to 1"),
        (None, 5, "", "expected numbers"),
        ("0.3", 5, "", "must be 0 to 1, got '0.3'"),
        (0.3, 0, "", "at least 1, got 0"),
        (0.3, float("inf"), "", "infinity"),
        (0.3, 2.5, "", "2.5"),
        (0.3, [], "", "Cannot tell"),
        (0.3, 5, "zebra=0.5", "zebra"),
        (0.3, 5, "dog", "expected NAME=SCORE, got 'dog'"),
        (0.3, 5, "dog=7", "must be 0 to 1, got 7"),
    ],
)
def test_wrong_filter(threshold, top_k, classes, message):
    with pytest.raises(PageError, match=message):
        make_filter(threshold, top_k, classes, ["dog"])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_formats(tmp_path, kind):
    path = tmp_path / "upload"  # the name says nothing
    Image.new("RGB", (40, 30), (200, 100, 20)).save(path, format=kind)
    image = read_upload(path, LIMITS)
    assert image.shape == (30, 40, 3)
    assert np.abs(image.astype(int) - (20, 100, 200)).max() <= 8  # BGR, as far as JPEG keeps it


def test_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    Image.new("RGB", (40, 30)).save(tmp_path / "a.jpg", exif=exif)
    assert read_upload(tmp_path / "a.jpg", LIMITS).shape == (40, 30, 3)


def bomb(width, height):
    """A PNG of a few dozen bytes whose header promises many pixels."""

    def chunk(kind, content):
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def tiff():
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, format="TIFF")
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"plain text", "not a picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
        (tiff(), "expected JPEG, PNG, WebP, GIF or BMP"),
        (b"\x89PNG\r\n\x1a\nnonsense", "broken"),
        (bomb(90, 90), "broken"),  # small enough, but without pixels
        (bomb(101, 100), "101 × 100 pixels, at most 0.01 million"),
        (bomb(10_000, 10_000), "10000 × 10000 pixels"),
        (bomb(60_000, 60_000), "too large: at most 0.01 million"),
        (bomb(1, 2**31 - 1), "too large"),
        (50_001 * b"x", "too large: 0.0477 MB, at most 0.0477 MB"),
    ],
)
def test_unusable_uploads(tmp_path, content, message):
    path = tmp_path / "secret_folder"
    path.write_bytes(content)
    with pytest.raises(PageError, match=message) as caught:
        read_upload(path, LIMITS)
    assert "secret_folder" not in str(caught.value)


def test_long_and_narrow_is_no_picture(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(bomb(30_000, 1))
    with pytest.raises(PageError, match="30000 × 1 pixels"):
        read_upload(path, Limits())


@pytest.mark.parametrize("name", ["max_bytes", "max_pixels", "max_names", "max_name_length"])
def test_limits(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        Limits(**{name: 0})


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("street.jpg", "street.jpg"),
        ("../../etc/passwd", "passwd"),
        ("C:\\pictures\\cat.PNG", "cat.PNG"),
        ("..", "picture"),
        (".htaccess", "htaccess"),
        ("a\x00b\n<script>.png", "a_b__script_.png"),
        ("Fußgänger 2.jpeg", "Fußgänger 2.jpeg"),
        (None, "picture"),
        ("x" * 300 + ".jpg", "x" * 60 + ".jpg"),
        ("name.longextension", "name.longextension"),
    ],
)
def test_safe_name(name, safe):
    assert safe_name(name) == safe


def test_detect_and_show(picture):
    detector = OneBox()
    found = detect({"mine": detector}, picture, "cup, dog", LIMITS)
    ((image, vocabulary),) = detector.calls
    assert image.shape == (60, 80, 3)
    assert vocabulary == ("cup", "dog")
    assert found.file_name == "street corner.png"
    assert found.size == (60, 80)
    assert found.view.shape == (480, 640, 3)  # enlarged, so that labels can be read

    shown = show(found, make_filter(0.5, 10, "", vocabulary))
    assert len(detector.calls) == 1
    assert shown.content == {
        "file_name": "street corner.png",
        "height": 60,
        "width": 80,
        "vocabulary": ["cup", "dog"],
        "detectors": ["mine"],
        "confidence_threshold": 0.5,
        "class_thresholds": {},
        "top_k": 10,
        "detections": [{"class": "cup", "score": 0.9, "box_xyxy": [20.0, 10.0, 60.0, 40.0]}],
    }
    assert "Detections shown: 1 of 2." in shown.summary
    table = shown.tables["mine"]
    assert "cup</td><td>90.0%</td><td>20, 10, 60, 40</td>" in table
    assert "dog" not in table
    # The right edge of the box, eight times as far to the right, has the colour of the class.
    edge = shown.panels["mine"][200:280, 474:487].astype(float) / 255
    assert np.abs(edge - class_color(0)).max(axis=2).min(axis=1).max() < 0.1
    assert shown.sheet() is shown.panels["mine"]
    assert np.array_equal(found.view, detect({"m": detector}, picture, "a", LIMITS).view)  # clean


def test_each_setting_chooses(picture):
    found = detect({"mine": OneBox()}, picture, "cup, dog", LIMITS)

    def classes(*setting):
        content = show(found, make_filter(*setting, found.vocabulary)).content
        return [each["class"] for each in content["detections"]]

    assert classes(0, 10, "") == ["cup", "dog"]
    assert classes(0, 1, "") == ["cup"]
    assert classes(0.5, 10, "dog=0.1") == ["cup", "dog"]
    assert classes(0, 10, "cup=0.95") == ["dog"]
    assert classes(0.95, 10, "") == []


def test_nothing_to_show_names_the_best(picture):
    found = detect({"mine": OneBox(0.25)}, picture, "<b>cup", LIMITS)
    shown = show(found, make_filter(0.3, 10, "", found.vocabulary))
    assert "Nothing reaches the threshold" in shown.tables["mine"]
    assert "&lt;b&gt;cup, 25.0%" in shown.tables["mine"]
    none = Found(
        found.file_name, found.size, found.vocabulary, found.view, found.factor,
        {"mine": found.instances["mine"][:0]},
    )  # fmt: skip
    assert show(none, make_filter(0, 10, "", ())).tables["mine"] == "<p>Nothing found.</p>"


def test_names_are_escaped(picture):
    found = detect({"mine": OneBox()}, picture, "<img src=x>", LIMITS)
    table = show(found, make_filter(0, 10, "", found.vocabulary)).tables["mine"]
    assert "<img" not in table
    assert "&lt;img src=x&gt;" in table


def test_compared(picture):
    detectors = {"mine": OneBox(0.9), "other": OneBox(0.4)}
    found = detect(detectors, picture, "cup", LIMITS)
    assert [d.calls[0][1] for d in detectors.values()] == [("cup",), ("cup",)]
    shown = show(found, make_filter(0.3, 1, "", found.vocabulary))
    assert shown.content["detectors"] == ["mine", "other"]
    assert [d["score"] for d in shown.content["detections"]] == [0.9]
    assert [d["score"] for d in shown.content["compared"]["other"]] == [0.4]
    assert "mine: 1 of 2, other: 1 of 2" in shown.summary
    sheet = shown.sheet()
    assert sheet.shape[1] > 2 * 640
    for title, left in (("mine", 0), ("other", sheet.shape[1] // 2)):
        panel = shown.panels[title]
        half = sheet[:, left : left + sheet.shape[1] // 2]
        assert any(
            np.array_equal(half[y : y + 480, x : x + 640], panel)
            for y in range(half.shape[0] - 480 + 1)
            for x in range(half.shape[1] - 640 + 1)
        ), title


def test_a_photograph_is_drawn_smaller_but_told_in_its_own_pixels(tmp_path):
    pixels = np.full((1500, 3000, 3), 40, np.uint8)
    pixels[300:900, 600:1200] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    found = detect({"mine": OneBox()}, tmp_path / "a.png", "cup, dog", Limits())
    assert found.view.shape == (640, 1280, 3)
    shown = show(found, make_filter(0.5, 1, "", found.vocabulary))
    assert shown.content["detections"][0]["box_xyxy"] == [600, 300, 1200, 900]
    edge = shown.panels["mine"][200:300, 507:518].astype(float) / 255  # x = 1200 * 1280 / 3000
    assert np.abs(edge - class_color(0)).max(axis=2).min(axis=1).max() < 0.1


def test_what_is_wrong_is_noticed_before_a_detector_is_asked(picture):
    detector = OneBox()
    for names, limits in (("", LIMITS), ("cup", Limits(max_pixels=100))):
        with pytest.raises(PageError):
            detect({"mine": detector}, picture, names, limits)
    assert detector.calls == []
