"""Multi-layer cross attention by hand and at its limits; tests/reference has Eq. 3 and 4."""

import math

import pytest
import torch
import torch.nn.functional as F

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


def test_two_patches_by_hand():
    # patches along x and y, caption along x: responses 1 and 0, weights e/(e+1) and 1/(e+1),
    # so the aggregate is along (e, 1)
    image = torch.tensor([[[[2.0, 0.0]], [[0.0, 3.0]]]], dtype=torch.float64)  # (1, 2, 1, 2)
    score = mlca(grid_size=1, logit_scale=None)(
        [image[..., :1], image[..., 1:]], torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    )
    assert score.item() == pytest.approx(math.e / math.hypot(math.e, 1))


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


def test_logit_scale_multiplies_cosines():
    cosines = mlca(logit_scale=None)(maps(), captions())
    assert cosines.abs().max() <= 1.0
    torch.testing.assert_close(mlca(logit_scale=25.0)(maps(), captions()), 25.0 * cosines)
    assert list(MLCA(logit_scale=None).parameters()) == []
    assert [name for name, _ in MLCA().named_parameters()] == ["logit_scale"]
    assert MLCA().logit_scale.item() == 10.0


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
