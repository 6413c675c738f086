"""The detector as a whole: losses in training, detections in inference, vocabularies."""

import copy
from typing import Any

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.utils.events import EventStorage

import hierkd.modeling.detector as meta_arch
from fake_teacher import FakeTeacher
from hierkd.load_config import load_config
from hierkd.modeling.detector import HierKD
from hierkd.modeling.losses import similarity_kl_loss

SIZE = 128
CLASSES = [f"thing {i}" for i in range(5)]
CONFIG = "configs/miniature/hierkd.yaml"
EVERY_POSITIVE = ("MODEL.IKD.IOU_THRESH", 0.0, "MODEL.IKD.MAX_CROPS_PER_IMAGE", 0)


@pytest.fixture(scope="module")
def base_config():
    small = ("MODEL.SLIM_RESNET.WIDTHS", "[8, 12, 16, 20]", "MODEL.FPN.OUT_CHANNELS", "32")
    return load_config(CONFIG, ["MODEL.DEVICE", "cpu", "DATASETS.TRAIN", "()", *small])


@pytest.fixture
def build(monkeypatch, base_config):
    """Builder of small detectors with a fake teacher; arguments are KEY, VALUE, ..."""

    def _build(*overrides: Any, vocabulary: list[str] = CLASSES) -> HierKD:
        cfg = base_config.clone()
        cfg.merge_from_list(list(overrides))
        teacher = FakeTeacher(cfg.MODEL.TEXT_CLASSIFIER.EMBED_DIM)
        monkeypatch.setattr(meta_arch, "build_teacher", lambda cfg: teacher)
        torch.manual_seed(0)
        model = build_model(cfg)
        if vocabulary:
            model.set_vocabulary(vocabulary)
        return model

    return _build


def sample(boxes: list[list[float]], classes: list[int] | None = None, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    instances = Instances((SIZE, SIZE))
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    labels = list(range(len(boxes))) if classes is None else classes
    instances.gt_classes = torch.tensor(labels, dtype=torch.int64)
    image = torch.randint(0, 256, (3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    caption = f"a picture number {seed}"
    return {"image": image, "instances": instances, "caption": caption}


def batch() -> list[dict]:
    return [
        sample([[10, 12, 70, 80], [60, 20, 120, 70]], seed=1),
        sample([[30, 30, 90, 95]], [3], seed=2),
        sample([], seed=3),
    ]


def train_losses(model: HierKD, inputs: list[dict], seed: int = 0) -> dict[str, torch.Tensor]:
    model.train()
    torch.manual_seed(seed)
    with EventStorage():
        return model(inputs)


def without_gradient(model: HierKD, losses: dict[str, torch.Tensor]) -> list[str]:
    sum(losses.values()).backward()
    return [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]


def distilled(model, inputs):
    """The positives and the pairs of one training step."""
    seen = []
    original = model.distill_regions
    model.distill_regions = lambda *args: seen.append((args[2], original(*args))) or seen[-1][1]
    train_losses(model, inputs)
    return seen[0]


# ---------------------------------------------------------------------------- losses


@pytest.mark.parametrize(
    ("ikd", "gkd", "quality", "extra"),
    [
        (0.0, 0.0, "iou", {"loss_iou"}),
        (0.1, 0.0, "iou", {"loss_iou", "loss_ikd"}),
        (0.0, 1.0, "centerness", {"loss_centerness", "loss_gkd_image", "loss_gkd_caption"}),
        (0.1, 1.0, "none", {"loss_ikd", "loss_gkd_image", "loss_gkd_caption"}),
    ],
)
def test_each_row_of_table_4_has_its_losses_and_trains_every_parameter(
    build, ikd, gkd, quality, extra
):
    model = build(
        *("MODEL.IKD.LOSS_WEIGHT", ikd, "MODEL.GKD.LOSS_WEIGHT", gkd),
        *("MODEL.ATSS.QUALITY", quality),
    )
    losses = train_losses(model, batch())
    assert set(losses) == {"loss_cls", "loss_box_reg"} | extra
    assert all(loss.isfinite() and loss > 0 for k, loss in losses.items() if k != "loss_ikd")
    assert without_gradient(model, losses) == []


def test_a_branch_that_is_off_builds_nothing_and_never_asks_the_teacher(build):
    model = build("MODEL.IKD.LOSS_WEIGHT", 0.0, "MODEL.GKD.LOSS_WEIGHT", 0.0)
    model.teacher.captions.clear()
    train_losses(model, batch())
    assert model.mlca is None
    assert model.ikd is None
    assert model.teacher.regions == []
    assert model.teacher.captions == []


def test_a_batch_without_any_box_still_gives_every_parameter_a_gradient(build):
    model = build()
    losses = train_losses(model, [sample([], seed=1), sample([], seed=2)])
    assert losses["loss_box_reg"] == losses["loss_iou"] == losses["loss_ikd"] == 0
    assert losses["loss_cls"] > 0
    assert without_gradient(model, losses) == []


def test_the_weights_of_eq_6_scale_their_losses_and_nothing_else(build):
    # IoU >= 0 makes every positive a distilled point, so that an untrained model has some
    one = build(
        *("MODEL.IKD.IOU_THRESH", 0.0, "MODEL.IKD.LOSS_WEIGHT", 0.05),
        *("MODEL.GKD.LOSS_WEIGHT", 0.5, "MODEL.ATSS.BOX_REG_LOSS_WEIGHT", 2.0),
    )
    two = build(
        *("MODEL.IKD.IOU_THRESH", 0.0, "MODEL.IKD.LOSS_WEIGHT", 0.1),
        *("MODEL.GKD.LOSS_WEIGHT", 1.5, "MODEL.ATSS.BOX_REG_LOSS_WEIGHT", 6.0),
    )
    a, b = train_losses(one, batch()), train_losses(two, batch())
    factors = {"loss_ikd": 2.0, "loss_gkd_image": 3.0, "loss_gkd_caption": 3.0, "loss_box_reg": 3.0}
    assert a["loss_ikd"] > 0
    for name, loss in a.items():
        torch.testing.assert_close(b[name], loss * factors.get(name, 1.0))


def test_the_learned_classification_weight(build):
    learned = build()
    fixed = build("MODEL.ATSS.LEARN_CLS_LOSS_WEIGHT", False)
    a, b = train_losses(learned, batch())["loss_cls"], train_losses(fixed, batch())["loss_cls"]
    torch.testing.assert_close(a, b * torch.tensor(-1.0).exp() + 1.0)
    assert fixed.cls_loss_log_weight is None


def test_all_positives_take_part_in_classification_whatever_the_negatives(build):
    """With no negative left, the loss depends on the positives alone."""
    few = build("MODEL.ATSS.NEGATIVE_AMOUNT", 1e-9)
    losses = train_losses(few, batch())["loss_cls"], train_losses(few, batch(), seed=1)["loss_cls"]
    assert losses[0] == losses[1]
    some = build("MODEL.ATSS.NEGATIVE_AMOUNT", 0.1)
    losses = (
        train_losses(some, batch())["loss_cls"],
        train_losses(some, batch(), seed=1)["loss_cls"],
    )
    assert losses[0] != losses[1]


def test_negatives_drawn_per_level(build):
    """A level without a positive gives none; the others give a tenth of theirs each."""
    model = build("MODEL.ATSS.NEGATIVE_SCOPE", "level")
    sizes = [256, 64, 16]
    labels = torch.full((2, sum(sizes)), 5)  # 5 classes: 5 is the background
    labels[0, :6] = 1  # positives on the first level
    labels[1, -2:] = 2  # and on the last
    sampled = model.sample_negatives(labels, sizes)
    kept = [int((part == 5).sum()) for part in sampled.split(sizes, dim=1)]
    assert kept == [int(0.1 * (512 - 6)), 0, int(0.1 * (32 - 2))]
    assert torch.equal(sampled[labels != 5], labels[labels != 5])
    whole = build().sample_negatives(labels, sizes)
    assert int((whole == 5).sum()) == int(0.1 * (labels == 5).sum())


def test_distillation_does_not_move_the_box_branch(build):
    model = build("MODEL.IKD.IOU_THRESH", 0.0)
    losses = train_losses(model, batch())
    distillation = losses["loss_ikd"] + losses["loss_gkd_image"] + losses["loss_gkd_caption"]
    distillation.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.head.box_tower.parameters())
    assert (
        model.head.anchor_deltas.weight.grad is None
        or not model.head.anchor_deltas.weight.grad.any()
    )
    assert model.head.embedding.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "box",
    [
        (-500, -500, 900, 900),
        (-1e6, -1e6, 1e6, 1e6),
        (SIZE - 1, SIZE - 1, SIZE, SIZE),
        (63, 63, 63, 63),
        (0, 60, SIZE, 60.001),
        (SIZE + 5, 5, SIZE + 40, 60),
    ],
)
def test_losses_and_gradients_are_finite_at_the_edges(build, box):
    model = build()
    odd, good = sample([box], seed=1), sample([[10, 12, 70, 80]], [3], seed=2)
    losses = train_losses(model, [odd, good])
    assert all(loss.isfinite() for loss in losses.values())
    assert without_gradient(model, losses) == []
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    # and the other image is labelled as without the odd one
    features, _ = model._predict_maps(model.preprocess_image([good]))
    anchors = model.anchor_generator(features)
    alone = model.label_anchors(anchors, [good["instances"]])
    both = model.label_anchors(anchors, [odd["instances"], good["instances"]])
    assert all(torch.equal(one[0], two[1]) for one, two in zip(alone, both, strict=True))


def test_the_temperatures_are_brought_back_and_it_is_said(build, caplog):
    model = build()
    with torch.no_grad():
        model.text_classifier.logit_scale.fill_(-50.0)
        model.mlca.logit_scale.fill_(5000.0)
    losses = train_losses(model, batch())
    assert all(loss.isfinite() for loss in losses.values())
    assert (model.text_classifier.logit_scale.item(), model.mlca.logit_scale.item()) == (1, 1000)
    said = [record.getMessage() for record in caplog.records]
    assert any("tau_c is held at 1, " in each for each in said)
    assert any("tau_m is held at 1000, " in each for each in said)


@pytest.mark.parametrize(("height", "width"), [(100, 70), (128, 33)])
def test_points_outside_the_images_own_padding_can_be_left_out(build, height, width):
    model = build("MODEL.ATSS.IGNORE_PADDING", True)
    sizes = [(128, 224), (height, width)]
    inputs = [sample([[5, 5, 30, 30]]) for _ in sizes]
    for one, size in zip(inputs, sizes, strict=True):
        one["image"] = torch.zeros(3, *size, dtype=torch.uint8)
        one["instances"]._image_size = size
    features = model._predict_maps(model.preprocess_image(inputs))[0]
    anchors = model.anchor_generator(features)
    labels = model.label_anchors(anchors, [one["instances"] for one in inputs])[0]
    # by another way: the maps of the small image alone, in the corners of those of the batch
    alone = model._predict_maps(model.preprocess_image(inputs[1:]))[0]
    inside = []
    for own, of_batch in zip(alone, features, strict=True):
        mask = torch.zeros(of_batch.shape[2:], dtype=torch.bool)
        mask[: own.shape[2], : own.shape[3]] = True
        inside.append(mask.flatten())
    assert torch.equal(labels[1] >= 0, torch.cat(inside))
    assert (labels[0] >= 0).all()


# ---------------------------------------------------------------------------- distillation


def test_the_teacher_sees_raw_images_and_detached_predicted_boxes(build):
    model = build(*EVERY_POSITIVE)
    inputs = batch()
    train_losses(model, inputs)
    images, boxes, scale = model.teacher.regions[-1]
    assert scale == 1.5
    assert [len(b) for b in boxes][2] == 0
    assert len(boxes[0]) > len(boxes[1]) > 0
    assert not any(b.requires_grad for b in boxes)
    for image, given in zip(images, inputs, strict=True):
        assert torch.equal(image, given["image"])


def test_only_well_localised_positives_are_distilled_and_crops_are_limited(build):
    never = build("MODEL.IKD.IOU_THRESH", 1.0)
    assert train_losses(never, batch())["loss_ikd"] == 0
    limited = build("MODEL.IKD.IOU_THRESH", 0.0, "MODEL.IKD.MAX_CROPS_PER_IMAGE", 2)
    train_losses(limited, batch())
    assert sum(len(b) for b in limited.teacher.regions[-1][1]) == 2 * 3


def test_the_points_of_an_object_share_its_ground_truth_crop(build):
    model = build(*EVERY_POSITIVE, "MODEL.IKD.BOXES", "gt")
    inputs = batch()
    positives, pairs = distilled(model, inputs)
    objects = torch.cat([positives.image_idxs[:, None], positives.gt_boxes], dim=1)
    distinct = objects.unique(dim=0)
    _, boxes, _ = model.teacher.regions[-1]
    assert sum(map(len, boxes)) == len(distinct) < len(positives.image_idxs) == len(pairs.teacher)
    for given, seen in zip(inputs, boxes, strict=True):
        truth = given["instances"].gt_boxes.tensor
        assert all((truth == box).all(dim=1).any() for box in seen)
    for one in distinct:
        rows = pairs.teacher[(objects == one).all(dim=1)]
        assert (rows == rows[0]).all()
    assert len(pairs.teacher.unique(dim=0)) == len(distinct)


def test_the_levels_of_the_points_and_the_mean_over_them_by_hand(build):
    """The release averages Eq. 2 level by level, and a level without a point counts as zero."""
    inputs = [*batch(), sample([[2, 2, 126, 126]], [4], seed=4)]  # large: another level
    points = build(*EVERY_POSITIVE, "MODEL.IKD.LOSS_WEIGHT", 1.0)
    loss = train_losses(points, inputs)["loss_ikd"]
    levels = build(
        *(*EVERY_POSITIVE, "MODEL.IKD.LOSS_WEIGHT", 1.0, "MODEL.IKD.AVERAGE_OVER", "levels")
    )
    loss_of_levels = train_losses(levels, inputs)["loss_ikd"]
    positives, pairs = distilled(levels, inputs)
    expected = [0 if i < 256 else 1 if i < 256 + 64 else 2 for i in positives.point_idxs.tolist()]
    assert pairs.levels.tolist() == expected
    assert len(set(expected)) > 1
    distances = (pairs.student - pairs.teacher).abs().sum(dim=1)
    torch.testing.assert_close(loss, distances.mean())
    of_levels = [
        distances[pairs.levels == level].mean() if (pairs.levels == level).any() else 0.0
        for level in range(3)
    ]
    torch.testing.assert_close(loss_of_levels, sum(of_levels) / 3)
    assert loss != loss_of_levels


def test_proposals_join_the_regions_from_their_iteration_on(build):
    model = build("MODEL.IKD.PROPOSALS_PER_IMAGE", 2, "MODEL.IKD.PROPOSALS_START", 5)
    torch.nn.init.normal_(model.head.anchor_deltas.weight, std=0.02)
    inputs = batch()
    inputs[0]["image"] = inputs[0]["image"][:, :100, :90]  # the batch is padded
    inputs[0]["instances"]._image_size = (100, 90)
    model.train()
    chosen = {}
    original = model.distill_regions
    for iteration in (4, 5):
        model.distill_regions = lambda *args, i=iteration: chosen.setdefault(
            i, (args[3], original(*args))
        )[1]
        with EventStorage(iteration):
            losses = model(inputs)
    assert chosen[4][0] is None
    proposals, pairs = chosen[5]
    assert proposals.image_idxs.tolist() == [0, 0, 1, 1, 2, 2]
    assert (proposals.boxes[:2].amax(dim=0)[2:] <= torch.tensor([90.0, 100.0])).all()
    for image, box in zip(proposals.image_idxs, proposals.boxes, strict=True):
        overlaps = pairwise_iou(Boxes(box[None]), inputs[image]["instances"].gt_boxes)
        assert not (overlaps >= 0.3).any()
    _, regions, _ = model.teacher.regions[-1]
    assert sum(map(len, regions)) == len(pairs.student) == len(pairs.teacher)
    assert all(
        (regions[image] == box).all(dim=1).any()
        for image, box in zip(proposals.image_idxs, proposals.boxes, strict=True)
    )
    assert not pairs.teacher.requires_grad
    losses["loss_ikd"].backward()
    assert model.head.embedding.weight.grad.abs().sum() > 0
    assert model.head.anchor_deltas.weight.grad is None


@pytest.mark.parametrize("gkd", [0.0, 1.0])
def test_the_kl_loss_compares_with_names_captions_and_regions_of_the_batch(build, gkd):
    weights = ("MODEL.IKD.LOSS_WEIGHT", 0.5, "MODEL.GKD.LOSS_WEIGHT", gkd)
    model, inputs = build(*EVERY_POSITIVE, *weights, "MODEL.IKD.LOSS_TYPE", "kl"), batch()
    _, pairs = distilled(model, inputs)
    texts = model.text_classifier.text_embeddings
    if gkd:
        captions = model.teacher._embed([each["caption"] for each in inputs])
        texts = torch.cat([texts, captions])
    assert torch.equal(pairs.texts, texts)
    assert pairs.scale == 10.0  # the fake teacher's own factor
    loss = train_losses(model, inputs)["loss_ikd"]
    expected = sum(
        similarity_kl_loss(pairs.student, pairs.teacher, bank, 10.0)
        for bank in (texts, pairs.teacher)
    )
    torch.testing.assert_close(loss, 0.5 * expected / len(pairs.student), rtol=1e-4, atol=1e-5)
    assert without_gradient(model, train_losses(model, inputs)) == []


def with_embeddings(inputs: list[dict]) -> list[dict]:
    """What the mapper attaches where the teacher's embeddings are cached."""
    generator = torch.Generator().manual_seed(7)
    for one in inputs:
        rows = torch.randn(len(one["instances"]) + 1, 64, generator=generator)
        rows = torch.nn.functional.normalize(rows, dim=1)
        one["instances"].gt_region_embeddings, one["caption_embedding"] = rows[1:], rows[0]
        del one["caption"]
    return inputs


def test_embeddings_of_the_batch_are_those_of_the_matched_objects(build):
    model = build(*EVERY_POSITIVE, "MODEL.IKD.BOXES", "gt")
    model.teacher = None  # nobody is asked
    inputs = with_embeddings([*batch(), sample([[5, 5, 60, 60], [70, 60, 125, 120]], seed=4)])
    positives, pairs = distilled(model, inputs)
    # By another way: the image and the box of the point say which object it is.
    assert len(pairs.teacher) == len(positives.gt_boxes) > 10
    for row, image, box in zip(
        pairs.teacher, positives.image_idxs, positives.gt_boxes, strict=True
    ):
        instances = inputs[image]["instances"]
        (place,) = (instances.gt_boxes.tensor == box).all(dim=1).nonzero().flatten().tolist()
        assert torch.equal(row, instances.gt_region_embeddings[place])
    assert len(pairs.teacher.unique(dim=0)) == 5


def test_proposals_of_the_batch_give_their_points_the_rows_of_their_boxes(build):
    cached = ("MODEL.IKD.BOXES", "gt", "MODEL.IKD.LOSS_TYPE", "kl")
    start = ("MODEL.IKD.PROPOSALS_PER_IMAGE", 2, "MODEL.IKD.PROPOSALS_START", 5)
    model = build(*EVERY_POSITIVE, *cached, *start)
    model.teacher.encode_regions = None  # nobody is asked
    inputs = with_embeddings(batch())
    # one is a labelled box, which keeps its points; the last image has none
    given = [[[10, 12, 70, 80], [5, 85, 60, 125]], [[92, 70, 127, 120]], []]
    for one, boxes in zip(inputs, given, strict=True):
        boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        rows = torch.nn.functional.normalize(boxes.repeat(1, 16), dim=1)
        one["proposals"] = Instances(
            (SIZE, SIZE), proposal_boxes=Boxes(boxes), region_embeddings=rows
        )
    seen, original = {}, model.distill_regions
    for iteration in (4, 5):
        model.distill_regions = lambda *args, i=iteration: seen.setdefault(
            i, (args[2], args[3], original(*args))
        )[2]
        with EventStorage(iteration):
            losses = model.train()(inputs)
    assert seen[4][1] is None
    positives, proposals, pairs = seen[5]
    owners = proposals.image_idxs.tolist()
    assert min(owners.count(0), owners.count(1)) > 2
    assert 2 not in owners
    labelled = set(zip(positives.image_idxs.tolist(), positives.point_idxs.tolist(), strict=True))
    assert not labelled & set(zip(owners, proposals.point_idxs.tolist(), strict=True))
    levels = model.anchor_generator([torch.zeros(1, 1, n, n) for n in (16, 8, 4)])
    centers = Boxes.cat(levels).get_centers()[proposals.point_idxs]
    for image, center, row in zip(
        owners, centers, pairs.teacher[len(positives.ious) :], strict=True
    ):
        box = torch.tensor(given[image][-1])  # each point lies in the unlabelled box
        assert ((box[:2] < center) & (center < box[2:])).all()
        assert torch.equal(row, inputs[image]["proposals"].region_embeddings[-1])
    assert len(pairs.student) == len(pairs.teacher) == len(pairs.levels)
    assert without_gradient(model, losses) == []


# ---------------------------------------------------------------------------- vocabularies


def test_the_teacher_and_the_vocabulary_are_in_no_checkpoint(build):
    model = build()
    keys = set(model.state_dict())
    assert not [k for k in keys if "teacher" in k or "text_embeddings" in k]
    assert {"text_classifier.logit_scale", "text_classifier.background_embedding"} <= keys
    other = build()
    other.set_vocabulary([f"other {i}" for i in range(1203)])
    assert not any(other.load_state_dict(copy.deepcopy(model.state_dict())))


def test_the_vocabulary_comes_back_after_the_block_even_after_an_error(build):
    model = build()
    before = model.text_classifier.text_embeddings.clone()
    inside = []

    def use_another_and_fail() -> None:
        with model.vocabulary(["cat", "dog"]):
            inside.extend([model.vocabulary_names, model.text_classifier.num_classes])
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        use_another_and_fail()
    assert inside == [("cat", "dog"), 2]
    assert model.vocabulary_names == tuple(CLASSES)
    assert torch.equal(model.text_classifier.text_embeddings, before)


@pytest.mark.parametrize(
    ("names", "rows", "message"),
    [
        ([], None, "empty"),
        (["cat", " "], None, r"blank names at positions 1"),
        (["cat", "dog", "cat"], None, "repeats 'cat'"),
        (["a", "b"], torch.ones(3, 64), "2 class names, but 3 embeddings"),
        (["a", "b"], torch.ones(2, 32), r"\(K, 64\).*\(2, 32\)"),
    ],
)
def test_bad_vocabularies_are_refused_and_change_nothing(build, names, rows, message):
    model = build()
    with pytest.raises(ValueError, match=message):
        model.set_vocabulary(names, rows)
    assert model.vocabulary_names == tuple(CLASSES)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.ATSS.QUALITY", "ctr"),
        ("MODEL.IKD.LOSS_TYPE", "l3"),
        ("MODEL.IKD.BOXES", "proposals"),
        ("MODEL.IKD.AVERAGE_OVER", "images"),
        ("MODEL.ATSS.NEGATIVE_SCOPE", "image"),
        ("MODEL.GKD.LOSS_TYPE", "triplet"),
    ],
)
def test_wrong_choices_name_the_key_and_the_value(build, key, value):
    with pytest.raises(ValueError, match=f"{key}.*{value}"):
        build(key, value)


def test_inference_without_a_vocabulary_says_what_to_do(build):
    with pytest.raises(RuntimeError, match="set_vocabulary"):
        build(vocabulary=[]).eval()([sample([])])


def all_scores(model: HierKD) -> torch.Tensor:
    """(points, K) scores before any selection."""
    maps = model.score_maps([sample([], seed=1)])
    return torch.cat([m.flatten(2)[0].T for m in maps])


@pytest.mark.parametrize("names", [CLASSES[:3], CLASSES[3:], CLASSES])
def test_novel_names_alone_are_shifted_and_only_beside_base_names(build, names):
    plain, shifted = build().eval(), build("MODEL.ATSS.NOVEL_LOGIT_SHIFT", 2.0).eval()
    shifted.training_vocabulary = tuple(CLASSES[:3])
    for model in (plain, shifted):
        model.set_vocabulary(names)
    before, after = all_scores(plain), all_scores(shifted)
    assert torch.equal(before, after) == (names != CLASSES)
    if names == CLASSES:
        assert shifted.novel_logit_shifts().tolist() == [0, 0, 0, 2, 2]
        assert (after[:, 3:] > before[:, 3:]).all()


# ---------------------------------------------------------------------------- inference


@torch.no_grad()
def test_inference_with_another_vocabulary_and_output_size(build):
    model = build()
    model.eval()
    inputs = [{"image": sample([])["image"], "height": 256, "width": 64}]
    with model.vocabulary([f"name {i}" for i in range(300)]):
        instances = model(inputs)[0]["instances"]
    assert instances.image_size == (256, 64)
    assert len(instances) == 100
    assert int(instances.pred_classes.max()) < 300
    boxes = instances.pred_boxes.tensor
    assert boxes[:, 2].max() <= 64
    assert boxes[:, 3].max() <= 256
    assert (instances.scores.diff() <= 0).all()


@torch.no_grad()
@pytest.mark.parametrize("exponents", [(0.0, 0.0), (0.3, 0.6), (1.0, 1.0)])
def test_the_teachers_own_look_is_joined_by_a_geometric_mean(build, exponents):
    model = build("TEST.TEACHER.BOXES", 7, "TEST.TEACHER.EXPONENTS", exponents).eval()
    model.training_vocabulary = tuple(CLASSES[:3])
    inputs = [sample([], seed=1), sample([], seed=2)]
    fores = model.fore_anchors(inputs)
    joined = model.ask_teacher(inputs, fores)
    images, boxes, scale = model.teacher.regions[-1]
    assert scale == 1.5
    assert torch.equal(images[1], inputs[1]["image"])
    regions = model.teacher._embed([f"region {i}" for i in range(14)])
    texts = model.text_classifier.text_embeddings
    for index, (fore, new) in enumerate(zip(fores, joined, strict=True)):
        top = fore.best(7)
        assert torch.equal(new.boxes, top.boxes)
        assert torch.equal(boxes[index], top.boxes)
        for row in range(7):
            own = top.probs[row]
            looks = (10.0 * texts @ regions[7 * index + row]).softmax(0)
            for k, probability in enumerate(own):
                e = exponents[0] if k < 3 else exponents[1]
                share = (probability / own.sum()) ** (1 - e) * looks[k] ** e
                torch.testing.assert_close(new.probs[row, k], own.sum() * share)
    best = [float(new.scores.max()) for new in joined]
    assert [float(each["instances"].scores[0]) for each in model(inputs)] == pytest.approx(best)


def test_exponents_are_shares(build):
    with pytest.raises(ValueError, match=r"TEST\.TEACHER\.EXPONENTS must be in \[0, 1\], got \(0"):
        build("TEST.TEACHER.EXPONENTS", (0.5, 1.5))


@torch.no_grad()
def test_half_precision_moves_the_scores_a_little(build):
    plain, half = build().eval(), build("TEST.AMP.ENABLED", True).eval()
    inputs = [sample([], seed=1)]
    maps = [model.score_maps(inputs) for model in (plain, half)]
    for one, other in zip(*maps, strict=True):
        assert other.dtype == torch.float32
        assert not torch.equal(one, other)
        torch.testing.assert_close(one, other, atol=0.02, rtol=0.1)
    found = half(inputs)[0]["instances"]
    assert found.scores.dtype == found.pred_boxes.tensor.dtype == torch.float32
    train_losses(half, batch())  # training is not concerned


@torch.no_grad()
def test_compiled_maps_are_used_in_inference_only(build, monkeypatch):
    calls = []

    def counting(*arguments):
        calls.append(1)
        return meta_arch._maps_of(*arguments)

    monkeypatch.setattr(meta_arch, "_compiled_maps_of", lambda: counting)
    model = build("TEST.COMPILE", True).eval()
    model([sample([], seed=1)])
    assert len(calls) == 1
    with torch.enable_grad():
        train_losses(model, batch())
    assert len(calls) == 1
