"""Pictures of every kind, whole and broken: the right pixels, or an error that names the file."""

import io

import cv2
import numpy as np
import pytest
import torch
from detectron2.structures import BoxMode
from PIL import Image, ImageOps

from hierkd.data.mapper import HierKDDatasetMapper, check_images, read_picture
from hierkd.inference.predictor import OpenVocabularyPredictor
from hierkd.load_config import load_config

HEIGHT, WIDTH = 30, 40
ORIENTATION = 0x0112  # EXIF's tag
PIXELS = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def picture(mode="RGB"):
    return Image.fromarray(PIXELS).convert(mode)


def saved(image, path, kind, **arguments):
    """Save under any name; returns the path."""
    image.save(path, format=kind, **arguments)
    return path


def record_of(path, width=WIDTH, height=HEIGHT, box=(4, 6, 10, 12)):
    annotation = {"bbox": list(box), "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0, "iscrowd": 0}
    return {
        **{"file_name": str(path), "width": width, "height": height, "image_id": 1},
        "annotations": [annotation],
        "captions": ["a picture"],
    }


def mapper(**arguments):
    defaults = {"augmentations": [], "image_format": "RGB", "with_caption": True}
    return HierKDDatasetMapper(True, **{**defaults, **arguments})


def mapped(path, **arguments):
    return mapper()(record_of(path, **arguments))["image"].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "JPEG2000"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "1", "CMYK"])
def test_every_mode_is_decoded_as_pillow_does(tmp_path, kind, mode):
    path = tmp_path / "picture.jpg"  # a wrong suffix for all but one
    try:
        saved(picture(mode), path, kind)
        with Image.open(path) as stored:
            expected = np.asarray(stored.convert("RGB"))
    except (OSError, ValueError, KeyError) as error:  # Pillow 12 cannot read its YCbCr TIFF
        pytest.skip(f"Pillow's {kind} does not hold {mode}: {error}")
    assert np.array_equal(read_picture(str(path), "RGB"), expected)
    assert np.array_equal(read_picture(str(path)), expected[..., ::-1])
    assert np.array_equal(mapped(path), expected)
    assert check_images([record_of(path)]) == [record_of(path)]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_picture_counts(tmp_path, kind):
    first, second = Image.new("RGB", (8, 6), (200, 0, 0)), Image.new("RGB", (8, 6), (0, 0, 200))
    path = tmp_path / "moving"
    first.save(path, kind, save_all=True, append_images=[second])
    found = read_picture(str(path), "RGB")
    assert found.shape == (6, 8, 3)
    assert np.abs(found.astype(int) - (200, 0, 0)).max() <= 8


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_16_bits(tmp_path, kind):
    """In colour the upper 8 bits count; in grey, where Pillow makes them white, it is an error."""
    deep = PIXELS.astype(np.uint16) * 256 + 7
    colour, grey = str(tmp_path / f"colour.{kind}"), str(tmp_path / f"grey.{kind}")
    cv2.imwrite(grey, deep[..., 0])
    if kind == "png":
        cv2.imwrite(colour, deep[..., ::-1])
        assert np.array_equal(read_picture(colour, "RGB"), PIXELS)
    message = r"grey\.\w+ cannot be decoded \(its pixels are 'I;16'.*expected 8 bits"
    with pytest.raises(ValueError, match=message):
        read_picture(grey)
    with pytest.raises(ValueError, match=message):
        mapper()(record_of(grey))
    with pytest.raises(ValueError, match=r"1 of 1 images.*grey.*expected 8 bits"):
        check_images([record_of(grey)])
    assert mapper(skip_broken_images=True)(record_of(grey)) is None


@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_are_of_the_picture_as_it_is_shown(tmp_path, orientation):
    """A red rectangle lies in its box whichever way the camera was held."""
    shown = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    shown[6:18, 4:14] = (255, 0, 0)
    path = tmp_path / "turned.png"
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    for method in (None, *Image.Transpose):  # how must it be stored, so that it is shown like this?
        stored = Image.fromarray(shown)
        stored = stored if method is None else stored.transpose(method)
        saved(stored, path, "PNG", exif=exif)
        with Image.open(path) as again:
            if np.array_equal(np.asarray(ImageOps.exif_transpose(again)), shown):
                break
    else:
        pytest.fail("no way to store it")
    result = mapper()(record_of(path))
    x0, y0, x1, y1 = result["instances"].gt_boxes.tensor[0].int().tolist()
    inside = result["image"][:, y0:y1, x0:x1]
    assert (inside == torch.tensor([255, 0, 0]).view(3, 1, 1)).all()
    assert result["image"].sum() == inside.sum()
    if orientation > 4:  # the size of the stored pixels is another one
        with pytest.raises(ValueError, match=r"turned\.png, got \(40, 30\), expect \(30, 40\)"):
            mapper()(record_of(path, width=HEIGHT, height=WIDTH))


@pytest.mark.parametrize("size", [(1, 1), (20_000, 1), (1, 20_000), (1, 5), (3, 4000)])
def test_every_shape_reaches_the_network(tmp_path, size):
    """20,000 x 1 pixels are 1333 x 0.07 for the network: one pixel high."""
    width, height = size
    path = saved(Image.new("RGB", size, (9, 8, 7)), tmp_path / "thin.png", "PNG")
    cfg = load_config("configs/Base-HierKD.yaml", ["INPUT.RANDOM_FLIP", "none"])
    record = record_of(path, width, height, box=(0, 0, width, height))
    for is_train in (True, False):
        result = HierKDDatasetMapper(cfg, is_train)(record)
        _, h, w = result["image"].shape
        assert min(h, w) >= 1
        assert max(h, w) <= 1333
        assert (result["image"] == torch.tensor([9, 8, 7]).view(3, 1, 1)).all()
        if is_train and len(result["instances"]):  # a box may become too thin for one
            assert result["instances"].gt_boxes.tensor.tolist() == [[0, 0, w, h]]
    predictor = OpenVocabularyPredictor(model=torch.nn.Identity(), min_size=800, max_size=1333)
    prepared = predictor.prepare(read_picture(str(path)))
    assert min(prepared["image"].shape) >= 1
    assert (prepared["width"], prepared["height"]) == size


@pytest.fixture(params=["folder", "empty", "text", "gone", "eps", "bomb", "name"])
def no_picture(request, tmp_path):
    path = tmp_path / "odd.jpg"
    if request.param == "folder":
        path.mkdir()
    elif request.param == "empty":
        path.touch()
    elif request.param == "text":
        path.write_text("\u202ehello \U0001f642")
    elif request.param == "eps":
        picture().save(path, "EPS")
    elif request.param == "bomb":  # 40 bytes that claim 10^10 pixels
        header = io.BytesIO()
        Image.new("L", (1, 1)).save(header, "BMP")
        data = bytearray(header.getvalue())
        data[18:26] = (100_000).to_bytes(4, "little") * 2
        path.write_bytes(data)
    elif request.param == "name":
        path = tmp_path / "odd\0.jpg"
    return path


def test_what_is_no_picture_is_named(no_picture):
    for call in (lambda: read_picture(str(no_picture)), lambda: mapper()(record_of(no_picture))):
        with pytest.raises(ValueError, match=r"odd.*\.jpg cannot be decoded"):
            call()
    assert mapper(skip_broken_images=True)(record_of(no_picture)) is None
    good = record_of(saved(picture(), no_picture.parent / "good.png", "PNG"))
    assert check_images([record_of(no_picture), good], skip_broken=True) == [good]
