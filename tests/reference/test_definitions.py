"""The code against definitions written independently of it, over many random cases.

``make test`` tries a few dozen cases of each property, ``make test-slow`` thousands of the same.
"""

import contextlib
import functools
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from fake_teacher import FakeTeacher
from hierkd.data.coco import register_ovd_dataset
from hierkd.evaluation.split_coco_evaluation import SplitCOCOEvaluator
from hierkd.files import write_json_atomically
from hierkd.modeling.atss import ATSSMatcher
from hierkd.modeling.detector import DensePredictions, HierKD
from hierkd.modeling.detector_settings import IKD, DetectionSettings, InferenceSettings
from hierkd.modeling.distillation import PositivePoints, RegionPairs
from hierkd.modeling.head import ATSSHead
from hierkd.modeling.losses import (
    box_iou_targets,
    embedding_l1_loss,
    embedding_l2_loss,
    image_caption_contrastive_loss,
    quality_loss,
    softmax_focal_loss,
    weighted_giou_loss,
)
from hierkd.modeling.mlca import MLCA
from hierkd.modeling.text_classifier import TextClassifier
from reference import definitions

SEEDS = st.integers(0, 2**32 - 1)


def random_boxes(rng, n, size=100.0):
    corner = rng.uniform(0, size * 0.7, (n, 2))
    return np.concatenate([corner, corner + rng.uniform(1, size * 0.6, (n, 2))], axis=1)


def units(rng, *shape):
    rows = rng.standard_normal(shape)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def close(found, expected, tolerance=1e-9):
    assert math.isclose(float(found), expected, rel_tol=tolerance, abs_tol=tolerance)


def assert_slope(function, x, value_of, rng):
    """One random coordinate of autograd's gradient against a difference of the definition.

    Args:
        function: of the code, from a float64 tensor to a scalar.
        x: where, an array.
        value_of: the definition, of nested lists.
        rng: chooses the coordinate.
    """
    leaf = torch.tensor(x, requires_grad=True)
    function(leaf).backward()
    place = tuple(rng.integers(0, n) for n in x.shape)
    step = np.zeros_like(x)
    step[place] = 1e-6
    slope = (value_of((x + step).tolist()) - value_of((x - step).tolist())) / 2e-6
    assert math.isclose(leaf.grad[place].item(), slope, rel_tol=1e-4, abs_tol=1e-6)


# ------------------------------------------------------------------------------------ assignment


@st.composite
def scenes(draw):
    """Objects on a grid of quarter pixels, over one to four levels of a picture."""
    strides = (8, 16, 32, 64)[: draw(st.integers(1, 4))]
    height, width = draw(st.integers(1, 7)) * 8, draw(st.integers(1, 7)) * 8
    scale = draw(st.sampled_from([2, 4, 8]))
    quarters = st.integers(-40, 4 * max(height, width))
    objects = []
    for _ in range(draw(st.integers(0, 5))):
        x, y = draw(quarters), draw(quarters)
        w, h = draw(st.integers(2, 4 * width + 8)), draw(st.integers(2, 4 * height + 8))
        objects.append(tuple(Fraction(v, 4) for v in (x, y, x + w, y + h)))
    if objects and draw(st.booleans()):
        objects.append(draw(st.sampled_from(objects)))  # a duplicate: a tie of owners
    levels = [
        [
            tuple(Fraction(v) for v in (x - r, y - r, x + r, y + r))
            for y in range(0, height, stride)
            for x in range(0, width, stride)
            for r in [stride * scale // 2]
        ]
        for stride in strides
    ]
    return objects, levels, draw(st.sampled_from([1, 2, 3, 5, 9, 100]))


def check_assignment(scene):
    objects, levels, k = scene
    try:
        expected = definitions.atss(objects, levels, k)
    except definitions.UndeterminedError:
        assume(False)
    rows = torch.tensor([[float(v) for v in box] for box in objects]).reshape(-1, 4)
    anchors = [Boxes(torch.tensor([[float(v) for v in a] for a in level])) for level in levels]
    matches, labels = ATSSMatcher(k)(Boxes(rows), anchors)
    found = [m if label else None for m, label in zip(matches.tolist(), labels.tolist(), strict=1)]
    assert len(found) == len(expected)
    for number, (owner, allowed) in enumerate(zip(found, expected, strict=True)):
        assert (owner in allowed) if allowed else owner is None, (number, owner, allowed)


# ---------------------------------------------------------------------------------------- losses


def check_focal(seed, n, classes, gamma, alpha, spread):
    rng = np.random.default_rng(seed)
    rows, labels = spread * rng.standard_normal((n, classes + 1)), rng.integers(0, classes + 1, n)

    def code(x):
        return softmax_focal_loss(x, torch.tensor(labels), gamma=gamma, alpha=alpha)

    def definition(x):
        return definitions.focal(x, labels.tolist(), gamma, alpha)

    close(code(torch.tensor(rows)), definition(rows.tolist()))
    if n and (gamma == 0 or gamma >= 1):
        assert_slope(code, rows, definition, rng)


def check_boxes(seed, n, touching):
    rng = np.random.default_rng(seed)
    objects = random_boxes(rng, n)
    predictions = objects + rng.uniform(-4, 4, (n, 4)) if touching else random_boxes(rng, n)
    predictions[:, 2:] = np.maximum(predictions[:, 2:], predictions[:, :2] + 0.5)
    weights = [
        definitions.iou(p, o) for p, o in zip(predictions.tolist(), objects.tolist(), strict=True)
    ]
    pred, gt = torch.tensor(predictions), torch.tensor(objects)
    targets = box_iou_targets(pred, gt)
    # detectron2's Boxes are float32
    np.testing.assert_allclose(targets.numpy(), np.array(weights), atol=2e-5)
    weights_64 = torch.tensor(weights, dtype=torch.float64)

    def code(x):
        return weighted_giou_loss(x, gt, weights_64)

    def definition(x):
        return definitions.weighted_giou(x, objects.tolist(), weights)

    close(code(pred), definition(predictions.tolist()), 1e-6)  # fvcore adds 1e-7 to an area
    if n:
        assert_slope(code, predictions, definition, rng)
    scores = 6 * rng.standard_normal(n)

    def code_of_quality(x):
        return quality_loss(x, weights_64)

    def definition_of_quality(x):
        return definitions.binary_cross_entropy(x, weights)

    close(code_of_quality(torch.tensor(scores)), definition_of_quality(scores.tolist()))
    if n:
        assert_slope(code_of_quality, scores, definition_of_quality, rng)


def check_distances(seed, n, size):
    rng = np.random.default_rng(seed)
    student, teacher = units(rng, n, size), units(rng, n, size)
    for norm, code in ((1, embedding_l1_loss), (2, embedding_l2_loss)):

        def definition(x, norm=norm):
            return definitions.embedding_distance(x, teacher.tolist(), norm)

        def loss(x, code=code):
            return code(x, torch.tensor(teacher))

        close(loss(torch.tensor(student)), definition(student.tolist()))
        if n:
            assert_slope(loss, student, definition, rng)


def check_match(seed, n, size, grid, pooling, heights, widths):
    rng = np.random.default_rng(seed)
    shapes = list(zip(heights, widths, strict=False))
    maps = [rng.standard_normal((n, size, h, w)) for h, w in shapes]
    captions = units(rng, n, size)
    model = MLCA(grid_size=grid, pooling=pooling, logit_scale=7.0).double()
    scores = model([torch.tensor(m) for m in maps], torch.tensor(captions))
    images = [definitions.patches([m[i].tolist() for m in maps], grid, pooling) for i in range(n)]
    expected = [
        [definitions.match_score(image, caption, 7.0) for caption in captions.tolist()]
        for image in images
    ]
    np.testing.assert_allclose(scores.detach().numpy(), np.array(expected), atol=1e-9)
    terms = image_caption_contrastive_loss(scores)
    for term, value in zip(terms, definitions.contrast(expected), strict=True):
        close(term, value)

    def code(x):
        return sum(image_caption_contrastive_loss(x))

    def definition(x):
        return sum(definitions.contrast(x))

    assert_slope(code, np.array(expected), definition, rng)


def make_detector(loss_type="l1"):
    """A HierKD without a backbone worth the name: its losses and its inference are called alone."""
    torch.manual_seed(0)
    model = HierKD(
        backbone=torch.nn.Conv2d(3, 4, 1),
        head=ATSSHead(in_channels=4, embed_dim=5, num_levels=1, num_convs=1, norm="BN"),
        head_in_features=["p3"],
        text_classifier=TextClassifier(torch.randn(5)),
        anchor_generator=DefaultAnchorGenerator(
            sizes=[[64]], aspect_ratios=[[1.0]], strides=[8], offset=0.0
        ),
        box2box_transform=Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0)),
        anchor_matcher=ATSSMatcher(),
        teacher=FakeTeacher(5),
        detection=DetectionSettings(learn_cls_loss_weight=False, cls_loss_weight=1.5),
        inference=InferenceSettings(),
        ikd=IKD(loss_weight=0.7, loss_type=loss_type),
        mlca=MLCA(),
        gkd_loss_weight=0.3,
        vocabulary=("cat", "dog", "elk"),
        pixel_mean=[0.0] * 3,
        pixel_std=[1.0] * 3,
    )
    return model.double()


def check_all_losses(seed, images, points, positives, regions, loss_type):
    """Eq. 6: every loss of a step with its weight and its normaliser."""
    rng = np.random.default_rng(seed)
    model = make_detector(loss_type)
    classes = model.text_classifier.num_classes
    embeddings, qualities = units(rng, images, points, 5), rng.standard_normal((images, points))
    labels = rng.choice([-1, classes], size=images * points)
    places = rng.permutation(images * points)[:positives]
    labels[places] = rng.integers(0, classes, len(places))
    objects = random_boxes(rng, len(places))
    predicted = objects + rng.uniform(-0.4, 0.4, objects.shape)
    ious = [definitions.iou(a, b) for a, b in zip(predicted.tolist(), objects.tolist(), strict=1)]
    student, teacher = units(rng, regions, 5), units(rng, regions, 5)
    scores = rng.standard_normal((images, images))
    image_idxs, point_idxs = np.divmod(places, points)
    with EventStorage():
        found = model.losses(
            DensePredictions(
                torch.tensor(embeddings),
                torch.zeros(images, points, 4).double(),
                torch.tensor(qualities),
            ),
            Boxes(torch.zeros(points, 4)),
            torch.tensor(labels).view(images, points),
            PositivePoints(
                torch.tensor(image_idxs),
                torch.tensor(point_idxs),
                torch.tensor(predicted),
                torch.tensor(objects),
                torch.zeros(len(places), dtype=torch.int64),
                torch.tensor(ious, dtype=torch.float64),
            ),
            RegionPairs(
                torch.tensor(student), torch.tensor(teacher), torch.zeros(regions).long()
            ),
            torch.tensor(scores),
        )  # fmt: skip
    classifier = model.text_classifier
    texts = classifier.text_embeddings.tolist()
    background = classifier.background_embedding.tolist()
    sampled = [
        (definitions.logits(e, texts, background, float(classifier.logit_scale)), label)
        for e, label in zip(embeddings.reshape(-1, 5).tolist(), labels.tolist(), strict=True)
        if label >= 0
    ]
    rows, right = [row for row, _ in sampled], [label for _, label in sampled]
    num_positive, total_iou = max(len(places), 1), max(sum(ious), 1.0)
    quality = definitions.binary_cross_entropy(qualities.flatten()[places].tolist(), ious)
    giou = definitions.weighted_giou(predicted.tolist(), objects.tolist(), ious)
    norm = 1 if loss_type == "l1" else 2
    distance = definitions.embedding_distance(student.tolist(), teacher.tolist(), norm)
    by_image, by_caption = definitions.contrast(scores.tolist())
    expected = {
        "loss_cls": 1.5 * definitions.focal(rows, right, 2.0, 0.25) / num_positive,
        "loss_box_reg": 2.0 * giou / total_iou,
        "loss_iou": quality / num_positive,
        "loss_ikd": 0.7 * distance / max(regions, 1),
        "loss_gkd_image": 0.3 * by_image,
        "loss_gkd_caption": 0.3 * by_caption,
    }
    assert set(found) == set(expected)
    for name, value in expected.items():
        close(found[name], value, 1e-6)


# ------------------------------------------------------------------------------------- inference


def check_detections(seed, boxes, classes, pairs, limit, threshold):
    rng = np.random.default_rng(seed)
    corners = random_boxes(rng, boxes).astype(np.float32)
    probabilities = rng.dirichlet(np.ones(classes + 1), boxes)[:, :classes].astype(np.float32)
    qualities = rng.uniform(0, 1, boxes).astype(np.float32)
    overlaps = [definitions.iou(a, b) for a, b in itertools.combinations(corners.tolist(), 2)]
    assume(all(abs(overlap - 0.4) > 1e-4 for overlap in overlaps))
    scores = np.sort((probabilities * qualities[:, None]).flatten())
    assume(len(scores) < 2 or (np.diff(scores) > 1e-7).all())
    options = {"score_thresh": threshold, "topk_pairs": pairs}
    settings_ = InferenceSettings(nms_thresh=0.4, max_detections=limit, **options)
    model = DETECTOR()
    model.inference_settings = settings_
    arrays = map(torch.from_numpy, (corners, probabilities, qualities))
    found = model.detect_classes(*arrays, (200, 200))
    expected = definitions.detections(
        corners.tolist(), probabilities.tolist(), qualities.tolist(), nms=0.4, limit=limit,
        **options,
    )  # fmt: skip
    assert found.pred_classes.tolist() == [number for _, _, number in expected]
    np.testing.assert_allclose(found.scores, [score for score, _, _ in expected], rtol=1e-5)
    boxes_of = np.array([corners[row] for _, row, _ in expected]).reshape(-1, 4)
    np.testing.assert_array_equal(found.pred_boxes.tensor, boxes_of)


DETECTOR = functools.cache(make_detector)  # one for all cases, with the settings of each


# ------------------------------------------------------------------------------------ evaluation

IDS = {"ant": 3, "bee": 17, "cow": 18, "dog": 90, "elk": 91}  # gaps, as COCO's
BASE, NOVEL = ("ant", "cow", "elk"), ("bee", "dog")
_SERIAL = itertools.count()


def random_problem(rng, images, on_grid):
    """Ground truth and detections; on a grid there are ties of scores and of IoUs."""

    def box():
        if on_grid:
            return [float(16 * v) for v in (*rng.integers(0, 5, 2), *rng.integers(1, 9, 2))]
        return [*rng.uniform(0, 80, 2).tolist(), *rng.uniform(0.5, 130, 2).tolist()]

    truth, found = [], []
    image_ids = (rng.permutation(50)[:images] + 1).tolist()
    for image_id in image_ids:
        for _ in range(rng.integers(0, 7)):
            xywh = box()
            truth.append(
                {
                    "id": len(truth) + 1,
                    "image_id": image_id,
                    "category_id": int(rng.choice(list(IDS.values())[:-1])),  # the last has none
                    "bbox": xywh,
                    "area": 1024.0 if rng.random() < 0.1 else xywh[2] * xywh[3] * rng.random(),
                    "iscrowd": int(rng.random() < 0.2),
                }
            )
        here = [t["bbox"] for t in truth if t["image_id"] == image_id]
        for _ in range(rng.integers(0, 20)):
            copied = here and rng.random() < 0.6
            near = np.array(here[rng.integers(0, len(here))]) if copied else None
            if copied and not on_grid:  # IoUs of about 0.4 to 1
                near = near + rng.uniform(-0.2, 0.2, 4) * near[[2, 3, 2, 3]]
            found.append(
                {
                    "image_id": image_id,
                    "category_id": int(rng.integers(0, len(IDS))),  # contiguous
                    "bbox": near.tolist() if copied else box(),
                    "score": float(rng.choice([0.25, 0.5, 0.75]) if on_grid else rng.random()),
                }
            )
    return image_ids, truth, found


@contextlib.contextmanager
def registered(folder, image_ids, truth):
    name = f"reference_{next(_SERIAL)}"
    json_file = folder / "truth.json"
    content = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "height": 300, "width": 300} for i in image_ids
        ],
        "annotations": truth,
        "categories": [{"id": number, "name": each} for each, number in IDS.items()],
    }  # fmt: skip
    write_json_atomically(json_file, content)
    register_ovd_dataset(
        name,
        json_file=str(json_file),
        image_root=str(folder),
        vocabulary=tuple(IDS),
        base_classes=BASE,
        novel_classes=NOVEL,
    )
    try:
        yield name
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def check_evaluation(folder, seed, images, on_grid, max_dets):
    rng = np.random.default_rng(seed)
    image_ids, truth, found = random_problem(rng, images, on_grid)
    with registered(folder, image_ids, truth) as name:
        evaluator = SplitCOCOEvaluator(name, distributed=False, max_dets_per_image=max_dets)
        evaluator.reset()
        evaluator._predictions = [
            {"image_id": i, "instances": [dict(f) for f in found if f["image_id"] == i]}
            for i in image_ids
        ]
        results = evaluator.evaluate()["bbox"]
    expected = {}
    for index, (category, number) in enumerate(IDS.items()):
        of_class = [t for t in truth if t["category_id"] == number]
        of_index = [f for f in found if f["category_id"] == index]
        for metric, (thresholds, areas) in METRICS.items():
            figures = [
                definitions.coco_class(
                    of_class, of_index, image_ids, threshold=t,
                    area_range=definitions.AREAS[areas], max_dets=max_dets,
                )[metric.startswith("AR")]
                for t in thresholds
            ]  # fmt: skip
            expected[category, metric] = None if None in figures else sum(figures) / len(figures)
    for group, names in {"base": BASE, "novel": NOVEL, "all": tuple(IDS)}.items():
        for metric in METRICS:
            values = [v for n in names if (v := expected[n, metric]) is not None]
            figure = results[f"{group}/{metric}"]
            if values:
                close(figure / 100, sum(values) / len(values))
            else:
                assert math.isnan(figure)


METRICS = {
    "AP": (definitions.THRESHOLDS, "all"),
    "AP50": ([0.5], "all"),
    "AP75": ([0.75], "all"),
    "APs": (definitions.THRESHOLDS, "small"),
    "APm": (definitions.THRESHOLDS, "medium"),
    "APl": (definitions.THRESHOLDS, "large"),
    "AR50": ([0.5], "all"),
}


# ---------------------------------------------------------------------------- how many are tried

SIZES = st.integers(0, 8)
# property -> (its check, what is varied, cases in `make test`, cases in `make test-slow`)
PROPERTIES = {
    "assignment": (check_assignment, {"scene": scenes()}, 40, 2000),
    "focal": (
        check_focal,
        {"seed": SEEDS, "n": SIZES, "classes": st.integers(1, 6),
         "gamma": st.sampled_from([0.0, 0.5, 1.0, 2.0, 5.0]),
         "alpha": st.sampled_from([0.25, 1.0]), "spread": st.sampled_from([0.1, 1.0, 10.0])},
        60, 5000,
    ),
    "boxes": (check_boxes, {"seed": SEEDS, "n": SIZES, "touching": st.booleans()}, 60, 5000),
    "distances": (
        check_distances, {"seed": SEEDS, "n": SIZES, "size": st.integers(1, 9)}, 60, 3000
    ),
    "match": (
        check_match,
        {"seed": SEEDS, "n": st.integers(1, 4), "size": st.integers(2, 6),
         "grid": st.integers(1, 4), "pooling": st.sampled_from(["max", "avg"]),
         "heights": st.lists(st.integers(1, 9), min_size=1, max_size=3),
         "widths": st.lists(st.integers(1, 9), min_size=1, max_size=3)},
        60, 3000,
    ),
    "all losses": (
        check_all_losses,
        {"seed": SEEDS, "images": st.integers(1, 4), "points": st.integers(1, 12),
         "positives": SIZES, "regions": SIZES, "loss_type": st.sampled_from(["l1", "l2"])},
        25, 2000,
    ),
    "detections": (
        check_detections,
        {"seed": SEEDS, "boxes": st.integers(0, 14), "classes": st.integers(1, 5),
         "pairs": st.sampled_from([0, 5, 20, 3000]), "limit": st.sampled_from([1, 4, 100]),
         "threshold": st.sampled_from([0.0, 0.1, 0.4])},
        60, 3000,
    ),
}  # fmt: skip


def hold(check, varied, cases):
    @settings(
        max_examples=cases, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(**varied)
    def run(**case):
        check(**case)

    run()


@pytest.mark.parametrize("number", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", PROPERTIES)
def test_cases(name, number):
    check, varied, *cases = PROPERTIES[name]
    hold(check, varied, cases[number])


EVALUATION = {
    "seed": SEEDS, "images": st.integers(1, 7), "on_grid": st.booleans(),
    "max_dets": st.sampled_from([1, 3, 100]),
}  # fmt: skip


@pytest.mark.parametrize("cases", [12, pytest.param(1000, marks=pytest.mark.slow)])
def test_evaluation(tmp_path, cases):
    """The evaluator against COCO's definition."""
    hold(check_evaluation, {**EVALUATION, "folder": st.just(tmp_path)}, cases)
