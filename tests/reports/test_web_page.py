"""What the web page accepts, and what it shows: without a browser and without a model."""

import struct
import zlib

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image

from hierkd.inference.drawing import class_color

pytest.importorskip("gradio", reason="the page needs Gradio: the extra `web`")
from hierkd.reports.web_page import Limits, detect, parse_names, read_upload, show

LIMITS = Limits(max_bytes=50_000, max_pixels=10_000, max_names=5)


class OneBox:
    """A detector that finds the white part of a picture, and a corner as the last class."""

    def __init__(self, score=0.9):
        self.score = score
        self.calls = []

    def predict(self, image, vocabulary, examples):
        self.calls.append((image, vocabulary, examples))
        vocabulary = tuple(dict.fromkeys([*vocabulary, *examples]))
        rows, columns = (image == 255).all(axis=2).nonzero()
        box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        return Instances(
            image.shape[:2],
            pred_boxes=Boxes(torch.tensor([box, [0, 0, 9, 9]], dtype=torch.float32)),
            scores=torch.tensor([self.score, 0.2]),
            pred_classes=torch.tensor([0, len(vocabulary) - 1]),
        )


@pytest.fixture
def picture(tmp_path):
    """80 x 60 pixels, dark, with a white rectangle from (20, 10) to (60, 40)."""
    pixels = np.full((60, 80, 3), 40, np.uint8)
    pixels[10:40, 20:60] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return str(tmp_path / "a.png")


def look(detectors, picture, names="cup, dog"):
    return detect(detectors, picture, names, LIMITS, "street corner.png")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (" cat ,  traffic \t cone,", ("cat", "traffic cone")),
        ("cat\ndog\r\ncow; bee", ("cat", "dog", "cow", "bee")),
        ("/etc/hostname", ("/etc/hostname",)),  # a name like any other
        ("кот, 猫", ("кот", "猫")),
        ("cat|dog\uff0ccow", ("cat", "dog", "cow")),
    ],
)
def test_names(text, names):
    assert parse_names(text, 5) == names


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (None, "Type the classes"),
        ("a,b,c,d,e,f", "6 classes are too many: at most 5"),
        ("a," + 501 * "b", "more than 500 characters"),
        ("cat, dog, Cat", "'cat' and 'Cat'"),
        ('["cat", "dog"]', "the classes: .* has brackets"),
    ],
)
def test_unusable_names(text, named):
    with pytest.raises(ValueError, match=named):
        parse_names(text, 5)


def test_16_bits_are_called_so(tmp_path):
    Image.fromarray(np.full((9, 9), 4000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match="16 bits"):
        read_upload(str(tmp_path / "deep.png"), 10_000)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_formats(tmp_path, kind):
    path = tmp_path / "upload"  # the name says nothing
    Image.new("RGB", (40, 30), (200, 100, 20)).save(path, format=kind)
    image = read_upload(str(path), 10_000)
    assert image.shape == (30, 40, 3)
    assert np.abs(image.astype(int) - (20, 100, 200)).max() <= 8  # BGR, as far as JPEG keeps it


def bomb(width, height):
    """A PNG of a few dozen bytes whose header promises many pixels."""

    def chunk(kind, content):
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
        (b"II*\0\x08\0\0\0\0\0", "not a picture"),  # TIFF
        (bomb(90, 90), "broken"),  # small enough, but without pixels
        (bomb(101, 100), "101 × 100 pixels, at most 10000"),
        (bomb(60_000, 60_000), "too large: at most 10000"),
    ],
)
def test_unusable_uploads(tmp_path, content, named):
    path = tmp_path / "secret_folder"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=named) as caught:
        read_upload(str(path), 10_000)
    assert "secret_folder" not in str(caught.value)


def test_detect_and_show(picture):
    detector = OneBox()
    found = look({"mine": detector}, picture)
    ((image, vocabulary, examples),) = detector.calls
    assert not examples
    assert image.shape == (60, 80, 3)
    assert vocabulary == ("cup", "dog")

    shown = show(found, 0.5, 10, "")
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
    assert shown.table == [["mine", "cup", "90.0%", "20, 10, 60, 40"]]
    assert shown.summary.startswith("street corner.png, 80 × 60 pixels, 2 classes.\nmine: 1 of 2 ")
    (panel,) = shown.panels
    assert panel.shape == (480, 640, 3)  # enlarged, so that labels can be read
    # The right edge of the box, eight times as far to the right, has the colour of the class.
    edge = panel[200:280, 474:487].astype(float) / 255
    assert np.abs(edge - class_color(0)).max(axis=2).min(axis=1).max() < 0.1


def test_a_class_by_examples(picture):
    detector = OneBox()
    paths = [picture, picture]
    for names, typed, found in (
        ("cup, dog", ("cup", "dog"), ("cup", "dog", "toy")),
        ("cup, toy", ("cup", "toy"), ("cup", "toy")),  # the mean of both
        ("", (), ("toy",)),
    ):
        seen = detect({"mine": detector}, picture, names, LIMITS, "a.png", " toy ", paths)
        _, vocabulary, examples = detector.calls[-1]
        assert (vocabulary, seen.vocabulary) == (typed, found)
        assert [each.shape for each in examples["toy"]] == 2 * [(60, 80, 3)]


@pytest.mark.parametrize(
    ("name", "files", "named"),
    [
        ("", ["a.png"], "Name the class"),
        ("toy", [], "Add example pictures"),
        ("toy", 21 * ["a.png"], "21 example pictures are too many: at most 20"),
        ("toy, bear", ["a.png"], "at most 1"),
        ("toy", ["broken"], "example of 'toy': The file is not a picture"),
    ],
)
def test_unusable_examples(picture, tmp_path, name, files, named):
    (tmp_path / "broken").write_text("no picture")
    paths = [str(tmp_path / file) for file in files]
    with pytest.raises(ValueError, match=named):
        detect({"mine": OneBox()}, picture, "cup", LIMITS, "a.png", name, paths)


def test_each_setting_chooses(picture, tmp_path, monkeypatch):
    (tmp_path / "cup=0.1").write_text("cup=1\n")  # a text is never a file
    monkeypatch.chdir(tmp_path)
    found = look({"mine": OneBox()}, picture)
    for settings, classes in (
        ((0, 10, None), ["cup", "dog"]),
        ((0, 1.0, ""), ["cup"]),
        ((0.5, 10, "dog=0.1"), ["cup", "dog"]),
        ((0, 10, "cup=0.95\ndog = 0.1"), ["dog"]),
        ((0.95, 10, "cup=0.1"), ["cup"]),
    ):
        content = show(found, *settings).content
        assert [each["class"] for each in content["detections"]] == classes
    assert (
        "mine: 0 of 2 detections shown; the best one is cup, 90.0%" in show(found, 1, 9, "").summary
    )
    for settings, named in (
        ((1.5, 5, ""), "1.5"),
        ((float("nan"), 5, ""), "nan"),
        ((0.3, 5, "zebra=0.5"), "zebra"),
        ((0.3, 5, "dog"), "NAME=SCORE, got 'dog'"),
    ):
        with pytest.raises(ValueError, match=named):
            show(found, *settings)


def test_a_photograph_is_drawn_smaller_but_told_in_its_own_pixels(tmp_path):
    pixels = np.full((1500, 3000, 3), 40, np.uint8)
    pixels[300:900, 600:1200] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    found = detect({"mine": OneBox()}, str(tmp_path / "a.png"), "cup, dog", Limits(), "a.png")
    shown = show(found, 0.5, 1, "")
    assert shown.content["detections"][0]["box_xyxy"] == [600, 300, 1200, 900]
    assert shown.panels[0].shape == (640, 1280, 3)
    edge = shown.panels[0][200:300, 507:518].astype(float) / 255  # x = 1200 * 1280 / 3000
    assert np.abs(edge - class_color(0)).max(axis=2).min(axis=1).max() < 0.1
