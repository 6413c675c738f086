"""SplitCOCOEvaluator against figures computed by hand; tests/reference has COCO's definition."""

import json
import math

import pytest
from detectron2.data import MetadataCatalog

import tiny_training
import train_net
from evaluated_datasets import IDS, detections, evaluate, proposals, register
from hierkd.evaluation.split_coco_evaluation import SplitCOCOEvaluator
from hierkd.load_config import load_config

NAN = math.nan
BOX, FAR, LARGE = (0, 0, 50, 50), (200, 200, 240, 240), (100, 100, 200, 220)


def figures(name, found, **kwargs):
    """``found``: per image (class, XYXY box, score), ..."""
    vocabulary = MetadataCatalog.get(name).thing_classes
    outputs = [detections(each, vocabulary) for each in found]
    return evaluate(SplitCOCOEvaluator(name, distributed=False, **kwargs), outputs)


# ------------------------------------------------------------------------------ by hand

CASES = {
    # Base right, novel all missed: a swap of the two shows.
    "base is not novel": (
        [[("wolf", BOX), ("dog", FAR), ("cat", LARGE)]],
        [[("wolf", BOX, 0.9), ("dog", FAR, 0.8)]],
        {"base/AP50": 100, "novel/AP50": 0, "all/AP50": 200 / 3, "base/AR50": 100, "novel/AR50": 0},
    ),
    "sizes": (
        [[("wolf", (0, 0, 20, 20)), ("umbrella", (30, 30, 90, 90)), ("dog", LARGE)]],
        [[("wolf", (0, 0, 20, 20), 0.9), ("umbrella", (30, 30, 90, 90), 0.9), ("dog", LARGE, 0.9)]],
        {"base/APs": 100, "base/APm": NAN, "base/APl": 100, "novel/APs": NAN, "novel/APm": 100}
        | {"all/AP": 100, "all/AP75": 100},
    ),
    # Ranked right, wrong, right: precision 1 to recall .5, then 2/3. COCO samples recall at 0, .01,
    # ..., 1: 51 points at precision 1 and 50 at 2/3.
    "two of three right": (
        [[("wolf", (0, 0, 100, 100)), ("wolf", (120, 0, 220, 100))]],
        [
            [
                ("wolf", (0, 0, 100, 100), 0.9),
                ("wolf", (0, 150, 60, 200), 0.8),
                ("wolf", (120, 0, 220, 100), 0.7),
            ]
        ],
        {"AP50-wolf": 100 * (51 + 50 * 2 / 3) / 101, "base/AR50": 100},
    ),
    # IoU 0.6 counts at the thresholds .50, .55 and .60.
    "three of ten thresholds": (
        [[("cat", (0, 0, 100, 100))]],
        [[("cat", (0, 0, 100, 60), 0.5)]],
        {"novel/AP50": 100, "novel/AP75": 0, "novel/AP": 30, "novel/AR50": 100, "base/AP50": NAN},
    ),
    # A false positive of a class without ground truth costs nothing.
    "means over classes with ground truth": (
        [[("wolf", BOX), ("dog", FAR), ("cat", LARGE)]],
        [[("wolf", BOX, 0.9), ("cat", LARGE, 0.9), ("umbrella", FAR, 0.9)]],
        {"base/AP50": 50, "novel/AP50": 100, "all/AP50": 200 / 3, "all/AR50": 200 / 3}
        | {"AP50-umbrella": NAN, "AP50-dog": 0},
    ),
    "a false positive in an empty image": (
        [[("wolf", BOX)], []],
        [[("wolf", BOX, 0.5)], [("wolf", BOX, 0.9)]],
        {"AP50-wolf": 50},
    ),
    "crowd regions neither help nor hurt": (
        [[("wolf", BOX), ("wolf", (100, 100, 200, 200), "crowd")]],
        [[("wolf", BOX, 0.5), ("wolf", (110, 110, 150, 150), 0.9)]],
        {"AP50-wolf": 100},
    ),
    "nothing found": (
        [[("wolf", BOX)], []],
        [[], []],
        {"base/AP50": 0, "base/AR50": 0, "all/AP": 0, "novel/AP50": NAN, "AP50-wolf": 0},
    ),
    "no ground truth": ([[], []], [[("wolf", BOX, 0.5)], []], {"all/AP50": NAN, "base/AP": NAN}),
}


@pytest.mark.parametrize(("images", "found", "expected"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("bare", [False, True])
def test_figures_by_hand(tmp_path, images, found, expected, bare):
    if bare and any(len(each) > 2 for objects in images for each in objects):
        pytest.skip("crowds need iscrowd")
    results = figures(register(tmp_path, images, bare=bare), found)
    shown = {key: results[key] for key in expected}
    assert shown == pytest.approx(expected, nan_ok=True)


GROUPS = {
    "novel classes alone": ({"vocabulary": ("umbrella", "cat")}, {"novel": 50}),
    "no split": ({"base_classes": (), "novel_classes": ()}, {"all": 25}),
    "a class of neither": ({"base_classes": ("wolf",)}, {"base": 0, "novel": 50, "all": 100 / 3}),
}


@pytest.mark.parametrize(("metadata", "expected"), GROUPS.values(), ids=GROUPS)
def test_groups_are_those_of_the_vocabulary(tmp_path, metadata, expected):
    """The JSON may hold more categories than the vocabulary; they take no part."""
    images = [[("cat", BOX), ("umbrella", FAR), ("wolf", LARGE), ("dog", (60, 0, 90, 50))]]
    results = figures(register(tmp_path, images, **metadata), [[("cat", BOX, 0.9)]])
    found = {key.split("/")[0]: value for key, value in results.items() if key.endswith("/AP50")}
    assert found == pytest.approx(expected)
    vocabulary = metadata.get("vocabulary", tuple(IDS))
    assert {key for key in results if "-" in key} == {f"AP50-{name}" for name in vocabulary}


def test_at_most_so_many_detections_per_image(tmp_path):
    """With one detection allowed, the better-scored one of two counts."""
    name = register(tmp_path, [[("wolf", BOX), ("wolf", LARGE)]])
    found = [[("wolf", BOX, 0.9), ("wolf", LARGE, 0.8)]]
    assert figures(name, found)["base/AR50"] == pytest.approx(100)
    assert figures(name, found, max_dets_per_image=1)["base/AR50"] == pytest.approx(50)


# ------------------------------------------------------------------------------ in training


@pytest.fixture
def trainers_evaluator(tmp_path):
    """What training evaluates with, on the six pictures of a tiny world."""
    name = "miniature_ovd_val_all"
    tiny_training.write_world(tmp_path)

    def build(*overrides, **metadata):
        cfg = load_config(tiny_training.CONFIG, ["OUTPUT_DIR", str(tmp_path), *overrides])
        MetadataCatalog.get(name).set(**metadata)
        return train_net.Trainer.build_evaluator(cfg, name)

    with tiny_training.miniature_at(tmp_path):
        yield build


@pytest.mark.parametrize(
    ("architecture", "empty"),
    [
        ("HierKD", lambda: detections([])),
        ("ProposalNetwork", lambda: proposals([])),
    ],
)
@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, 2, 3, 4, 5], r"1 are missing, such as \[6\]"),
        ([1, 2, 3, 4, 5, 6, 6], r"1 came more than once, such as \[6\]"),
        ([1, 2, 3, 4, 5, 6, 7], r"1 do not belong to it, such as \[7\]"),
    ],
)
def test_training_has_every_image_evaluated_once(
    trainers_evaluator, architecture, empty, ids, message
):
    evaluator = trainers_evaluator("MODEL.META_ARCHITECTURE", architecture)
    for image_id in ids:
        evaluator.process([{"image_id": image_id}], [empty()])
    with pytest.raises(ValueError, match=message):
        evaluator.evaluate()


@pytest.mark.parametrize("limit", [3, 110])
def test_as_many_detections_count_as_the_config_says(trainers_evaluator, limit):
    """The right box is the worst of 4, and of 111: one more than the limit, or one too many."""
    evaluator = trainers_evaluator("TEST.DETECTIONS_PER_IMAGE", str(limit))
    name, box = tiny_training.PICTURES[0][0]
    index = MetadataCatalog.get("miniature_ovd_val_all").thing_classes.index(name)
    for number, expected in ((limit - 1, 1), (limit, 0)):
        evaluator.reset()
        found = [(index, (1, 1, 3, 3), 0.9)] * number + [(index, box, 0.1)]
        for image_id in range(1, 7):
            output = detections(found if image_id == 1 else [])
            evaluator.process([{"image_id": image_id}], [output])
        assert (evaluator.evaluate()["bbox"][f"AP50-{name}"] > 0) == expected


# ------------------------------------------------------------------------------ datasets


def test_images_may_have_names_for_numbers(tmp_path):
    name = register(tmp_path, [[("wolf", BOX)], [("cat", LARGE)]])
    path = tmp_path / f"{name}.json"
    content = json.loads(path.read_text())
    for entry, key in (
        *((each, "id") for each in content["images"]),
        *((each, "image_id") for each in content["annotations"]),
    ):
        entry[key] = f"picture {entry[key]}"
    path.write_text(json.dumps(content))
    evaluator = SplitCOCOEvaluator(name, distributed=False)
    for number, found in ((1, [("wolf", BOX, 0.9)]), (2, [])):
        evaluator.process([{"image_id": f"picture {number}"}], [detections(found)])
    assert evaluator.evaluate()["bbox"]["all/AP50"] == pytest.approx(50)


def test_a_dataset_that_does_not_fit_is_named(tmp_path):
    name = register(tmp_path, [[]], vocabulary=("wolf", "cat"))
    MetadataCatalog.get(name).thing_classes.append("unicorn")
    with pytest.raises(ValueError, match=r"\.json.*unicorn.*wolf"):
        SplitCOCOEvaluator(name)
    MetadataCatalog.get(name).federated = True
    with pytest.raises(ValueError, match="federated"):
        SplitCOCOEvaluator(name)
