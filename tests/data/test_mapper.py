"""The mapper: captions, broken images, and what detectron2's part must keep doing."""

import collections
import copy
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import MapDataset
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from PIL import Image

from hierkd.config import add_hierkd_config
from hierkd.data.mapper import HierKDDatasetMapper, check_images, read_picture

CAPTIONS = ["a cat", "two cats", "a cat on a mat"]


@pytest.fixture
def record(tmp_path):
    """One 40 x 30 image with a box and a crowd region."""
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "good.png")
    box = {"bbox": [4.0, 6.0, 10.0, 12.0], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 3}
    return {
        "file_name": str(tmp_path / "good.png"),
        "height": 30,
        "width": 40,
        "image_id": 1,
        "annotations": [{**box, "iscrowd": 0}, {**box, "iscrowd": 1}],
        "captions": list(CAPTIONS),
    }


@pytest.fixture(params=["truncated", "text", "empty", "missing", "png_crc"])
def broken(request, tmp_path, record):
    """A record whose image cannot be decoded, in several ways."""
    path = tmp_path / "broken.jpg"
    if request.param == "truncated":
        Image.open(record["file_name"]).resize((400, 300)).save(path)
        path.write_bytes(path.read_bytes()[:900])
    elif request.param == "text":
        path.write_text("<html>404</html>")
    elif request.param == "empty":
        path.touch()
    elif request.param == "png_crc":
        data = bytearray(Path(record["file_name"]).read_bytes())
        data[40] ^= 0xFF
        path.write_bytes(data[:60])
    return {**copy.deepcopy(record), "file_name": str(path), "image_id": 2}


def make(is_train=True, **kwargs):
    arguments = {"augmentations": [], "image_format": "RGB", "with_caption": True, **kwargs}
    return HierKDDatasetMapper(is_train, **arguments)


def make_cfg(gkd_weight=1.0, skip=False):
    cfg = get_cfg()
    add_hierkd_config(cfg)
    cfg.MODEL.GKD.LOSS_WEIGHT = gkd_weight
    cfg.DATALOADER.SKIP_BROKEN_IMAGES = skip
    cfg.INPUT.FORMAT = "RGB"
    cfg.INPUT.MIN_SIZE_TRAIN = (60,)
    cfg.INPUT.RANDOM_FLIP = "none"
    return cfg


def test_result_in_training(record):
    before = copy.deepcopy(record)
    result = make()(record)
    pixels = np.asarray(Image.open(record["file_name"]))
    assert torch.equal(result["image"], torch.from_numpy(pixels.copy()).permute(2, 0, 1))
    instances = result["instances"]
    assert instances.gt_boxes.tensor.tolist() == [[4.0, 6.0, 14.0, 18.0]]  # the crowd is gone
    assert instances.gt_classes.tolist() == [3]
    assert result["caption"] in CAPTIONS
    assert "captions" not in result
    assert "annotations" not in result
    assert record == before


def test_caption_is_drawn_uniformly_and_reproducibly(record):
    mapper = make()

    def draw(seed, count):
        np.random.seed(seed)
        return [mapper(record)["caption"] for _ in range(count)]

    drawn = draw(0, 300)
    counts = collections.Counter(drawn)
    assert set(counts) == set(CAPTIONS)
    assert min(counts.values()) > 70  # 100 expected, standard deviation 8
    assert drawn[:50] == draw(0, 50)
    assert drawn[:50] != draw(1, 50)


def test_no_caption_without_global_distillation_or_at_inference(record):
    assert "caption" not in make(with_caption=False)(record)
    result = make(is_train=False)(record)
    assert not {"caption", "captions", "annotations", "instances"} & set(result)
    del record["captions"]
    make(is_train=False)(record)


@pytest.mark.parametrize("captions", [None, []])
def test_missing_caption_names_the_image(record, captions):
    record["captions"] = captions
    with pytest.raises(ValueError, match=r"good\.png \(id 1\) has no caption.*MODEL\.GKD"):
        make()(record)


def test_broken_image_is_named(broken):
    with pytest.raises(ValueError, match=r"broken\.jpg cannot be decoded.*SKIP_BROKEN_IMAGES"):
        make()(broken)


def test_broken_image_is_skipped_by_key_and_counted(broken, caplog):
    mapper = make(skip_broken_images=True)
    with caplog.at_level(logging.WARNING, logger="hierkd.data.mapper"):
        assert mapper(broken) is None
        assert mapper(broken) is None
    assert mapper.num_skipped == 2
    first, second = (each.getMessage() for each in caplog.records)
    assert broken["file_name"] in first
    assert "1 skipped so far" in first
    assert "2 skipped so far" in second


def test_detectron2_takes_another_image_for_a_skipped_one(record, broken):
    dataset = MapDataset([broken, record], make(skip_broken_images=True))
    assert dataset[0]["image_id"] == 1


def test_broken_image_is_never_skipped_at_inference(broken):
    with pytest.raises(ValueError, match=r"broken\.jpg cannot be decoded") as info:
        make(is_train=False, skip_broken_images=True)(broken)
    assert "SKIP_BROKEN_IMAGES" not in str(info.value)


def test_size_other_than_annotated_is_an_error_even_when_skipping(record):
    record["width"] = 41
    with pytest.raises(ValueError, match=r"good\.png, got \(40, 30\), expect \(41, 30\)"):
        make(skip_broken_images=True)(record)


def test_exif_orientation_is_applied(record, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise by 90 degrees
    path = tmp_path / "turned.png"
    Image.open(record["file_name"]).save(path, exif=exif)
    turned = {**record, "file_name": str(path), "height": 40, "width": 30, "annotations": []}
    pixels = np.asarray(Image.open(record["file_name"]))
    expected = np.rot90(pixels, k=-1)
    assert np.array_equal(make()(turned)["image"].permute(1, 2, 0).numpy(), expected)


def test_from_config(record):
    mapper = HierKDDatasetMapper(make_cfg(), True)
    assert (mapper.with_caption, mapper.skip_broken_images) == (True, False)
    result = mapper(record)
    assert result["image"].shape == (3, 60, 80)
    assert result["instances"].gt_boxes.tensor.tolist() == [[8.0, 12.0, 28.0, 36.0]]
    assert not HierKDDatasetMapper(make_cfg(gkd_weight=0.0), True).with_caption
    assert not HierKDDatasetMapper(make_cfg(), is_train=False).with_caption
    assert HierKDDatasetMapper(make_cfg(skip=True), True).skip_broken_images


def test_check_images(record, broken, caplog):
    assert check_images([record, record]) == [record, record]
    with pytest.raises(ValueError, match=r"1 of 2 images cannot be decoded, first: .*broken\.jpg"):
        check_images([record, broken])
    with caplog.at_level(logging.WARNING, logger="hierkd.data.mapper"):
        assert check_images([broken, record], skip_broken=True) == [record]
    assert broken["file_name"] in caplog.text
    with pytest.raises(ValueError, match=r"expect \(40, 31\)"):
        check_images([{**record, "height": 31}], skip_broken=True)


def test_read_picture(tmp_path, broken):
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[..., 0] = 200  # red
    Image.fromarray(pixels).save(tmp_path / "red.png")
    assert (read_picture(str(tmp_path / "red.png"), "RGB") == pixels).all()
    assert (read_picture(str(tmp_path / "red.png")) == pixels[..., ::-1]).all()
    for path in (str(broken["file_name"]), str(tmp_path / "absent.png")):
        with pytest.raises(ValueError, match=Path(path).name):
            read_picture(path)


# --- for a cache of the teacher -------------------------------------------------------------------


def with_ids(record):
    """The record with ids; a box that no resizing to 20 x 15 leaves room for comes first."""
    box = record["annotations"][0]
    flat = {**box, "bbox": [4.0, 6.0, 10.0, 1e-6], "id": 5}
    crowd = {**record["annotations"][1], "id": 6}
    return {**record, "annotations": [flat, crowd, {**box, "id": 7}, {**box, "id": 900_000_000}]}


def test_annotation_ids_stay_beside_their_boxes(record):
    mapper = make(with_annotation_ids=True, augmentations=[T.Resize((15, 20))])
    result = mapper(with_ids(record))
    assert result["instances"].gt_annotation_ids.tolist() == [7, 900_000_000]
    assert result["instances"].gt_annotation_ids.dtype == torch.int64
    plain = make(augmentations=[T.Resize((15, 20))])(with_ids(record))
    assert torch.equal(result["instances"].gt_boxes.tensor, plain["instances"].gt_boxes.tensor)
    assert torch.equal(result["instances"].gt_classes, plain["instances"].gt_classes)
    assert result["horizontally_flipped"] is False
    assert "horizontally_flipped" not in plain
    assert not plain["instances"].has("gt_annotation_ids")


@pytest.mark.parametrize("flips", [0, 1, 2])
def test_mirroring_is_known(record, flips):
    result = make(
        with_annotation_ids=True,
        augmentations=[T.ResizeShortestEdge(60), *[T.RandomFlip(1.0)] * flips],
    )(with_ids(record))
    assert result["horizontally_flipped"] is (flips == 1)
    left = result["instances"].gt_boxes.tensor[0, 0].item()
    assert left == pytest.approx(2 * (40 - 14 if flips == 1 else 4))


def test_without_ids_or_with_other_augmentations_the_cache_is_refused(record):
    with pytest.raises(ValueError, match=r"good\.png.*integer ids.*None"):
        make(with_annotation_ids=True)(record)
    cropping = make(with_annotation_ids=True, augmentations=[T.RandomCrop("absolute", (20, 20))])
    with pytest.raises(ValueError, match="CropTransform"):
        cropping(with_ids(record))


def test_the_cache_is_read_from_the_config():
    cfg = make_cfg()
    assert not HierKDDatasetMapper(cfg).with_annotation_ids
    cfg.MODEL.TEACHER.CACHE = "somewhere"
    assert HierKDDatasetMapper(cfg, is_train=True).with_annotation_ids
    assert not HierKDDatasetMapper(cfg, is_train=False).with_annotation_ids
    cfg.INPUT.RANDOM_FLIP = "vertical"
    with pytest.raises(ValueError, match=r"INPUT\.RANDOM_FLIP is 'vertical'.*'horizontal'"):
        HierKDDatasetMapper(cfg, is_train=True)
    cfg.INPUT.RANDOM_FLIP, cfg.INPUT.CROP.ENABLED = "none", True
    with pytest.raises(ValueError, match=r"INPUT\.CROP\.ENABLED"):
        HierKDDatasetMapper(cfg, is_train=True)
    cfg.MODEL.IKD.LOSS_WEIGHT = 0.0  # the cache then serves texts alone
    assert not HierKDDatasetMapper(cfg, is_train=True).with_annotation_ids
