"""Multi-layer cross attention against Eq. 3 and Eq. 4 written as loops, and at its limits."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from hierkd.modeling.mlca import MLCA, gather_rows

N, C, D = 3, 2, 5


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def maps(seed=0):
    """Two levels, neither a multiple of the grid."""
    return [random(N, D, 7, 5, seed=seed), random(N, D, 4, 4, seed=seed + 1)]


def captions(seed=7):
    return F.normalize(random(C, D, seed=seed), dim=1)


def mlca(**kwargs):
    return MLCA(**kwargs).double()


def slow_scores(embedding_maps, caption_embeddings, grid, scale):
    """Eq. 3 and Eq. 4 with lists of numbers; cells as adaptive pooling defines them."""

    def unit(vector):
        length = math.sqrt(sum(x * x for x in vector))
        return [x / length for x in vector]

    def dot(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True))

    scores = []
    for n in range(N):
        patches = []
        for level in embedding_maps:
            image = level[n].tolist()
            height, width = level.shape[2:]
            for i in range(grid):
                rows = range(i * height // grid, math.ceil((i + 1) * height / grid))
                for j in range(grid):
                    columns = range(j * width // grid, math.ceil((j + 1) * width / grid))
                    patches.append(
                        unit([max(image[d][y][x] for y in rows for x in columns) for d in range(D)])
                    )
        row = []
        for caption in caption_embeddings.tolist():
            responses = [math.exp(dot(caption, p)) for p in patches]
            attention = [r / sum(responses) for r in responses]
            looked_at = [
                sum(a * p[d] for a, p in zip(attention, patches, strict=True)) for d in range(D)
            ]
            row.append(scale * dot(unit(looked_at), caption))
        scores.append(row)
    return torch.tensor(scores, dtype=torch.float64)


@pytest.mark.parametrize("grid", [1, 2, 3])
def test_scores_equal_the_equations(grid):
    scores = mlca(grid_size=grid)(maps(), captions())
    torch.testing.assert_close(scores, slow_scores(maps(), captions(), grid, 10.0))


def test_two_patches_by_hand():
    # patches along x and y, caption along x: responses 1 and 0, weights e/(e+1) and 1/(e+1),
    # so the aggregate is along (e, 1)
    image = torch.tensor([[[[2.0, 0.0]], [[0.0, 3.0]]]], dtype=torch.float64)  # (1, 2, 1, 2)
    score = mlca(grid_size=1, logit_scale=None)(
        [image[..., :1], image[..., 1:]], torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    )
    assert score.item() == pytest.approx(math.e / math.hypot(math.e, 1))


def test_one_patch_is_its_cosine():
    patch = random(N, D, 1, 1)
    scores = mlca(grid_size=1, logit_scale=4.0)([patch], captions())
    expected = F.cosine_similarity(patch.flatten(1)[:, None], captions()[None], dim=2)
    torch.testing.assert_close(scores, 4.0 * expected)


def test_equal_patches_are_one_patch():
    patch = random(N, D, 1, 1)
    once = mlca(grid_size=1)([patch], captions())
    torch.testing.assert_close(mlca()([patch.expand(N, D, 9, 9), patch], captions()), once)


def test_patches_by_hand():
    level = torch.arange(16.0).view(1, 1, 4, 4).repeat(1, 2, 1, 1)
    level[:, 1] *= -1
    # channel 0 rises, channel 1 falls: the maxima are the last of one and the first of the other
    expected = F.normalize(
        torch.tensor([[5.0, 0.0], [7.0, -2.0], [13.0, -8.0], [15.0, -10.0]]), dim=1
    )
    torch.testing.assert_close(MLCA(grid_size=2).pool_patches([level])[0], expected)
    mean = F.normalize(torch.tensor([[2.5, -2.5], [4.5, -4.5], [10.5, -10.5], [12.5, -12.5]]))
    patches = MLCA(grid_size=2, pooling="avg").pool_patches([level])[0]
    torch.testing.assert_close(patches, mean)


def test_order_of_patches_changes_nothing():
    scores = mlca()(maps(), captions())
    torch.testing.assert_close(mlca()(maps()[::-1], captions()), scores)
    flipped = [level.flip(3) for level in maps()]
    torch.testing.assert_close(mlca()(flipped, captions()), scores)
    turned = [level.transpose(2, 3) for level in maps()]
    torch.testing.assert_close(mlca()(turned, captions()), scores)


def test_images_and_captions_are_scored_each_for_itself():
    scores = mlca()(maps(), captions())
    assert scores.shape == (N, C)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(mlca()([m[order] for m in maps()], captions()), scores[order])
    torch.testing.assert_close(mlca()(maps(), captions().flip(0)), scores.flip(1))
    torch.testing.assert_close(mlca()([m[:1] for m in maps()], captions()[:1]), scores[:1, :1])


def test_logit_scale_multiplies_cosines():
    cosines = mlca(logit_scale=None)(maps(), captions())
    assert cosines.abs().max() <= 1.0
    torch.testing.assert_close(mlca(logit_scale=25.0)(maps(), captions()), 25.0 * cosines)
    assert list(MLCA(logit_scale=None).parameters()) == []
    assert [name for name, _ in MLCA().named_parameters()] == ["logit_scale"]
    assert MLCA().logit_scale.item() == 10.0


def test_gradient():
    layers = [m.requires_grad_() for m in maps()]
    module = mlca(grid_size=2)
    assert gradcheck(lambda *x: module(x[:2], x[2]), (*layers, captions().requires_grad_()))
    scores = module(layers, captions())
    (of_scale,) = torch.autograd.grad(scores.sum(), module.logit_scale)
    torch.testing.assert_close(of_scale, scores.sum() / 10.0)


def test_a_map_smaller_than_the_grid():
    one = random(N, D, 1, 1)
    assert mlca(grid_size=3).pool_patches([one]).shape == (N, 9, D)
    torch.testing.assert_close(
        mlca(grid_size=3)([one], captions()), mlca(grid_size=1)([one], captions())
    )


@pytest.mark.parametrize("pooling", ["max", "avg"])
def test_zero_maps_are_finite(pooling):
    zero = torch.zeros(1, D, 3, 3, dtype=torch.float64, requires_grad=True)
    scores = mlca(pooling=pooling)([zero], captions())
    assert torch.equal(scores, torch.zeros(1, C, dtype=torch.float64))
    assert torch.isfinite(torch.autograd.grad(scores.sum(), zero)[0]).all()


def test_errors_name_both_sides():
    with pytest.raises(ValueError, match="at least one cell, got grid_size=0"):
        MLCA(grid_size=0)
    with pytest.raises(ValueError, match=r"'max', 'avg'.*got 'min'"):
        MLCA(pooling="min")


def test_tau_m_stays_in_its_range():
    module = MLCA(logit_scale=10.0)
    for value, expected in ((-1.0, 1.0), (1e9, 1000.0), (9.75, 9.75)):
        with torch.no_grad():
            module.logit_scale.fill_(value)
        module.limit_logit_scale()
        assert module.logit_scale.item() == expected
    MLCA(logit_scale=None).limit_logit_scale()


def test_one_process_keeps_its_own_rows():  # two: test_ddp.py
    rows = torch.randn(3, 4, requires_grad=True)
    assert gather_rows(rows) is rows
