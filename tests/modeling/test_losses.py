"""The losses by hand and at edges; tests/reference compares them with slow definitions."""

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


def test_giou_by_hand():
    pred = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 2.0, 2.0], [4.0, 4.0, 9.0, 5.0]])
    # apart by one: IoU 0, union 2, hull 3 | half of it: IoU 1/2, hull = union | equal
    target = torch.tensor([[2.0, 0.0, 3.0, 1.0], [0.0, 0.0, 2.0, 1.0], [4.0, 4.0, 9.0, 5.0]])
    weights = torch.tensor([0.5, 1.0, 0.9])
    loss = weighted_giou_loss(pred, target, weights)
    assert loss.item() == pytest.approx(0.5 * (1 + 1 / 3) + 0.5 + 0.0, abs=1e-5)


def test_giou_of_nothing_and_of_zero_area():
    empty = torch.zeros(0, 4, requires_grad=True)
    assert_zero_attached(weighted_giou_loss(empty, torch.zeros(0, 4), torch.zeros(0)), empty)
    point = torch.full((1, 4), 5.0, requires_grad=True)
    loss = weighted_giou_loss(point, torch.full((1, 4), 5.0), torch.ones(1))
    assert torch.isfinite(loss)
    assert torch.isfinite(torch.autograd.grad(loss, point)[0]).all()


def test_targets_carry_no_gradient():
    pred = random_boxes(3).requires_grad_()
    assert not box_iou_targets(pred, pred).requires_grad
    assert not centerness_targets(pred[:, :2] + 1, pred).requires_grad


def test_iou_targets():
    pred = torch.tensor([[0.0, 0.0, 2.0, 2.0]] * 3)
    target = torch.tensor([[0.0, 0.0, 2.0, 2.0], [1.0, 0.0, 3.0, 2.0], [5.0, 5.0, 6.0, 6.0]])
    torch.testing.assert_close(box_iou_targets(pred, target), torch.tensor([1.0, 1 / 3, 0.0]))
    assert box_iou_targets(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0,)


def test_centerness_by_hand():
    box = torch.tensor([[0.0, 0.0, 10.0, 20.0]])
    centers = torch.tensor([[5.0, 10.0], [2.0, 10.0], [5.0, 4.0], [2.0, 4.0], [0.0, 10.0]])
    # l/r = 2/8, t/b = 4/16: each a quarter
    expected = torch.tensor([1.0, 0.5, 0.5, 0.25, 0.0])
    torch.testing.assert_close(centerness_targets(centers, box.expand(5, 4)), expected)


# ---------------------------------------------------------------------- quality branch


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
    for loss in (embedding_l1_loss, embedding_l2_loss):
        for leaf in (random(5, 4), random(0, 4)):
            assert_zero_attached(loss(leaf, leaf.detach().clone()), leaf)


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


@pytest.mark.parametrize("b", [1, 2, 8])
@pytest.mark.parametrize("score", [0.0, 10.0, -1e4])
def test_contrastive_of_equal_scores_is_log_b(b, score):
    for term in image_caption_contrastive_loss(torch.full((b, b), score)):
        assert term.item() == pytest.approx(math.log(b), abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_contrastive_of_huge_scores_is_finite(dtype):
    scores = (5e3 * (1 - 2 * torch.eye(3))).to(dtype).requires_grad_()
    for term in image_caption_contrastive_loss(scores):
        assert torch.isfinite(term)
        assert torch.isfinite(torch.autograd.grad(term, scores)[0]).all()


def test_positive_pairs():
    scores = torch.tensor([[0.5, 9.0], [-9.0, 0.1]], dtype=torch.float64, requires_grad=True)
    loss = positive_pairs_loss(scores)
    assert loss.item() == pytest.approx((0.5 + 0.9) / 2)
    (gradient,) = torch.autograd.grad(loss, scores)
    assert torch.equal(gradient, -0.5 * torch.eye(2, dtype=torch.float64))
    assert positive_pairs_loss(torch.eye(4)).item() == 0.0
    assert gradcheck(positive_pairs_loss, random(3, 3))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_box_that_is_not_finite_shows_in_the_loss(value):
    pred = torch.tensor([[0.0, 0.0, 4.0, 4.0], [1.0, 1.0, value, 3.0]], requires_grad=True)
    target = torch.tensor([[0.0, 0.0, 2.0, 4.0], [1.0, 1.0, 2.0, 2.0]])
    assert not weighted_giou_loss(pred, target, torch.ones(2)).isfinite()
