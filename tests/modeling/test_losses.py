"""The losses, by hand, by slow loops, at their limits, by symmetry, by gradient and at edges."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from hierkd.modeling.losses import (
    box_iou_targets,
    centerness_targets,
    embedding_l1_loss,
    embedding_l2_loss,
    image_caption_contrastive_loss,
    positive_pairs_loss,
    quality_loss,
    similarity_kl_loss,
    softmax_focal_loss,
    weighted_giou_loss,
)


def random(*shape, seed=0, grad=True):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_(grad)


def random_boxes(n, seed=0):
    """Boxes of sides 5..45 with corners in 0..50, float64, so that many of them overlap."""
    uniform = torch.rand(n, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    left_top = 50 * uniform[:, :2]
    return torch.cat([left_top, left_top + 5 + 40 * uniform[:, 2:]], dim=1)


def assert_zero_attached(loss, leaf):
    """A loss of nothing is zero, and its gradient is zero rather than missing."""
    assert loss.shape == ()
    assert loss.item() == 0.0
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(gradient, torch.zeros_like(leaf))


# ---------------------------------------------------------------------- softmax focal loss (Eq. 1)


def test_focal_by_hand():
    # softmax of log p is p: no other numbers are involved
    logits = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]).log()
    labels = torch.tensor([0, 2])
    expected = 0.25 * (0.5**2 * math.log(2) + 0.2**2 * math.log(1.25))
    assert softmax_focal_loss(logits, labels).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("gamma", "alpha"), [(2.0, 0.25), (1.0, 1.0), (0.5, 0.4), (0.0, 0.25)])
def test_focal_equals_a_slow_loop(gamma, alpha):
    logits, labels = 3 * random(12, 5, grad=False), torch.arange(12) % 5
    expected = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        p = math.exp(row[label]) / sum(math.exp(x) for x in row)
        expected -= alpha * (1 - p) ** gamma * math.log(p)
    loss = softmax_focal_loss(logits, labels, gamma=gamma, alpha=alpha)
    assert loss.item() == pytest.approx(expected, rel=1e-9)


def test_focal_limit_is_cross_entropy():
    logits, labels = random(9, 4), torch.arange(9) % 4
    ours = softmax_focal_loss(logits, labels, gamma=0.0, alpha=1.0)
    theirs = F.cross_entropy(logits, labels, reduction="sum")
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours, logits)[0], torch.autograd.grad(theirs, logits)[0]
    )


def test_focal_treats_background_as_any_class():
    logits, labels = random(8, 4, grad=False), torch.arange(8) % 4
    order = torch.tensor([3, 0, 2, 1])  # the background moves to the front
    moved = softmax_focal_loss(logits[:, order], order.argsort()[labels])
    torch.testing.assert_close(moved, softmax_focal_loss(logits, labels))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_focal_gradient(gamma):
    labels = torch.tensor([0, 1, 2, 2])
    assert gradcheck(lambda x: softmax_focal_loss(x, labels, gamma=gamma), random(4, 3))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("gap", [17.0, 20.0, 100.0, 1e4])
def test_focal_of_saturated_logits_is_finite(gap, gamma):
    # a gap of 20 is a float32 probability of exactly one whose logarithm is not yet zero
    logits = torch.tensor([[gap, 0.0, 0.0], [-gap, gap, 0.0]], requires_grad=True)
    right = softmax_focal_loss(logits, torch.tensor([0, 1]), gamma=gamma)
    assert right.item() == pytest.approx(0.0, abs=1e-6)
    (gradient,) = torch.autograd.grad(right, logits)
    assert torch.isfinite(gradient).all()
    wrong = softmax_focal_loss(logits, torch.tensor([1, 0]), gamma=gamma)
    assert wrong.item() == pytest.approx(0.25 * (gap + 2 * gap), rel=1e-4)
    (gradient,) = torch.autograd.grad(wrong, logits)
    assert torch.isfinite(gradient).all()


def test_focal_of_one_class_and_of_no_points():
    # K = 1: with two equal logits p is a half
    loss = softmax_focal_loss(torch.zeros(1, 2), torch.tensor([1]))
    assert loss.item() == pytest.approx(0.25 * 0.25 * math.log(2))
    logits = random(0, 4)
    assert_zero_attached(softmax_focal_loss(logits, torch.zeros(0, dtype=torch.int64)), logits)


# ---------------------------------------------------------------------- boxes


def slow_iou_giou(a, b):
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    iou = width * height / union
    return iou, iou - (hull - union) / hull


def test_giou_by_hand():
    pred = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 2.0, 2.0], [4.0, 4.0, 9.0, 5.0]])
    # apart by one: IoU 0, union 2, hull 3 | half of it: IoU 1/2, hull = union | equal
    target = torch.tensor([[2.0, 0.0, 3.0, 1.0], [0.0, 0.0, 2.0, 1.0], [4.0, 4.0, 9.0, 5.0]])
    weights = torch.tensor([0.5, 1.0, 0.9])
    loss = weighted_giou_loss(pred, target, weights)
    assert loss.item() == pytest.approx(0.5 * (1 + 1 / 3) + 0.5 + 0.0, abs=1e-5)


def test_giou_equals_a_slow_loop_and_is_invariant():
    pred, target = random_boxes(20, seed=1), random_boxes(20, seed=2)
    weights = torch.linspace(0, 1, 20, dtype=torch.float64)
    expected = sum(
        w * (1 - slow_iou_giou(a, b)[1])
        for w, a, b in zip(weights.tolist(), pred.tolist(), target.tolist(), strict=True)
    )
    loss = weighted_giou_loss(pred, target, weights)
    assert loss.item() == pytest.approx(expected, rel=1e-7)
    moved = weighted_giou_loss(3 * pred + 11, 3 * target + 11, weights)
    torch.testing.assert_close(moved, loss)
    torch.testing.assert_close(weighted_giou_loss(target, pred, weights), loss)


def test_giou_gradient_is_weighted_and_finite():
    pred, target = random_boxes(4, seed=3).requires_grad_(), random_boxes(4, seed=4)
    weights = torch.tensor([0.0, 0.3, 0.7, 1.0], dtype=torch.float64)
    assert gradcheck(lambda x: weighted_giou_loss(x, target, weights), pred)
    (gradient,) = torch.autograd.grad(weighted_giou_loss(pred, target, weights), pred)
    assert torch.equal(gradient[0], torch.zeros(4, dtype=torch.float64))
    assert (gradient[1:].abs().sum(dim=1) > 0).all()


def test_giou_of_nothing_and_of_zero_area():
    empty = torch.zeros(0, 4, requires_grad=True)
    assert_zero_attached(weighted_giou_loss(empty, torch.zeros(0, 4), torch.zeros(0)), empty)
    point = torch.full((1, 4), 5.0, requires_grad=True)
    loss = weighted_giou_loss(point, torch.full((1, 4), 5.0), torch.ones(1))
    assert torch.isfinite(loss)
    assert torch.isfinite(torch.autograd.grad(loss, point)[0]).all()


def test_iou_targets():
    pred = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 2.0]])
    target = torch.tensor([[0.0, 0.0, 2.0, 2.0], [1.0, 0.0, 3.0, 2.0], [5.0, 5.0, 6.0, 6.0]])
    torch.testing.assert_close(box_iou_targets(pred, target), torch.tensor([1.0, 1 / 3, 0.0]))
    pred, target = random_boxes(30, seed=5), random_boxes(30, seed=6)
    expected = [slow_iou_giou(a, b)[0] for a, b in zip(pred.tolist(), target.tolist(), strict=True)]
    # detectron2's Boxes are float32
    torch.testing.assert_close(
        box_iou_targets(pred, target).double(),
        torch.tensor(expected, dtype=torch.float64),
        rtol=1e-5,
        atol=1e-6,
    )
    assert box_iou_targets(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0,)


def test_targets_carry_no_gradient():
    pred = random_boxes(3).requires_grad_()
    assert not box_iou_targets(pred, pred).requires_grad
    assert not centerness_targets(pred[:, :2] + 1, pred).requires_grad


def test_centerness_by_hand():
    box = torch.tensor([[0.0, 0.0, 10.0, 20.0]])
    centers = torch.tensor([[5.0, 10.0], [2.0, 10.0], [5.0, 4.0], [2.0, 4.0], [0.0, 10.0]])
    # l/r = 2/8, t/b = 4/16: each a quarter
    expected = torch.tensor([1.0, 0.5, 0.5, 0.25, 0.0])
    torch.testing.assert_close(centerness_targets(centers, box.expand(5, 4)), expected)


def test_centerness_equals_a_slow_loop_and_mirrors():
    boxes = random_boxes(20)
    share = torch.rand(20, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    centers = boxes[:, :2] + (0.02 + 0.96 * share) * (boxes[:, 2:] - boxes[:, :2])
    expected = []
    for (x, y), (x1, y1, x2, y2) in zip(centers.tolist(), boxes.tolist(), strict=True):
        sides_x, sides_y = (x - x1, x2 - x), (y - y1, y2 - y)
        expected.append(math.sqrt(min(sides_x) / max(sides_x) * min(sides_y) / max(sides_y)))
    result = centerness_targets(centers, boxes)
    torch.testing.assert_close(result, torch.tensor(expected, dtype=torch.float64))
    mirrored = boxes[:, :2] + boxes[:, 2:] - centers
    torch.testing.assert_close(centerness_targets(mirrored, boxes), result)


# ---------------------------------------------------------------------- quality branch


def test_quality_by_hand_and_by_a_slow_loop():
    # a logit of zero is a probability of one half: log 2 whatever the target
    assert quality_loss(torch.zeros(3), torch.tensor([0.0, 0.3, 1.0])).item() == pytest.approx(
        3 * math.log(2)
    )
    logits, targets = 3 * random(15, grad=False), torch.linspace(0, 1, 15, dtype=torch.float64)
    expected = 0.0
    for x, t in zip(logits.tolist(), targets.tolist(), strict=True):
        q = 1 / (1 + math.exp(-x))
        expected -= t * math.log(q) + (1 - t) * math.log(1 - q)
    assert quality_loss(logits, targets).item() == pytest.approx(expected, rel=1e-9)


def test_quality_edges():
    logits = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = quality_loss(logits, torch.tensor([0.0, 1.0]))
    assert loss.item() == pytest.approx(2e4)
    assert torch.isfinite(torch.autograd.grad(loss, logits)[0]).all()
    empty = random(0)
    assert_zero_attached(quality_loss(empty, torch.zeros(0, dtype=torch.float64)), empty)


# ---------------------------------------------------------------------- IKD (Eq. 2)


def test_embedding_losses_by_hand():
    student = torch.tensor([[3.0, 0.0], [1.0, 1.0]])
    teacher = torch.tensor([[0.0, 4.0], [1.0, 1.0]])
    assert embedding_l1_loss(student, teacher).item() == 7.0
    assert embedding_l2_loss(student, teacher).item() == 5.0


def test_embedding_losses_equal_slow_loops():
    student, teacher = random(7, 6, seed=1, grad=False), random(7, 6, seed=2, grad=False)
    pairs = list(zip(student.tolist(), teacher.tolist(), strict=True))
    l1 = sum(abs(a - b) for f, v in pairs for a, b in zip(f, v, strict=True))
    l2 = sum(math.dist(f, v) for f, v in pairs)
    assert embedding_l1_loss(student, teacher).item() == pytest.approx(l1, rel=1e-12)
    assert embedding_l2_loss(student, teacher).item() == pytest.approx(l2, rel=1e-12)


@pytest.mark.parametrize("loss", [embedding_l1_loss, embedding_l2_loss])
def test_embedding_losses_limits_symmetry_and_edges(loss):
    student, teacher = random(5, 4, seed=1), random(5, 4, seed=2, grad=False)
    torch.testing.assert_close(loss(student, teacher), loss(teacher, student))
    torch.testing.assert_close(loss(3 * student, 3 * teacher), 3 * loss(student, teacher))
    order = torch.tensor([4, 2, 0, 1, 3])
    torch.testing.assert_close(loss(student[order], teacher[order]), loss(student, teacher))
    assert gradcheck(lambda x: loss(x, teacher), student)
    assert_zero_attached(loss(student, student.detach().clone()), student)
    empty = random(0, 4)
    assert_zero_attached(loss(empty, torch.zeros(0, 4, dtype=torch.float64)), empty)


def test_similarity_kl_by_hand_and_by_a_slow_loop():
    # texts along the axes: shares 3/4 and 1/4 against 1/2 and 1/2
    texts = torch.eye(2)
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3), 0.0]])
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert similarity_kl_loss(student, teacher, texts, 1.0).item() == pytest.approx(
        expected, rel=1e-6
    )
    student, teacher, texts = (random(n, 6, seed=n, grad=False) for n in (4, 4, 5))
    total = 0.0
    for f, v in zip(student.tolist(), random(4, 6, seed=9, grad=False).tolist(), strict=True):
        found, wanted = (
            [math.exp(sum(a * b for a, b in zip(x, t, strict=True))) for t in texts.tolist()]
            for x in (f, v)
        )
        for q, p in zip(found, wanted, strict=True):
            total += p / sum(wanted) * math.log(p / sum(wanted) / (q / sum(found)))
    loss = similarity_kl_loss(2 * student, 2 * random(4, 6, seed=9, grad=False), texts, 0.5)
    assert loss.item() == pytest.approx(total, rel=1e-9)


def test_similarity_kl_limits_and_edges():
    student, teacher = random(5, 4, seed=1), random(5, 4, seed=2, grad=False)
    texts = random(7, 4, seed=3, grad=False)
    assert gradcheck(lambda x: similarity_kl_loss(x, teacher, texts, 2.0), student)
    equal = similarity_kl_loss(student, student.detach().clone(), texts, 3.0)
    assert equal.item() == 0.0
    assert torch.autograd.grad(equal, student)[0].abs().max() < 1e-12
    # what no text sees is free, and one text says nothing
    free = F.pad(student, (0, 3)), F.pad(teacher, (0, 3), value=2.0), F.pad(texts, (0, 3))
    torch.testing.assert_close(
        similarity_kl_loss(*free, 1.0), similarity_kl_loss(student, teacher, texts, 1.0)
    )
    assert similarity_kl_loss(student, teacher, texts[:1], 1.0).item() == 0.0
    empty = random(0, 4)
    assert_zero_attached(similarity_kl_loss(empty, torch.zeros(0, 4).double(), texts, 1.0), empty)


# ---------------------------------------------------------------------- GKD (Eq. 5)


def test_contrastive_by_hand():
    scores = torch.tensor([[math.log(3), 0.0], [math.log(2), 0.0]])
    # rows: own share 3/4 and 1/3; columns: own share 3/5 and 1/2
    image, caption = image_caption_contrastive_loss(scores)
    assert image.item() == pytest.approx((math.log(4 / 3) + math.log(3)) / 2, rel=1e-5)
    assert caption.item() == pytest.approx((math.log(5 / 3) + math.log(2)) / 2, rel=1e-5)


def test_contrastive_equals_a_slow_loop():
    scores = 5 * random(6, 6, grad=False)
    s = scores.tolist()
    image = caption = 0.0
    for i in range(6):
        image -= math.log(math.exp(s[i][i]) / sum(math.exp(s[i][j]) for j in range(6))) / 6
        caption -= math.log(math.exp(s[i][i]) / sum(math.exp(s[j][i]) for j in range(6))) / 6
    terms = image_caption_contrastive_loss(scores)
    assert [t.item() for t in terms] == pytest.approx([image, caption], rel=1e-9)


@pytest.mark.parametrize("b", [1, 2, 8])
@pytest.mark.parametrize("score", [0.0, 10.0, -1e4])
def test_contrastive_of_equal_scores_is_log_b(b, score):
    for term in image_caption_contrastive_loss(torch.full((b, b), score)):
        assert term.item() == pytest.approx(math.log(b), abs=1e-3)


def test_contrastive_symmetry():
    scores = random(5, 5, grad=False)
    image, caption = image_caption_contrastive_loss(scores)
    swapped = image_caption_contrastive_loss(scores.T)
    torch.testing.assert_close(swapped, (caption, image))
    assert abs(image - caption) > 1e-3  # or the line above proves nothing
    order = torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(
        image_caption_contrastive_loss(scores[order][:, order]), (image, caption)
    )
    # an image that likes every caption better tells the image term nothing
    shifted = scores + torch.arange(5)[:, None]
    torch.testing.assert_close(image_caption_contrastive_loss(shifted)[0], image)
    assert abs(image_caption_contrastive_loss(shifted)[1] - caption) > 1e-3


def test_contrastive_gradient():
    scores = random(4, 4)
    assert gradcheck(image_caption_contrastive_loss, scores)
    # each pushes its own pair up and the others down; a row (column) of gradients sums to zero
    image, caption = image_caption_contrastive_loss(scores)
    (of_image,) = torch.autograd.grad(image, scores)
    (of_caption,) = torch.autograd.grad(caption, scores)
    for gradient, dim in ((of_image, 1), (of_caption, 0)):
        assert (gradient.diagonal() < 0).all()
        assert (gradient[~torch.eye(4, dtype=torch.bool)] > 0).all()
        assert gradient.sum(dim=dim).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_contrastive_of_huge_scores_is_finite(dtype):
    scores = (5e3 * (1 - 2 * torch.eye(3))).to(dtype).requires_grad_()
    for term in image_caption_contrastive_loss(scores):
        assert torch.isfinite(term)
        assert torch.isfinite(torch.autograd.grad(term, scores)[0]).all()


def test_one_image_has_nothing_to_contrast():
    scores = torch.tensor([[3.7]], requires_grad=True)
    for term in image_caption_contrastive_loss(scores):
        assert_zero_attached(term, scores)


def test_positive_pairs():
    scores = torch.tensor([[0.5, 9.0], [-9.0, 0.1]], dtype=torch.float64, requires_grad=True)
    loss = positive_pairs_loss(scores)
    assert loss.item() == pytest.approx((0.5 + 0.9) / 2)
    (gradient,) = torch.autograd.grad(loss, scores)
    assert torch.equal(gradient, -0.5 * torch.eye(2, dtype=torch.float64))
    assert positive_pairs_loss(torch.eye(4)).item() == 0.0
    assert gradcheck(positive_pairs_loss, random(3, 3))


@pytest.mark.parametrize("loss", [image_caption_contrastive_loss, positive_pairs_loss])
@pytest.mark.parametrize("shape", [(2, 3), (4,), (2, 2, 2)])
def test_scores_that_are_not_square_are_refused(loss, shape):
    with pytest.raises(ValueError, match=r"square.*got shape") as error:
        loss(torch.zeros(shape))
    assert str(shape) in str(error.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_box_that_is_not_finite_shows_in_the_loss(value):
    pred = torch.tensor([[0.0, 0.0, 4.0, 4.0], [1.0, 1.0, value, 3.0]], requires_grad=True)
    target = torch.tensor([[0.0, 0.0, 2.0, 4.0], [1.0, 1.0, 2.0, 2.0]])
    assert not weighted_giou_loss(pred, target, torch.ones(2)).isfinite()
