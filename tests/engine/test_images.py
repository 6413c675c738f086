"""Pictures of every kind become one kind of array."""

import numpy as np
import pytest
import torch
from PIL import Image

from hierkd.engine.images import as_bgr

# Two rows of three pixels: red, green, blue; white, black, yellow.
RGB = np.array(
    [
        [[255, 0, 0], [0, 255, 0], [0, 0, 255]],
        [[255, 255, 255], [0, 0, 0], [255, 255, 0]],
    ],
    np.uint8,
)
BLUE_OF_FIRST_ROW = [0, 0, 255]


def test_pillow_and_paths_know_their_own_order(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "picture.png")
    for channels in ("BGR", "RGB"):
        for image in (
            Image.fromarray(RGB),
            tmp_path / "picture.png",
            str(tmp_path / "picture.png"),
        ):
            assert as_bgr(image, channels)[0, :, 0].tolist() == BLUE_OF_FIRST_ROW
            assert as_bgr(image, channels).shape == (2, 3, 3)


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "CMYK", "I;16"])
def test_pillow_modes(mode):
    white = Image.new("L", (5, 4), 255)
    image = Image.new("I;16", (5, 4), 255) if mode == "I;16" else white.convert(mode)
    bgr = as_bgr(image)
    assert bgr.shape == (4, 5, 3)
    assert bgr.dtype == np.uint8
    assert (bgr == 255).all()


def test_arrays_and_tensors_follow_the_argument():
    tensor = torch.from_numpy(RGB.transpose(2, 0, 1).copy())
    for image in (RGB, tensor):
        assert as_bgr(image, "RGB")[0, :, 0].tolist() == BLUE_OF_FIRST_ROW
        assert as_bgr(image, "BGR")[0, :, 2].tolist() == BLUE_OF_FIRST_ROW


def test_a_photograph_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn clockwise
    Image.fromarray(RGB).save(tmp_path / "turned.png", exif=exif)
    upright = as_bgr(tmp_path / "turned.png")
    assert upright.shape == (3, 2, 3)
    assert upright[0].tolist() == [[255, 255, 255], [0, 0, 255]]  # white, red (BGR)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (RGB.astype(np.float32) / 255, "got shape .2, 3, 3. and type float32; .* multiply by 255"),
        (RGB[:, :, 0], r"\(H, W, 3\) .* got shape \(2, 3\)"),
        (RGB[:, [0, 1, 2, 0]].transpose(2, 0, 1), "put the channels last"),
        (torch.from_numpy(RGB), "put the channels first"),
        (torch.rand(3, 4, 5), "multiply by 255"),
        (torch.zeros(4, 4, 5, dtype=torch.uint8), r"\(3, H, W\)"),
        (np.zeros((0, 5, 3), np.uint8), "no pixels: 5 x 0"),
        (torch.zeros(3, 5, 0, dtype=torch.uint8), "no pixels: 0 x 5"),
        (Image.new("RGB", (0, 3)), "no pixels: 0 x 3"),
    ],
)
def test_wrong_pictures(image, message):
    with pytest.raises(ValueError, match=message):
        as_bgr(image)


def test_no_pictures(tmp_path):
    with pytest.raises(TypeError, match="got bytes"):
        as_bgr(b"bytes")
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        as_bgr(tmp_path / "gone.png")
    with pytest.raises(ValueError, match="channels must be"):
        as_bgr(RGB, "YUV")
    whole = tmp_path / "whole.png"
    Image.effect_noise((64, 64), 50).save(whole)
    (tmp_path / "half.png").write_bytes(whole.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"half\.png.* cannot be decoded"):
        as_bgr(tmp_path / "half.png")
    with Image.open(tmp_path / "half.png") as lazy, pytest.raises(ValueError, match="decoded"):
        as_bgr(lazy)
