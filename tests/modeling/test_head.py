"""The dense head: shapes, unit embeddings, levels that share their layers, and precision."""

import math

import pytest
import torch
import torch.nn.functional as F

from hierkd.modeling.head import ATSSHead

CHANNELS, D = 32, 7


def make_head(**kwargs):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        settings = {"in_channels": CHANNELS, "embed_dim": D, "num_levels": 2, "num_convs": 2}
        return ATSSHead(**(settings | kwargs))


def features(n=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, CHANNELS, *size, generator=generator) for size in ((6, 9), (3, 5))]


def test_shapes_and_types():
    embeddings, deltas, qualities = make_head()(features())
    assert [tuple(x.shape) for x in embeddings] == [(2, D, 6, 9), (2, D, 3, 5)]
    assert [tuple(x.shape) for x in deltas] == [(2, 4, 6, 9), (2, 4, 3, 5)]
    assert [tuple(x.shape) for x in qualities] == [(2, 1, 6, 9), (2, 1, 3, 5)]
    assert {x.dtype for x in [*embeddings, *deltas, *qualities]} == {torch.float32}


def test_equals_a_convolution_by_hand():
    # without towers one point is a sum over its 3x3 neighbourhood
    head = make_head(num_convs=0)
    feature = features()[0]
    embeddings, deltas, qualities = head([feature, feature])
    for conv, result in (
        (head.embedding, embeddings[0]),
        (head.anchor_deltas, deltas[0]),
        (head.quality, qualities[0]),
    ):
        window = feature[1, :, 2:5, 3:6]  # around y = 3, x = 4
        expected = torch.stack([(w * window).sum() for w in conv.weight]) + conv.bias
        if conv is head.embedding:
            expected = expected / math.sqrt(sum(x * x for x in expected.tolist()))
        torch.testing.assert_close(result[1, :, 3, 4], expected, rtol=1e-4, atol=1e-5)


def test_levels_share_all_but_the_scale():
    head, feature = make_head(), features()[0]
    with torch.no_grad():
        head.scales[1].fill_(3.0)
    embeddings, deltas, qualities = head([feature, feature])
    torch.testing.assert_close(embeddings[0], embeddings[1])
    torch.testing.assert_close(qualities[0], qualities[1])
    torch.testing.assert_close(3.0 * deltas[0], deltas[1])


def test_the_towers_are_apart():
    # classification does not move the boxes, and the boxes do not move classification
    head = make_head()
    embeddings, deltas, qualities = head(features())
    of_embeddings = torch.autograd.grad(
        embeddings[0][:, 0].sum(), list(head.parameters()), allow_unused=True, retain_graph=True
    )
    of_boxes = torch.autograd.grad(
        deltas[0].sum() + qualities[0].sum(), list(head.parameters()), allow_unused=True
    )
    for a, b in zip(of_embeddings, of_boxes, strict=True):
        assert a is None or b is None


@pytest.mark.parametrize("norm", ["GN", "BN", ""])
def test_every_parameter_gets_a_gradient(norm):
    head = make_head(norm=norm)
    embeddings, deltas, qualities = head(features())
    target = F.normalize(torch.ones(D), dim=0)[None, :, None, None]
    sum(
        (e * target).sum() + d.sum() + q.sum()
        for e, d, q in zip(embeddings, deltas, qualities, strict=True)
    ).backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_at_test_time_each_level_is_normalised_by_its_own_statistics():
    head = make_head(norm="BN")
    fine, coarse = features(n=8)
    levels = [fine, 3 * coarse + 2]
    for _ in range(150):  # until the running statistics are those of the batch
        trained = head(levels)
    tested = head.eval()(levels)
    for one, other in zip(trained, tested, strict=True):
        for of_training, of_test in zip(one, other, strict=True):
            torch.testing.assert_close(of_test, of_training, atol=2e-2, rtol=2e-2)


def test_autocast_keeps_outputs_in_float32():
    head = make_head()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embeddings, deltas, qualities = head(features())
    assert {x.dtype for x in [*embeddings, *deltas, *qualities]} == {torch.float32}
    for embedding, exact in zip(embeddings, head(features())[0], strict=True):
        torch.testing.assert_close(embedding.norm(dim=1), torch.ones_like(embedding[:, 0]))
        assert (embedding * exact).sum(dim=1).min() > 0.95
