"""faster-coco-eval against pycocotools, called as its own documentation calls it, on hard cases;
and that each image is evaluated once."""

import contextlib
import copy
import io

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from hierkd.evaluation.coco_eval import check_each_image_once, choose_library

CATEGORIES = (3, 17, 18, 90)  # gaps; the last has no ground truth
GRID = 16  # px: boxes on a coarse grid have equal IoUs, and IoUs exactly at the thresholds
COARSE_SCORES = (0.25, 0.5, 0.75)
CROWDED = 0.2


def random_problem(rng):
    """Boxes with ties of every kind, crowds, and images without one or the other or both."""
    images = [{"id": int(i)} for i in rng.permutation(np.arange(1, 60))[: rng.integers(1, 12)]]
    truth, found = [], []
    with_ties = rng.random() < 0.7
    for image in images:
        for _ in range(rng.integers(0, 6) if rng.random() < 0.8 else 0):
            box = random_box(rng, with_ties)
            truth.append(
                {
                    "id": len(truth) + 1,
                    "image_id": image["id"],
                    "category_id": int(rng.choice(CATEGORIES[:-1])),
                    "bbox": box,
                    # COCO's area is the mask's. Now and then exactly a border of two ranges.
                    "area": 1024.0 if rng.random() < 0.1 else box[2] * box[3] * rng.uniform(0.3, 1),
                    "iscrowd": int(rng.random() < CROWDED),
                }
            )
        for _ in range(rng.integers(0, 30) if rng.random() < 0.8 else 0):
            near = [each for each in truth if each["image_id"] == image["id"]]
            copied = near and rng.random() < 0.5
            found.append(
                {
                    "image_id": image["id"],
                    "category_id": int(rng.choice(CATEGORIES)),
                    "bbox": list(rng.choice(near)["bbox"])
                    if copied
                    else random_box(rng, with_ties),
                    "score": float(rng.choice(COARSE_SCORES) if with_ties else rng.random()),
                }
            )
    rng.shuffle(found)
    categories = [{"id": number, "name": str(number)} for number in CATEGORIES]
    return {"images": images, "annotations": truth, "categories": categories}, found


def random_box(rng, on_grid):
    if on_grid:
        return [float(GRID * n) for n in (*rng.integers(0, 5, size=2), *rng.integers(1, 9, size=2))]
    return [*rng.uniform(0, 80, size=2).tolist(), *rng.uniform(0.5, 130, size=2).tolist()]


def by_pycocotools(dataset, found, img_ids, max_dets):
    """The documented way: ``loadRes``, then COCOeval."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy({**dataset, "info": {}})
        truth.createIndex()
        run = COCOeval(truth, truth.loadRes(copy.deepcopy(found)), "bbox")
        run.params.imgIds, run.params.maxDets = img_ids, max_dets
        run.evaluate()
        run.accumulate()
    return run.eval


def as_detections(found):
    return [
        {**each, "id": number, "area": each["bbox"][2] * each["bbox"][3], "iscrowd": 0}
        for number, each in enumerate(found, start=1)
    ]


def by_library(library, dataset, found, img_ids, max_dets, **parameters):
    dataset = copy.deepcopy(dataset)
    run = library.run(
        library.index(dataset, dataset["annotations"]),
        library.index(dataset, as_detections(found)),
        imgIds=img_ids,
        maxDets=max_dets,
        **parameters,
    )
    return run.eval


def fast_library():
    library = choose_library([1, 2])
    assert library.name.startswith("faster-coco-eval")
    return library


@pytest.mark.parametrize("seed", range(36))
def test_every_number_of_every_class_is_that_of_pycocotools(seed):
    rng = np.random.default_rng(seed)
    dataset, found = random_problem(rng)
    while not found:  # pycocotools refuses an empty list of results
        dataset, found = random_problem(rng)
    ids = [image["id"] for image in dataset["images"]]
    subset = [i for i in ids if rng.random() < 0.6] if seed % 3 == 0 else ids
    max_dets = [[1, 10, 100], [1, 10, 1], [1, 10, 4], [1, 10, 300]][seed % 4]
    expected = by_pycocotools(dataset, found, subset, max_dets)
    actual = by_library(fast_library(), dataset, found, subset, max_dets)
    for quantity in ("precision", "recall", "scores"):
        values = np.asarray(actual[quantity])
        assert values.shape == expected[quantity].shape
        np.testing.assert_allclose(values, expected[quantity], rtol=0, atol=1e-12, err_msg=quantity)


@pytest.mark.parametrize("use_fast_impl", [True, False])
def test_no_detections_are_no_error(use_fast_impl):
    dataset, _ = random_problem(np.random.default_rng(3))
    ids = [image["id"] for image in dataset["images"]]
    library = choose_library(ids, use_fast_impl=use_fast_impl)
    result = by_library(library, dataset, [], ids, [1, 10, 100])
    with_truth = {a["category_id"] for a in dataset["annotations"] if not a["iscrowd"]}
    for k, category in enumerate(CATEGORIES):
        assert set(np.unique(result["recall"][:, k, 0, :])) == {
            0.0 if category in with_truth else -1
        }


def test_classes_and_images_that_are_not_asked_for_take_no_part():
    """One class alone has the figures it has among all."""
    dataset, found = random_problem(np.random.default_rng(11))
    ids = [image["id"] for image in dataset["images"]]
    library = fast_library()
    every = by_library(library, dataset, found, ids, [1, 10, 100])
    alone = by_library(library, dataset, found, ids, [1, 10, 100], catIds=[CATEGORIES[1]])
    np.testing.assert_array_equal(
        np.asarray(every["precision"])[:, :, 1], np.asarray(alone["precision"])[:, :, 0]
    )


def test_images_with_names_for_numbers_are_for_pycocotools():
    assert choose_library(["a", "b"]).run_class is COCOeval
    assert choose_library([1, 2], use_fast_impl=False).run_class is COCOeval


# ------------------------------------------------------------------------------ completeness


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize(
    ("seen", "missing", "message"),
    [
        ([3, 1, "b", 2], False, ""),
        ([3], True, r"'photos' has 4 images.* 3 are missing, such as \[1, 2, 'b'\]$"),
        ([1, "b", 1, "b", 2, 3], False, r"once: 2 came more than once, such as \[1, 'b'\]$"),
        ([1, 1, 2, 3], True, r"1 are missing, such as \['b'\]; 1 came more than once"),
    ],
)
def test_each_image_once(seen, missing, message, complete):
    expected = {1, 2, 3, "b"}
    repeated = len(seen) > len(set(seen))
    if repeated or (missing and complete):
        with pytest.raises(
            ValueError, match=message if complete else "came more than once|missing"
        ):
            check_each_image_once(iter(seen), expected, "photos", complete=complete)
    else:
        check_each_image_once(iter(seen), expected, "photos", complete=complete)
