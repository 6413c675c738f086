"""Pictures of every kind become one kind of array."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from hierkd.inference.images import as_bgr

# Two rows of three pixels: red, green, blue; white, black, yellow.
RGB = np.array(
    [
        [[255, 0, 0], [0, 255, 0], [0, 0, 255]],
        [[255, 255, 255], [0, 0, 0], [255, 255, 0]],
    ],
    np.uint8,
)


@pytest.mark.parametrize("channels", ["BGR", "RGB"])
def test_every_kind_of_picture_becomes_bgr(tmp_path, channels):
    path = tmp_path / "picture.png"
    Image.fromarray(RGB).save(path)
    array = RGB if channels == "RGB" else RGB[:, :, ::-1]
    tensor = torch.from_numpy(array.transpose(2, 0, 1).copy())
    for image in (Image.fromarray(RGB), path, str(path), array, tensor):
        assert as_bgr(image, channels).tolist() == RGB[:, :, ::-1].tolist()


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "CMYK"])
def test_pillow_modes(mode):
    bgr = as_bgr(Image.new("L", (5, 4), 255).convert(mode))
    assert bgr.shape == (4, 5, 3)
    assert bgr.dtype == np.uint8
    assert (bgr == 255).all()


def test_a_photograph_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn clockwise
    Image.fromarray(RGB).save(tmp_path / "turned.png", exif=exif)
    upright = as_bgr(tmp_path / "turned.png")
    assert upright.shape == (3, 2, 3)
    assert upright[0].tolist() == [[255, 255, 255], [0, 0, 255]]  # white, red (BGR)


def test_a_program_is_not_handed_to_ghostscript(monkeypatch):
    monkeypatch.setattr(
        "PIL.EpsImagePlugin.Ghostscript", lambda *args, **kwargs: pytest.fail("ran")
    )
    buffer = io.BytesIO()
    Image.fromarray(RGB).save(buffer, format="EPS")
    with Image.open(buffer) as opened, pytest.raises(ValueError, match="EPS document"):
        as_bgr(opened)


DEEP = Image.fromarray(np.full((4, 5), 20_000, np.uint16))


@pytest.mark.parametrize(
    ("image", "error", "named"),
    [
        (RGB.astype(np.float32) / 255, ValueError, r"\(2, 3, 3\) and type float32"),
        (RGB[:, :, 0], ValueError, r"\(H, W, 3\) .* got shape \(2, 3\)"),
        (torch.from_numpy(RGB), ValueError, r"\(3, H, W\) .* got shape \(2, 3, 3\)"),
        (torch.rand(3, 4, 5), ValueError, "float32"),
        (np.zeros((0, 5, 3), np.uint8), ValueError, r"got shape \(0, 5, 3\)"),
        (Image.new("RGB", (0, 3)), ValueError, "no pixels"),
        # would become white
        (DEEP, ValueError, "'I;16', more than 8 bits"),
        (DEEP.convert("F"), ValueError, "'F', more than 8 bits"),
        (b"bytes", TypeError, "got bytes"),
        ("gone.png", FileNotFoundError, r"gone\.png"),
    ],
)
def test_wrong_pictures(image, error, named):
    with pytest.raises(error, match=named):
        as_bgr(image)


def test_half_a_file_and_no_channels(tmp_path):
    with pytest.raises(ValueError, match="YUV"):
        as_bgr(RGB, "YUV")
    whole = tmp_path / "whole.png"
    Image.effect_noise((64, 64), 50).save(whole)
    (tmp_path / "half.png").write_bytes(whole.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"half\.png.* cannot be decoded"):
        as_bgr(tmp_path / "half.png")
    with Image.open(tmp_path / "half.png") as lazy, pytest.raises(ValueError, match="decoded"):
        as_bgr(lazy)
