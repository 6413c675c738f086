"""SplitCOCOEvaluator against figures computed by hand and against pycocotools class by class."""

import contextlib
import io
import itertools
import json
import logging
import math

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import launch
from detectron2.structures import Boxes, Instances
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from hierkd.evaluation.split_coco_evaluation import SplitCOCOEvaluator, nan_mean
from hierkd.training.launch import leave_groups

SIZE = 256
BASE, NOVEL = ("car", "dog"), ("cat", "umbrella")
# Deliberately not in base-then-novel order, and with gaps in the ids.
IDS = {"car": 3, "cat": 17, "dog": 18, "umbrella": 28}
SERIAL = itertools.count()


def register(tmp_path, images, *, vocabulary=tuple(IDS), base=BASE, novel=NOVEL, **category_ids):
    """Write ``images`` (a list of lists of (class, XYXY box)) as COCO JSON and register it."""
    ids = {**{name: IDS[name] for name in vocabulary if name in IDS}, **category_ids}
    annotations = []
    for image_id, objects in enumerate(images, start=1):
        for name, (x0, y0, x1, y1), *crowd in objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": ids[name],
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                    "iscrowd": int(bool(crowd)),
                }
            )
    content = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "height": SIZE, "width": SIZE}
            for i in range(1, len(images) + 1)
        ],
        "annotations": annotations,
        "categories": [{"id": ids[n], "name": n} for n in sorted(ids, key=ids.get)],
    }
    name = f"split_coco_evaluation_{next(SERIAL)}"
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps(content))
    DatasetCatalog.register(name, lambda: [])
    MetadataCatalog.get(name).set(
        json_file=str(path),
        evaluator_type="split_coco",
        thing_classes=list(vocabulary),
        base_classes=list(base),
        novel_classes=list(novel),
    )
    return name


def evaluate(name, detections, **kwargs):
    """``detections``: per image a list of (class, XYXY box, score); ``None`` skips the image."""
    vocabulary = MetadataCatalog.get(name).thing_classes
    evaluator = SplitCOCOEvaluator(name, distributed=False, **kwargs)
    evaluator.reset()
    for image_id, found in enumerate(detections, start=1):
        if found is None:
            continue
        instances = Instances((SIZE, SIZE))
        boxes = torch.tensor([box for _, box, _ in found], dtype=torch.float32)
        instances.pred_boxes = Boxes(boxes.reshape(-1, 4))
        instances.scores = torch.tensor([score for *_, score in found])
        instances.pred_classes = torch.tensor(
            [vocabulary.index(c) for c, _, _ in found], dtype=torch.int64
        )
        evaluator.process([{"image_id": image_id}], [{"instances": instances}])
    return evaluator.evaluate()["bbox"]


def random_scene(seed, num_images=12):
    """Ground truth and imperfect detections of it: shifts, wrong classes, misses, duplicates."""
    rng = np.random.default_rng(seed)
    images, detections = [], []
    for _ in range(num_images):
        objects, found = [], []
        for _ in range(rng.integers(0, 5)):
            x0, y0 = rng.integers(0, 120, size=2)
            width, height = rng.integers(12, 130, size=2)
            name = str(rng.choice(list(IDS)))
            box = (int(x0), int(y0), int(x0 + width), int(y0 + height))
            objects.append((name, box))
            for _ in range(rng.integers(0, 3)):
                jitter = rng.normal(scale=0.08 * min(width, height), size=4)
                guess = str(rng.choice(list(IDS))) if rng.random() < 0.3 else name
                shifted = (np.array(box) + jitter).tolist()
                found.append((guess, shifted, float(rng.random())))
        images.append(objects)
        detections.append(found)
    return images, detections


def test_perfect_detections_score_one_hundred(tmp_path):
    images = [
        [("car", (0, 0, 20, 20)), ("cat", (30, 30, 90, 90))],
        [("dog", (10, 10, 120, 120)), ("umbrella", (100, 100, 200, 220))],
    ]
    name = register(tmp_path, images)
    results = evaluate(name, [[(c, b, 0.9) for c, b in objects] for objects in images])
    for group, metric in itertools.product(
        ("base", "novel", "all"), ("AP", "AP50", "AP75", "AR50")
    ):
        assert results[f"{group}/{metric}"] == pytest.approx(100.0)
    assert results["base/APs"] == pytest.approx(100.0)  # the 20-pixel car
    assert results["base/APl"] == pytest.approx(100.0)  # the 110-pixel dog
    assert math.isnan(results["novel/APs"])  # no small novel object
    assert math.isnan(results["base/APm"])


def test_average_precision_by_hand(tmp_path):
    """Two cars; detections ranked right, wrong, right: precision 1 to recall .5, then 2/3.

    COCO samples recall at 0, .01, ..., 1: 51 points at precision 1 and 50 at 2/3.
    """
    images = [[("car", (0, 0, 100, 100)), ("car", (120, 0, 220, 100))]]
    detections = [
        [
            ("car", (0, 0, 100, 100), 0.9),
            ("car", (0, 150, 60, 200), 0.8),
            ("car", (120, 0, 220, 100), 0.7),
        ]
    ]
    results = evaluate(register(tmp_path, images), detections)
    assert results["AP50-car"] == pytest.approx(100 * (51 + 50 * 2 / 3) / 101)
    assert results["base/AR50"] == pytest.approx(100.0)


def test_iou_decides_which_threshold_counts(tmp_path):
    """A box of IoU 0.6 counts at thresholds .50, .55 and .60: AP50 100, AP75 0, AP 30."""
    images = [[("cat", (0, 0, 100, 100))]]
    results = evaluate(register(tmp_path, images), [[("cat", (0, 0, 100, 60), 0.5)]])
    assert results["novel/AP50"] == pytest.approx(100.0)
    assert results["novel/AP75"] == 0.0
    assert results["novel/AP"] == pytest.approx(30.0)
    assert results["novel/AR50"] == pytest.approx(100.0)


def test_groups_are_means_over_their_classes(tmp_path):
    """car 100, dog 0, cat 100, umbrella without ground truth: base 50, novel 100, all 66.7."""
    images = [[("car", (0, 0, 50, 50)), ("dog", (60, 60, 120, 120)), ("cat", (0, 130, 60, 200))]]
    detections = [
        [
            ("car", (0, 0, 50, 50), 0.9),
            ("cat", (0, 130, 60, 200), 0.9),
            # Nothing to match: a false positive of a class without ground truth costs nothing.
            ("umbrella", (200, 200, 240, 240), 0.9),
        ]
    ]
    results = evaluate(register(tmp_path, images), detections)
    assert results["base/AP50"] == pytest.approx(50.0)
    assert results["novel/AP50"] == pytest.approx(100.0)
    assert results["all/AP50"] == pytest.approx(200 / 3)
    assert results["all/AR50"] == pytest.approx(200 / 3)
    assert math.isnan(results["AP50-umbrella"])
    assert results["AP50-dog"] == 0.0


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_agrees_with_pycocotools_run_class_by_class(tmp_path, seed):
    images, detections = random_scene(seed)
    name = register(tmp_path, images)
    results = evaluate(name, detections)

    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth = COCO(MetadataCatalog.get(name).json_file)
        found = ground_truth.loadRes(
            [
                {
                    "image_id": image_id,
                    "category_id": IDS[c],
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "score": score,
                }
                for image_id, per_image in enumerate(detections, start=1)
                for c, (x0, y0, x1, y1), score in per_image
            ]
        )
        stats, recalls = {}, {}
        for class_name, category_id in IDS.items():
            run = COCOeval(ground_truth, found, "bbox")
            run.params.catIds = [category_id]
            run.evaluate()
            run.accumulate()
            run.summarize()
            stats[class_name] = 100 * run.stats[:6]
            recalls[class_name] = 100 * run.eval["recall"][0, 0, 0, 2]
    for group, names in {"base": BASE, "novel": NOVEL, "all": BASE + NOVEL}.items():
        for index, metric in enumerate(("AP", "AP50", "AP75", "APs", "APm", "APl")):
            values = [stats[n][index] for n in names if stats[n][index] >= 0]
            expected = np.mean(values) if values else math.nan
            assert results[f"{group}/{metric}"] == pytest.approx(expected, abs=1e-4, nan_ok=True)
        assert results[f"{group}/AR50"] == pytest.approx(
            np.mean([recalls[n] for n in names]), abs=1e-4
        )
    assert 0 < results["all/AP50"] < 100  # the scene says something


@pytest.mark.parametrize("max_dets", [100, 2])
def test_either_library_gives_the_same_figures_and_is_named(tmp_path, caplog, max_dets):
    images, detections = random_scene(5)
    name = register(tmp_path, images)
    results = []
    for library, use_fast_impl in (("faster-coco-eval", True), ("pycocotools", False)):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="hierkd"):
            results.append(
                evaluate(name, detections, use_fast_impl=use_fast_impl, max_dets_per_image=max_dets)
            )
        assert f"{name} (percent; {library} " in caplog.text
    assert results[0] == pytest.approx(results[1], abs=1e-9, nan_ok=True)


def test_some_images_alone_count_and_evaluating_again_changes_nothing(tmp_path):
    """The second image has a miss: without it the figure is 100."""
    images = [[("car", (0, 0, 50, 50))], [("car", (0, 0, 50, 50))]]
    evaluator = SplitCOCOEvaluator(register(tmp_path, images), distributed=False)
    evaluator.reset()
    instances = Instances((SIZE, SIZE))
    instances.pred_boxes = Boxes(torch.tensor([[0.0, 0.0, 50.0, 50.0]]))
    instances.scores = torch.tensor([0.9])
    instances.pred_classes = torch.tensor([0])
    evaluator.process([{"image_id": 1}], [{"instances": instances}])
    for _ in range(2):
        assert evaluator.evaluate()["bbox"]["base/AR50"] == pytest.approx(50.0)
        assert evaluator.evaluate(img_ids=[1])["bbox"]["base/AR50"] == pytest.approx(100.0)


@pytest.mark.parametrize(
    ("image_id", "index", "found"), [(7, 0, r"such as \[7\]"), (1, 4, "detection of class 4")]
)
def test_detections_of_unknown_images_and_classes_are_named(tmp_path, image_id, index, found):
    evaluator = SplitCOCOEvaluator(register(tmp_path, [[]]), distributed=False)
    evaluator.reset()
    instances = Instances((SIZE, SIZE))
    instances.pred_boxes = Boxes(torch.tensor([[0.0, 0.0, 50.0, 50.0]]))
    instances.scores = torch.tensor([0.9])
    instances.pred_classes = torch.tensor([index])
    evaluator.process([{"image_id": image_id}], [{"instances": instances}])
    with pytest.raises(ValueError, match=found):
        evaluator.evaluate()


def test_all_equals_cocos_own_summary(tmp_path):
    """COCO's AP over all classes is the mean of the per-class APs, by another route."""
    images, detections = random_scene(7)
    name = register(tmp_path, images)
    results = evaluate(name, detections, output_dir=str(tmp_path / "out"))
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth = COCO(MetadataCatalog.get(name).json_file)
        dumped = ground_truth.loadRes(str(tmp_path / "out" / "coco_instances_results.json"))
        run = COCOeval(ground_truth, dumped, "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    for metric, value in zip(("AP", "AP50", "AP75", "APs", "APm", "APl"), run.stats, strict=False):
        assert results[f"all/{metric}"] == pytest.approx(100 * value)


def test_class_restricted_dataset_reports_its_group_alone(tmp_path):
    images = [[("cat", (0, 0, 50, 50))], [("umbrella", (0, 0, 60, 60))]]
    name = register(tmp_path, images, vocabulary=("cat", "umbrella"))
    results = evaluate(name, [[("cat", (0, 0, 50, 50), 0.9)], []])
    groups = {key.split("/")[0] for key in results}
    assert groups == {"novel", "AP50-cat", "AP50-umbrella"}
    assert results["novel/AP50"] == pytest.approx(50.0)


def test_vocabulary_smaller_than_the_json(tmp_path):
    """A JSON may hold more categories than the vocabulary; they take no part."""
    images = [[("cat", (0, 0, 50, 50)), ("car", (100, 100, 150, 150))]]
    name = register(tmp_path, images, vocabulary=("cat", "umbrella"), car=IDS["car"])
    results = evaluate(name, [[("cat", (0, 0, 50, 50), 0.9)]])
    assert results["novel/AP50"] == pytest.approx(100.0)
    assert "AP50-car" not in results


def test_dataset_without_base_and_novel_reports_all(tmp_path):
    images = [[("cat", (0, 0, 50, 50))]]
    name = register(tmp_path, images, base=(), novel=())
    results = evaluate(name, [[("cat", (0, 0, 50, 50), 0.9)]])
    assert results["all/AP50"] == pytest.approx(100.0)
    assert not any(key.startswith(("base/", "novel/")) for key in results)


def test_classes_of_neither_group_do_not_enter_all(tmp_path):
    images = [[("cat", (0, 0, 50, 50)), ("dog", (60, 60, 99, 99)), ("car", (100, 100, 150, 150))]]
    name = register(tmp_path, images, base=("car",), novel=("cat",))
    found = [("cat", (0, 0, 50, 50), 0.9), ("car", (100, 100, 150, 150), 0.9)]
    results = evaluate(name, [found])
    assert results["AP50-dog"] == 0.0
    assert results["all/AP50"] == pytest.approx(100.0)


@pytest.mark.parametrize("detections", [[[], []], [None, None]])
def test_no_detections_at_all(tmp_path, detections, caplog):
    images = [[("car", (0, 0, 50, 50))], []]
    with caplog.at_level(logging.INFO):
        results = evaluate(register(tmp_path, images), detections)
    assert results["base/AP50"] == 0.0
    assert results["base/AR50"] == 0.0
    assert results["all/AP"] == 0.0
    assert math.isnan(results["novel/AP50"])
    assert results["AP50-car"] == 0.0
    assert "every class counts as missed" in caplog.text


def test_dataset_without_any_ground_truth(tmp_path):
    results = evaluate(register(tmp_path, [[], []]), [[("car", (0, 0, 9, 9), 0.5)], []])
    assert all(math.isnan(value) for value in results.values())


def test_image_without_ground_truth_still_counts_false_positives(tmp_path):
    images = [[("car", (0, 0, 50, 50))], []]
    right = ("car", (0, 0, 50, 50), 0.5)
    name = register(tmp_path, images)
    assert evaluate(name, [[right], []])["AP50-car"] == pytest.approx(100.0)
    false_positive = ("car", (0, 0, 50, 50), 0.9)
    assert evaluate(name, [[right], [false_positive]])["AP50-car"] == pytest.approx(50.0)


def test_crowd_regions_neither_help_nor_hurt(tmp_path):
    images = [[("car", (0, 0, 50, 50)), ("car", (100, 100, 200, 200), "crowd")]]
    found = [("car", (0, 0, 50, 50), 0.5), ("car", (110, 110, 150, 150), 0.9)]
    assert evaluate(register(tmp_path, images), [found])["AP50-car"] == pytest.approx(100.0)


def test_annotations_without_area_and_iscrowd(tmp_path):
    name = register(tmp_path, [[("car", (0, 0, 50, 50))]])
    path = MetadataCatalog.get(name).json_file
    with open(path) as file:
        content = json.load(file)
    for annotation in content["annotations"]:
        del annotation["area"], annotation["iscrowd"]
    with open(path, "w") as file:
        json.dump(content, file)
    results = evaluate(name, [[("car", (0, 0, 50, 50), 0.5)]])
    assert results["base/APm"] == pytest.approx(100.0)


def test_at_most_so_many_detections_per_image(tmp_path):
    """With one detection allowed, the better-scored one of two cars counts."""
    images = [[("car", (0, 0, 50, 50)), ("car", (100, 100, 200, 200))]]
    found = [("car", (0, 0, 50, 50), 0.9), ("car", (100, 100, 200, 200), 0.8)]
    name = register(tmp_path, images)
    assert evaluate(name, [found])["base/AR50"] == pytest.approx(100.0)
    assert evaluate(name, [found], max_dets_per_image=1)["base/AR50"] == pytest.approx(50.0)


def test_logs_one_table_and_prints_nothing(tmp_path, caplog, capsys):
    images = [[("car", (0, 0, 50, 50)), ("cat", (60, 60, 99, 99))]]
    with caplog.at_level(logging.INFO, logger="hierkd"):
        evaluate(register(tmp_path, images), [[("car", (0, 0, 50, 50), 0.9)]])
    (record,) = [r for r in caplog.records if r.name.startswith("hierkd")]
    rows = [line.split("|")[1].strip() for line in record.getMessage().splitlines()[1:]]
    assert rows[0] == "group"
    assert rows[2:] == ["base", "novel", "all"]
    assert capsys.readouterr().out == ""


def test_category_missing_from_json_is_named(tmp_path):
    name = register(tmp_path, [[]], vocabulary=("car", "cat"))
    MetadataCatalog.get(name).thing_classes.append("unicorn")
    with pytest.raises(ValueError, match=r"\.json.*unicorn.*car"):
        SplitCOCOEvaluator(name, distributed=False)


def test_disagreeing_category_ids_are_named(tmp_path):
    name = register(tmp_path, [[]], vocabulary=("car", "cat"))
    MetadataCatalog.get(name).thing_dataset_id_to_contiguous_id = {1: 0, 2: 1}
    with pytest.raises(ValueError, match=r"expected .*\{1: 0, 2: 1\}; found \{3: 0, 17: 1\}"):
        SplitCOCOEvaluator(name, distributed=False)


def test_dataset_without_vocabulary_is_named(tmp_path):
    name = register(tmp_path, [[]])
    metadata = MetadataCatalog.get(name)
    metadata.thing_classes.clear()
    with pytest.raises(ValueError, match=f"{name}.*thing_classes"):
        SplitCOCOEvaluator(name, distributed=False)


def test_nan_mean():
    assert nan_mean(np.array([1.0, math.nan, 3.0])) == 2.0
    assert math.isnan(nan_mean(np.array([math.nan])))
    assert math.isnan(nan_mean(np.array([])))


def _evaluate_in_one_of_two_processes(path, name, result_file):
    """Each process sees one of the two images; only the main one has the answer."""
    from detectron2.utils import comm

    MetadataCatalog.get(name).set(
        json_file=path,
        thing_classes=list(IDS),
        base_classes=list(BASE),
        novel_classes=list(NOVEL),
    )
    evaluator = SplitCOCOEvaluator(name)
    evaluator.reset()
    instances = Instances((SIZE, SIZE))
    instances.pred_boxes = Boxes(torch.tensor([[0.0, 0.0, 50.0, 50.0]]))
    instances.scores = torch.tensor([0.9])
    instances.pred_classes = torch.tensor([comm.get_rank()])  # car, cat
    evaluator.process([{"image_id": comm.get_rank() + 1}], [{"instances": instances}])
    results = evaluator.evaluate()
    if comm.is_main_process():
        with open(result_file, "w") as file:
            json.dump(results, file)
    elif results:
        raise AssertionError("only the main process may have results")
    comm.synchronize()
    leave_groups()


@pytest.mark.skipif(
    torch.cuda.device_count() == 1, reason="detectron2 gives each process a GPU if there is any"
)
def test_two_processes_gather_their_predictions(tmp_path):
    name = register(tmp_path, [[("car", (0, 0, 50, 50))], [("cat", (0, 0, 50, 50))]])
    path = MetadataCatalog.get(name).json_file
    result_file = tmp_path / "results.json"
    arguments = (path, f"{name}_child", str(result_file))
    launch(_evaluate_in_one_of_two_processes, 2, dist_url="auto", args=arguments)
    results = json.loads(result_file.read_text())["bbox"]
    assert results["base/AP50"] == pytest.approx(100.0)
    assert results["novel/AP50"] == pytest.approx(100.0)
