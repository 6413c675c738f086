"""The mapper: captions, broken images, and what detectron2's part must keep doing."""

import collections
import copy
import logging
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from PIL import Image

from hierkd.config import add_hierkd_config
from hierkd.data.mapper import HierKDDatasetMapper, check_images

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


@pytest.fixture(params=["truncated", "missing", "png_crc"])
def broken(request, tmp_path, record):
    """A record whose image cannot be decoded, in several ways."""
    path = tmp_path / "broken.jpg"
    if request.param == "truncated":
        Image.open(record["file_name"]).resize((400, 300)).save(path)
        path.write_bytes(path.read_bytes()[:900])
    elif request.param == "png_crc":
        data = bytearray(Path(record["file_name"]).read_bytes())
        data[40] ^= 0xFF
        path.write_bytes(data[:60])
    return {**copy.deepcopy(record), "file_name": str(path), "image_id": 2}


def make(is_train=True, **kwargs):
    arguments = {"augmentations": [], "image_format": "RGB", "with_caption": True, **kwargs}
    return HierKDDatasetMapper(is_train, **arguments)


def make_cfg():
    cfg = get_cfg()
    add_hierkd_config(cfg)
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


def test_broken_image_is_named_or_skipped_by_key(broken, caplog):
    with pytest.raises(ValueError, match=r"broken\.jpg cannot be decoded.*SKIP_BROKEN_IMAGES"):
        make()(broken)
    with caplog.at_level(logging.WARNING, logger="hierkd.data.mapper"):
        assert make(skip_broken_images=True)(broken) is None
    assert broken["file_name"] in caplog.text


def test_broken_image_is_never_skipped_at_inference(broken):
    with pytest.raises(ValueError, match=r"broken\.jpg cannot be decoded") as info:
        make(is_train=False, skip_broken_images=True)(broken)
    assert "SKIP_BROKEN_IMAGES" not in str(info.value)


def test_size_other_than_annotated_is_an_error_even_when_skipping(record):
    record["width"] = 41
    with pytest.raises(ValueError, match=r"good\.png, got \(40, 30\), expect \(41, 30\)"):
        make(skip_broken_images=True)(record)


def test_from_config(record):
    mapper = HierKDDatasetMapper(make_cfg(), True)
    assert (mapper.with_caption, mapper.skip_broken_images) == (True, False)
    result = mapper(record)
    assert result["image"].shape == (3, 60, 80)
    assert result["instances"].gt_boxes.tensor.tolist() == [[8.0, 12.0, 28.0, 36.0]]


def test_check_images(record, broken, caplog):
    assert check_images([record, record]) == [record, record]
    with pytest.raises(ValueError, match=r"1 of 2 images cannot be decoded, first: .*broken\.jpg"):
        check_images([record, broken])
    with caplog.at_level(logging.WARNING, logger="hierkd.data.mapper"):
        assert check_images([broken, record], skip_broken=True) == [record]
    assert broken["file_name"] in caplog.text
    with pytest.raises(ValueError, match=r"expected 40 x 31"):
        check_images([{**record, "height": 31}], skip_broken=True)


class Cache:
    """Says of each region its annotation's id and whether it is mirrored, of a text its length."""

    def regions(self, annotation_ids, *, flipped):
        return np.array([[each, flipped] for each in annotation_ids], np.float32)

    contents = SimpleNamespace(proposals_per_image=2)

    def proposals(self, annotation_ids, *, flipped):
        """One, of the size of all, which ends outside the image of 40 x 30."""
        boxes = np.array([[4, 6, 44, 16]], np.float32)
        return boxes, np.array([[sum(annotation_ids), flipped]], np.float32)

    def texts(self, texts):
        return {text: np.array([len(text), 0.0], np.float32) for text in texts if text != "unknown"}


def with_ids(record):
    """The record with ids; a box that no resizing to 20 x 15 leaves room for comes first."""
    box = record["annotations"][0]
    flat = {**box, "bbox": [4.0, 6.0, 10.0, 1e-6], "id": 5}
    crowd = {**record["annotations"][1], "id": 6}
    return {**record, "annotations": [flat, crowd, {**box, "id": 7}, {**box, "id": 9}]}


def make_cached(*augmentations):
    return make(with_regions=True, cache=Cache(), augmentations=list(augmentations))


@pytest.mark.parametrize("flips", [0, 1, 2])
def test_embeddings_of_the_cache_stay_beside_their_boxes(record, flips):
    augmentations = [T.Resize((15, 20)), *[T.RandomFlip(1.0)] * flips]
    result = make_cached(*augmentations)(with_ids(record))
    instances, mirrored = result["instances"], float(flips == 1)
    assert instances.gt_region_embeddings.tolist() == [[7.0, mirrored], [9.0, mirrored]]
    left = 20 - 7 if mirrored else 2
    assert instances.gt_boxes.tensor[:, 0].tolist() == pytest.approx([left] * 2)
    proposals = result["proposals"]
    box = [0, 3, 18, 8] if mirrored else [2, 3, 20, 8]  # put through the same, inside the image
    assert proposals.proposal_boxes.tensor.tolist() == [pytest.approx(box)]
    assert proposals.region_embeddings.tolist() == [[5.0 + 7.0 + 9.0, mirrored]]
    assert result["caption_embedding"].tolist() == [len(result["caption"]), 0.0]
    plain = make(augmentations=augmentations)(with_ids(record))
    assert torch.equal(instances.gt_boxes.tensor, plain["instances"].gt_boxes.tensor)
    assert not plain["instances"].has("gt_region_embeddings")
    assert "proposals" not in plain


def test_the_cache_is_read_from_the_config():
    cfg = make_cfg()
    assert not HierKDDatasetMapper.from_config(cfg)["with_regions"]
    cfg.MODEL.TEACHER.CACHE = "somewhere"
    assert HierKDDatasetMapper.from_config(cfg, is_train=True)["with_regions"]
    for key, value in (("RANDOM_FLIP", "vertical"), ("CROP.ENABLED", True)):
        own = cfg.clone()
        own.merge_from_list([f"INPUT.{key}", value])
        with pytest.raises(ValueError, match=f"INPUT.{key}"):
            HierKDDatasetMapper.from_config(own, is_train=True)
        own.MODEL.IKD.LOSS_WEIGHT = 0.0  # the cache then serves texts alone
        assert not HierKDDatasetMapper.from_config(own, is_train=True)["with_regions"]
