"""Pictures of every kind become one kind of array."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from hierkd.inference.images import as_bgr, decode_picture

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


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "CMYK"])
def test_pillow_modes(mode):
    bgr = as_bgr(Image.new("L", (5, 4), 255).convert(mode))
    assert bgr.shape == (4, 5, 3)
    assert bgr.dtype == np.uint8
    assert (bgr == 255).all()


def written(image, file_format):
    """The bytes of a picture file."""
    buffer = io.BytesIO()
    image.save(buffer, format=file_format)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_more_than_8_bits_are_refused_instead_of_becoming_white(mode):
    deep = Image.fromarray(np.full((4, 5), 20_000, np.uint16))
    deep = deep if mode == "I;16" else deep.convert(mode)
    with pytest.raises(ValueError, match=f"'{mode}', more than 8 bits"):
        as_bgr(deep)
    with pytest.raises(ValueError, match="more than 8 bits"):
        decode_picture(written(deep, "TIFF"))


def test_a_program_is_not_handed_to_ghostscript(monkeypatch):
    def run(*args, **kwargs):
        pytest.fail("Ghostscript was asked")

    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", run)
    content = written(Image.fromarray(RGB), "EPS")
    with pytest.raises(ValueError, match="EPS document"):
        decode_picture(content)
    with Image.open(io.BytesIO(content)) as opened, pytest.raises(ValueError, match="EPS document"):
        as_bgr(opened)


def test_bytes_are_decoded_as_their_file_is(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(RGB).save(tmp_path / "turned.png", exif=exif)
    found = decode_picture((tmp_path / "turned.png").read_bytes())
    assert found.tolist() == as_bgr(tmp_path / "turned.png").tolist()
    with pytest.raises(ValueError, match=r"5 bytes cannot be decoded .no known format"):
        decode_picture(b"hello")


@pytest.mark.parametrize("error", [NotImplementedError, RuntimeError, IndexError])
def test_whatever_a_decoder_raises_names_the_picture(monkeypatch, error):
    def broken(self, *args):
        raise error("codec")

    content = written(Image.fromarray(RGB), "PNG")
    monkeypatch.setattr(Image.Image, "convert", broken)
    with pytest.raises(ValueError, match="bytes cannot be decoded"):
        decode_picture(content)
    with pytest.raises(ValueError, match=r"cannot be decoded .*codec"):
        as_bgr(Image.fromarray(RGB))


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
        (RGB[:, :, 0], r"\(H, W, 3\) .* got shape \(2, 3\) .* grey .*dstack"),
        (RGB[:, :, :1], r"grey picture, repeat it"),
        (RGB[:, :, [0, 1, 2, 0]], r"leave out the fourth channel"),
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
