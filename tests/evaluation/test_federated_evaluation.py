"""LVIS's federated evaluation, by hand and against a slow one written from its rules."""

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


# ------------------------------------------------------------------------------ by hand


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


# ------------------------------------------------------------------------------ by reference


def random_case(seed):
    """Images, boxes and detections, many of them near a box of some class."""
    rng = np.random.default_rng(seed)
    images, boxes, found = [], [], []
    for number in range(1, 9):
        shown = rng.choice(IDS, rng.integers(0, 4), replace=False).tolist()
        others = [i for i in IDS if i not in shown]
        absent = rng.choice(others, rng.integers(0, len(others)), replace=False).tolist()
        # LVIS marks shown classes; now and then also one that has no box
        inexhaustive = [i for i in IDS if rng.random() < (0.4 if i in shown else 0.05)]
        images.append(image(number, absent, inexhaustive))
        for category in shown:
            for _ in range(rng.integers(1, 4)):
                box = np.round([*rng.uniform(0, 120, 2), *rng.uniform(5, 130, 2)], 1).tolist()
                boxes.append(truth(len(boxes) + 1, number, category, box))
        for _ in range(rng.integers(0, 25)):
            near = [b["bbox"] for b in boxes if b["image_id"] == number]
            if near and rng.random() < 0.7:
                box = np.array(near[rng.integers(len(near))]) + rng.normal(0, 4, 4)
            else:
                box = np.array([*rng.uniform(0, 120, 2), *rng.uniform(5, 130, 2)])
            box[2:] = box[2:].clip(2)
            # quarters of a pixel are exact in float32
            box = (np.round(4 * box) / 4).tolist()
            found.append((number, int(rng.choice(IDS)), tuple(box), float(rng.random())))
    return images, boxes, found


def iou(a, b):
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / (a[2] * a[3] + b[2] * b[3] - shared)


def slow_ap(images, boxes, found, category, limit):
    """AP in percent of one class, from LVIS's rules; NaN without a box."""
    flags = {t: [] for t in range(10)}  # (score, hit) of detections that count
    total = sum(b["category_id"] == category for b in boxes)
    if not total:
        return float("nan")
    for each in images:
        best = sorted((d for d in found if d[0] == each["id"]), key=lambda d: -d[3])[:limit]
        mine = [d for d in best if d[1] == category]
        there = [
            b["bbox"] for b in boxes if (b["image_id"], b["category_id"]) == (each["id"], category)
        ]
        if not there and category not in each["neg_category_ids"]:
            continue
        for t in flags:
            free = list(range(len(there)))
            for detection in mine:
                hits = [(iou(detection[2], there[i]), i) for i in free]
                hits = [hit for hit in hits if hit[0] >= 0.5 + 0.05 * t]
                if hits:
                    free.remove(max(hits)[1])
                elif category in each["not_exhaustive_category_ids"]:
                    continue
                flags[t].append((detection[3], bool(hits)))
    values = []
    for found_flags in flags.values():
        hits = np.array([hit for _, hit in sorted(found_flags, key=lambda f: -f[0])], dtype=float)
        recall = hits.cumsum() / total
        precision = hits.cumsum() / np.arange(1, len(hits) + 1)
        levels = np.linspace(0, 1, 101)
        values.append(np.mean([precision[recall >= r].max(initial=0) for r in levels]))
    return 100 * float(np.mean(values))


@pytest.mark.parametrize("seed", range(6))
def test_figures_are_those_of_a_slow_evaluation(register, seed):
    images, boxes, found = random_case(seed)
    limit = 300 if seed % 2 else 8
    figures = evaluate(register(images, boxes), found, images, max_dets_per_image=limit)
    per_class = np.array([slow_ap(images, boxes, found, i, limit) for i in IDS])
    groups = {"rare": [0], "common": [1, 4], "frequent": [2, 3], "all": range(5)}
    for group, members in groups.items():
        values = per_class[list(members)]
        expected = np.nan if np.isnan(values).all() else np.nanmean(values)
        assert figures[f"{group}/AP"] == pytest.approx(expected, abs=1e-6, nan_ok=True)
