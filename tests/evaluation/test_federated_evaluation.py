"""LVIS's federated evaluation, by hand."""

import itertools
import json

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import Boxes, Instances

from hierkd.data.coco import register_ovd_dataset
from hierkd.evaluation.federated_evaluation import FederatedEvaluator

SERIAL = itertools.count()
NAMES = ("ant", "bee", "cow", "dog", "elk")
IDS = (2, 3, 5, 7, 11)
FREQUENCY = ("r", "c", "f", "f", "c")


@pytest.fixture
def register(tmp_path):
    made = []

    def register_dataset(images, annotations):
        name = f"federated_{next(SERIAL)}"
        categories = [
            {"id": i, "name": n, "frequency": f}
            for i, n, f in zip(IDS, NAMES, FREQUENCY, strict=True)
        ]
        content = {"images": images, "annotations": annotations, "categories": categories}
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(content))
        register_ovd_dataset(
            name,
            json_file=str(path),
            image_root=str(tmp_path),
            vocabulary=NAMES,
            base_classes=NAMES[:2],
            novel_classes=NAMES[2:],
        )
        MetadataCatalog.get(name).federated = True
        made.append(name)
        return name

    yield register_dataset
    for name in made:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def image(number, absent=(), inexhaustive=()):
    return {"id": number, "file_name": f"{number}.jpg", "height": 200, "width": 200} | {
        "neg_category_ids": list(absent),
        "not_exhaustive_category_ids": list(inexhaustive),
    }


def truth(number, image_id, category_id, box):
    return {"id": number, "image_id": image_id, "category_id": category_id, "bbox": list(box)} | {
        "area": box[2] * box[3]
    }


def evaluate(name, detections, images, **settings):
    """``detections``: (image id, category, XYWH, score)."""
    evaluator = FederatedEvaluator(name, distributed=False, **settings)
    for each in images:
        mine = [d for d in detections if d[0] == each["id"]]
        boxes = np.array([d[2] for d in mine], dtype=np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        instances = Instances((200, 200))
        instances.pred_boxes = Boxes(boxes)
        instances.scores = torch.tensor([d[3] for d in mine], dtype=torch.float64)
        instances.pred_classes = torch.tensor([IDS.index(d[1]) for d in mine], dtype=torch.int64)
        evaluator.process([{"image_id": each["id"]}], [{"instances": instances}])
    return evaluator.evaluate()["bbox"]


def test_detections_of_unknown_classes_do_not_count_those_of_absent_ones_do(register):
    images = [image(1), image(2, absent=[2]), image(3)]
    boxes = [truth(1, 1, 2, (0, 0, 50, 50))]
    name = register(images, boxes)
    right = (1, 2, (0, 0, 50, 50), 0.5)
    assert evaluate(name, [right], images)["rare/AP"] == pytest.approx(100)
    # image 3 says nothing about the class, image 2 that it is not there
    assert evaluate(name, [right, (3, 2, (0, 0, 50, 50), 0.9)], images)["rare/AP"] == (
        pytest.approx(100)
    )
    assert evaluate(name, [right, (2, 2, (0, 0, 50, 50), 0.9)], images)["rare/AP"] == (
        pytest.approx(50)
    )


def test_surplus_detections_count_only_where_the_class_is_boxed_exhaustively(register):
    boxes = [truth(1, 1, 2, (0, 0, 50, 50))]
    found = [(1, 2, (100, 100, 50, 50), 0.9), (1, 2, (0, 0, 50, 50), 0.5)]
    for inexhaustive, expected in (([], 50), ([2], 100)):
        images = [image(1, inexhaustive=inexhaustive)]
        name = register(images, boxes)
        assert evaluate(name, found, images)["rare/AP"] == pytest.approx(expected)


def test_the_best_detections_of_all_classes_count(register):
    images = [image(1, absent=[3])]
    name = register(images, [truth(1, 1, 2, (0, 0, 50, 50))])
    found = [(1, 3, (0, 0, 9, 9), 0.9), (1, 7, (0, 0, 9, 9), 0.8), (1, 2, (0, 0, 50, 50), 0.5)]
    assert evaluate(name, found, images, max_dets_per_image=3)["rare/AP"] == pytest.approx(100)
    assert evaluate(name, found, images, max_dets_per_image=2)["rare/AP"] == 0


def test_a_dataset_that_is_not_lvis_is_refused(register):
    plain = {"id": 1, "file_name": "1.jpg", "height": 200, "width": 200}
    name = register([plain], [truth(1, 1, 2, (0, 0, 50, 50))])
    with pytest.raises(ValueError, match="neg_category_ids"):
        FederatedEvaluator(name, distributed=False)
