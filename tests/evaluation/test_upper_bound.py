"""The CLIP upper bound with teachers whose answers are known."""

import itertools
import json

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image

from hierkd.evaluation.upper_bound import clip_upper_bound

VOCABULARY = ["ant", "bee", "cow", "dog"]
# Each class is drawn as a filled square of its own colour (RGB); the teacher reads the colour.
COLOURS = torch.tensor([[250, 0, 0], [0, 250, 0], [0, 0, 250], [250, 250, 0]])
SERIAL = itertools.count()


@pytest.fixture
def dataset_name(tmp_path):
    """Twelve images of one to four coloured squares, one image without any, one crowd region."""
    rng = np.random.default_rng(0)
    records, annotations, images = [], [], []
    for image_id in range(1, 13):
        pixels = np.full((90, 120, 3), 128, dtype=np.uint8)
        record_annotations = []
        for slot in range(0 if image_id == 1 else 1 + image_id % 4):
            class_index = int(rng.integers(4))
            x, y = 4 + 28 * slot, int(rng.integers(5, 60))
            pixels[y : y + 24, x : x + 24] = COLOURS[class_index]
            record_annotations.append((class_index, [x, y, 24, 24], image_id == 5 and slot == 1))
        path = tmp_path / f"{image_id}.png"
        Image.fromarray(pixels).save(path)
        images.append({"id": image_id, "file_name": path.name, "height": 90, "width": 120})
        records.append(
            {
                "file_name": str(path),
                "image_id": image_id,
                "height": 90,
                "width": 120,
                "annotations": [
                    {
                        "bbox": box,
                        "bbox_mode": BoxMode.XYWH_ABS,
                        "category_id": k,
                        "iscrowd": int(crowd),
                    }
                    for k, box, crowd in record_annotations
                ],
            }
        )
        for k, box, crowd in record_annotations:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": 10 * (k + 1),
                    "bbox": box,
                    "area": 576,
                    "iscrowd": int(crowd),
                }
            )
    json_file = tmp_path / "annotations.json"
    categories = [{"id": 10 * (k + 1), "name": name} for k, name in enumerate(VOCABULARY)]
    json_file.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    name = f"upper_bound_{next(SERIAL)}"
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).set(
        json_file=str(json_file),
        thing_classes=VOCABULARY,
        base_classes=VOCABULARY[:2],
        novel_classes=VOCABULARY[2:],
    )
    return name


class ColourTeacher:
    """Embeds a region by the colour at its centre; classes are unit vectors."""

    embed_dim = 4

    def __init__(self, *, logit_scale=100.0, image_format="RGB", confuse=None):
        self.logit_scale = logit_scale
        self.image_format = image_format
        self.confuse = confuse or {}
        self.crop_scales = set()
        self.num_regions = 0

    def encode_regions(self, images, boxes, crop_scale):
        self.crop_scales.add(crop_scale)
        embeddings = []
        for image, image_boxes in zip(images, boxes, strict=True):
            assert image.shape == (3, 90, 120)
            assert image_boxes.shape[1] == 4
            rgb = image if self.image_format == "RGB" else image.flip(0)
            for x0, y0, x1, y1 in image_boxes.tolist():
                colour = rgb[:, int(y0 + y1) // 2, int(x0 + x1) // 2].long()
                (found,) = (colour == COLOURS).all(dim=1).nonzero().flatten().tolist()
                embeddings.append(torch.eye(4)[self.confuse.get(found, found)])
        self.num_regions += len(embeddings)
        return torch.stack(embeddings) if embeddings else torch.zeros(0, 4)

    def encode_captions(self, captions):
        raise NotImplementedError

    def encode_classes(self, names):
        return torch.eye(4)[[VOCABULARY.index(name) for name in names]]


@pytest.mark.parametrize("images_per_batch", [1, 5, 100])
def test_a_teacher_that_knows_scores_one_hundred(dataset_name, images_per_batch):
    teacher = ColourTeacher()
    results = clip_upper_bound(teacher, dataset_name, images_per_batch=images_per_batch)
    for group in ("base", "novel", "all"):
        assert results[f"{group}/AP50"] == pytest.approx(100.0)
        assert results[f"{group}/AP"] == pytest.approx(100.0)
    assert teacher.crop_scales == {1.5}


def test_channel_order_reaches_the_teacher(dataset_name):
    results = clip_upper_bound(
        ColourTeacher(image_format="BGR"), dataset_name, 1.0, image_format="BGR"
    )
    assert results["all/AP50"] == pytest.approx(100.0)


def test_crowd_regions_are_not_classified(dataset_name):
    teacher = ColourTeacher()
    clip_upper_bound(teacher, dataset_name)
    annotated = [a for record in DatasetCatalog.get(dataset_name) for a in record["annotations"]]
    assert sum(a["iscrowd"] for a in annotated) == 1
    assert teacher.num_regions == len(annotated) - 1


def test_each_box_has_one_label(dataset_name):
    """A teacher that takes dogs for cows: dogs are missed, and cost the cows precision."""
    results = clip_upper_bound(ColourTeacher(confuse={3: 2}), dataset_name)
    assert results["base/AP50"] == pytest.approx(100.0)
    assert 0 < results["AP50-cow"] < 100
    assert results["AP50-dog"] == 0
    assert results["novel/AR50"] == pytest.approx(50.0)  # of cows 100, of dogs 0


def test_the_most_probable_boxes_of_an_image_are_kept(dataset_name):
    """With one box per image, at most one of its objects can be found: the surest one."""
    results = clip_upper_bound(ColourTeacher(), dataset_name, max_detections=1)
    assert 0 < results["all/AR50"] < 100
    teacher = ColourTeacher()
    encode = teacher.encode_regions
    strengths = torch.tensor([1.0, 0.2, 0.2, 0.2])  # of ant it is sure
    teacher.encode_regions = lambda *args: encode(*args) @ strengths.diag()
    teacher.logit_scale = 1.0
    results = clip_upper_bound(teacher, dataset_name, max_detections=1)
    ants = [
        sum(a["category_id"] == 0 for a in record["annotations"])
        for record in DatasetCatalog.get(dataset_name)
    ]
    assert results["AP50-ant"] > 0
    assert sum(n > 0 for n in ants) < sum(ants)  # two in one image
    assert results["AP50-ant"] == pytest.approx(100 * sum(n > 0 for n in ants) / sum(ants), abs=1)


def test_every_figure_of_table_9_is_there(dataset_name):
    """All boxes are 24 px wide: small ones are all there is."""
    results = clip_upper_bound(ColourTeacher(), dataset_name)
    for group in ("base", "novel", "all"):
        for metric in ("AP50", "APs", "AR50"):
            assert results[f"{group}/{metric}"] == pytest.approx(100.0)
        for metric in ("APm", "APl"):
            assert np.isnan(results[f"{group}/{metric}"])


@pytest.mark.parametrize("scale", [0.0, -1.5, float("nan")])
def test_crop_scale_must_be_positive(dataset_name, scale):
    with pytest.raises(ValueError, match="crop scale must be positive"):
        clip_upper_bound(ColourTeacher(), dataset_name, scale)


def test_a_picture_that_cannot_be_read_is_named(dataset_name):
    path = DatasetCatalog.get(dataset_name)[3]["file_name"]
    with open(path, "wb") as file:
        file.write(b"no picture")
    with pytest.raises(ValueError, match=r"4\.png cannot be decoded"):
        clip_upper_bound(ColourTeacher(), dataset_name)
