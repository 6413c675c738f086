"""ProposalEvaluator against hand-made boxes and against a slow count from the definition."""

import itertools
import json
import logging
import math

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, Instances

from hierkd.evaluation.proposal_evaluation import ProposalEvaluator

SIZE = 256
BASE, NOVEL = ("car", "dog"), ("cat", "umbrella")
IDS = {"car": 3, "cat": 17, "dog": 18, "umbrella": 28}
SERIAL = itertools.count()
METRICS = [f"AR{iou}@{limit}" for iou in (50, 75) for limit in (100, 300, 1000)]


def register(tmp_path, images, *, vocabulary=tuple(IDS), extra_keys=True):
    """Write ``images`` (per image (class, XYXY box[, "crowd"]), ...) as a registered COCO JSON."""
    annotations = []
    for image_id, objects in enumerate(images, start=1):
        for name, (x0, y0, x1, y1), *crowd in objects:
            annotation = {"id": len(annotations) + 1, "image_id": image_id}
            annotation |= {"category_id": IDS[name], "bbox": [x0, y0, x1 - x0, y1 - y0]}
            if extra_keys:
                annotation |= {"area": (x1 - x0) * (y1 - y0), "iscrowd": int(bool(crowd))}
            annotations.append(annotation)
    content = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "height": SIZE, "width": SIZE}
            for i in range(1, len(images) + 1)
        ],
        "annotations": annotations,
        "categories": [{"id": IDS[n], "name": n} for n in IDS if n in vocabulary],
    }
    name = f"proposal_evaluation_{next(SERIAL)}"
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps(content))
    MetadataCatalog.get(name).set(
        json_file=str(path),
        thing_classes=list(vocabulary),
        base_classes=list(BASE),
        novel_classes=list(NOVEL),
    )
    return name


def evaluate(name, proposals, **kwargs):
    """``proposals``: per image a list of (XYXY box, logit), in any order."""
    evaluator = ProposalEvaluator(name, distributed=False, **kwargs)
    evaluator.reset()
    for image_id, found in enumerate(proposals, start=1):
        instances = Instances((SIZE, SIZE))
        boxes = torch.tensor([box for box, _ in found], dtype=torch.float32)
        instances.proposal_boxes = Boxes(boxes.reshape(-1, 4))
        instances.objectness_logits = torch.tensor([float(logit) for _, logit in found])
        evaluator.process([{"image_id": image_id}], [{"proposals": instances}])
    return evaluator.evaluate()["box_proposals"]


def far_away(number):
    """Proposals that match nothing, all with logits above zero."""
    return [((200, 200, 201 + i % 50, 202 + i % 50), 1.0 + i) for i in range(number)]


CAR, CAT, DOG = (0, 0, 40, 40), (60, 60, 100, 100), (110, 10, 150, 90)


def test_exact_proposals_cover_everything(tmp_path):
    name = register(tmp_path, [[("car", CAR), ("cat", CAT)], [("dog", DOG)]])
    results = evaluate(name, [[(CAT, 0.1), (CAR, -3.0)], [(DOG, 0.0)]])
    assert set(results) == {f"{g}/{m}" for g in ("base", "novel", "all") for m in METRICS}
    assert set(results.values()) == {100.0}


def test_recall_pools_boxes_and_does_not_average_classes(tmp_path):
    """Three cars of which two are found, one dog that is: 3 of 4, not (2/3 + 1) / 2."""
    cars = [("car", CAR), ("car", CAT), ("car", (0, 100, 50, 150))]
    name = register(tmp_path, [[*cars, ("dog", DOG)]])
    results = evaluate(name, [[(CAR, 3), (CAT, 2), (DOG, 1)]])
    assert results["base/AR50@100"] == pytest.approx(75.0)
    assert results["all/AR50@100"] == pytest.approx(75.0)
    assert math.isnan(results["novel/AR50@100"])


def test_proposals_of_base_boxes_do_not_count_for_novel_ones(tmp_path):
    name = register(tmp_path, [[("car", CAR), ("cat", CAT)]])
    results = evaluate(name, [[(CAR, 1.0)]])
    values = [results[f"{group}/AR50@100"] for group in ("base", "novel", "all")]
    assert values == [100.0, 0.0, 50.0]


def test_the_two_thresholds(tmp_path):
    """A box of IoU 0.6 counts at 0.5 and not at 0.75."""
    name = register(tmp_path, [[("cat", (0, 0, 100, 100))]])
    results = evaluate(name, [[((0, 0, 100, 60), 0.0)]])
    assert results["novel/AR50@1000"] == 100.0
    assert results["novel/AR75@1000"] == 0.0


def test_only_the_best_proposals_count(tmp_path):
    name = register(tmp_path, [[("cat", CAT)], [("cat", CAT)], [("cat", CAT)]])
    # found by the 100th, by the 101st and by the 301st proposal of its image
    results = evaluate(name, [[(CAT, 0.5), *far_away(n)] for n in (99, 100, 300)])
    found = [results[f"novel/AR50@{limit}"] for limit in (100, 300, 1000)]
    assert found == pytest.approx([100 / 3, 200 / 3, 100.0])
    # and nothing beyond the largest limit
    assert evaluate(name, [[(CAT, 0.5), *far_away(1000)]] * 3)["novel/AR50@1000"] == 0.0


def test_other_limits(tmp_path):
    name = register(tmp_path, [[("cat", CAT), ("car", CAR)]])
    results = evaluate(name, [[(CAR, 2.0), (CAT, 1.0)]], limits=(2, 1))
    assert results["all/AR75@1"] == 50.0
    assert results["all/AR75@2"] == 100.0


def test_one_proposal_covers_one_box(tmp_path):
    twins = [("cat", (0, 0, 100, 100)), ("cat", (0, 0, 100, 98))]
    name = register(tmp_path, [twins])
    assert evaluate(name, [[((0, 0, 100, 99), 0.0)]])["novel/AR50@100"] == 50.0
    assert evaluate(name, [[((0, 0, 100, 99), 0.0)] * 2])["novel/AR50@100"] == 100.0


def test_crowd_regions_are_no_boxes(tmp_path):
    name = register(tmp_path, [[("cat", CAT), ("cat", (0, 0, 50, 200), "crowd")]])
    assert evaluate(name, [[(CAT, 0.0)]])["novel/AR50@100"] == 100.0
    # a proposal within a crowd region is neither wanted nor an excuse
    assert evaluate(name, [[((0, 0, 50, 200), 0.0)]])["novel/AR50@100"] == 0.0
    only_crowd = register(tmp_path, [[("cat", CAT, "crowd")]])
    assert math.isnan(evaluate(only_crowd, [[(CAT, 0.0)]])["novel/AR50@100"])


@pytest.mark.parametrize("proposals", [[], [[]], [[], []]])
def test_boxes_of_images_without_proposals_are_missed(tmp_path, proposals):
    name = register(tmp_path, [[("cat", CAT)], [("cat", CAT)]])
    assert evaluate(name, proposals)["novel/AR50@100"] == 0.0
    assert evaluate(name, [[(CAT, 0.0)], *proposals[1:]])["novel/AR50@100"] == 50.0


def test_images_without_boxes_change_nothing(tmp_path):
    name = register(tmp_path, [[("cat", CAT)], []])
    assert evaluate(name, [[(CAT, 0.0)], far_away(50)])["novel/AR50@100"] == 100.0


def test_annotations_without_area_and_iscrowd(tmp_path):
    name = register(tmp_path, [[("cat", CAT)]], extra_keys=False)
    assert evaluate(name, [[(CAT, 0.0)]])["novel/AR75@100"] == 100.0


def test_a_dataset_of_novel_classes_reports_them_alone(tmp_path):
    name = register(tmp_path, [[("cat", CAT)]], vocabulary=("cat", "umbrella"))
    assert set(evaluate(name, [[(CAT, 0.0)]])) == {f"novel/{m}" for m in METRICS}


# ---------------------------------------------------------------------- by reference


def overlap(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    inter = max(width, 0) * max(height, 0)
    return inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)


def slow_recall(images, proposals, wanted, threshold, limit):
    """The best proposal first, each takes the free box that it overlaps most."""
    hits = total = 0
    for objects, found in zip(images, proposals, strict=True):
        free = [box for name, box in objects if name in wanted]
        total += len(free)
        for box, _ in sorted(found, key=lambda pair: -pair[1])[:limit]:
            best = max(free, key=lambda other: overlap(box, other), default=None)
            if best is not None and overlap(box, best) >= threshold:
                free.remove(best)
                hits += 1
    return 100 * hits / total


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_agrees_with_a_slow_count(tmp_path, seed):
    rng = np.random.default_rng(seed)
    images, proposals = [], []
    for _ in range(8):
        objects, found = [], []
        for _ in range(rng.integers(1, 7)):
            x0, y0 = rng.integers(0, 130, size=2)
            width, height = rng.integers(15, 120, size=2)
            box = (int(x0), int(y0), int(x0 + width), int(y0 + height))
            objects.append((str(rng.choice(list(IDS))), box))
            for _ in range(rng.integers(0, 4)):
                noise = rng.normal(scale=0.08, size=4) * [width, height, width, height]
                found.append((tuple((np.array(box) + noise).tolist()), float(rng.normal())))
        images.append(objects)
        proposals.append(found)
    limits = (1, 3, 10)
    results = evaluate(register(tmp_path, images), proposals, limits=limits)
    for group, wanted in {"base": BASE, "novel": NOVEL, "all": BASE + NOVEL}.items():
        for threshold, limit in itertools.product((0.5, 0.75), limits):
            expected = slow_recall(images, proposals, wanted, threshold, limit)
            assert results[f"{group}/AR{100 * threshold:.0f}@{limit}"] == pytest.approx(expected)
    assert 0 < results["all/AR75@3"] < results["all/AR50@10"] < 100  # the scene says something


# ---------------------------------------------------------------------- reports and errors


def test_logs_one_table_and_prints_nothing(tmp_path, caplog, capsys):
    name = register(tmp_path, [[("cat", CAT), ("car", CAR), ("cat", DOG, "crowd")]])
    with caplog.at_level(logging.INFO, logger="hierkd"):
        evaluate(name, [[(CAT, 0.0)]])
    (record,) = [r for r in caplog.records if r.name.startswith("hierkd")]
    lines = [[c.strip() for c in row.split("|")] for row in record.getMessage().splitlines()[1:]]
    assert lines[0][1:-1] == ["group", "boxes", *METRICS]
    rows = {line[1]: line[2:-1] for line in lines[2:]}
    assert rows["novel"] == ["1", *["100.0"] * 6]
    assert rows["all"] == ["2", *["50.0"] * 6]
    assert capsys.readouterr().out == ""


def test_mistakes_are_named(tmp_path):
    name = register(tmp_path, [[]], vocabulary=("car", "cat"))
    with pytest.raises(ValueError, match=r"limits.*\[100, 0\]"):
        ProposalEvaluator(name, limits=(100, 0))
    MetadataCatalog.get(name).thing_classes.append("umbrella")
    with pytest.raises(ValueError, match=r"\.json.*umbrella.*car"):
        ProposalEvaluator(name)
    with pytest.raises(ValueError, match=r"nowhere.*thing_classes.*json_file"):
        ProposalEvaluator("nowhere")


def test_either_library_gives_the_same_figures(tmp_path):
    """With equal logits, crowds, an image without proposals and one without boxes."""
    rng = np.random.default_rng(4)
    grid = [(x, y, x + 32, y + 48) for x in range(0, 160, 16) for y in range(0, 160, 32)]
    classes = list(IDS)
    images = [
        [
            (classes[k % 4], grid[k], *(("crowd",) if rng.random() < 0.2 else ()))
            for k in rng.choice(len(grid), size=number, replace=False)
        ]
        for number in (6, 9, 0, 5)
    ]
    proposals = [
        [(grid[k], float(rng.integers(3))) for k in rng.choice(len(grid), size=number)]
        for number in (30, 12, 20, 0)
    ]
    name = register(tmp_path, images)
    fast, slow = (evaluate(name, proposals, limits=(3, 10, 40), use_fast_impl=f) for f in (1, 0))
    assert fast == pytest.approx(slow, abs=1e-9, nan_ok=True)
    assert 0 < fast["all/AR50@3"] < fast["all/AR50@40"]
