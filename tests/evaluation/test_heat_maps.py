"""Heat maps: where a point of a level lies in the picture, and what the colours say."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hierkd.evaluation.heat_maps import overlay_heat_map, score_heat_maps


def maps_of(scores, stride, offset, size):
    """Heat maps of ``scores`` (K, H, W), of the class "b" and then of the class "a"."""
    model = SimpleNamespace(
        vocabulary_names=("a", "b"),
        head_in_features=("p3",),
        backbone=SimpleNamespace(output_shape=lambda: {"p3": SimpleNamespace(stride=stride)}),
        anchor_generator=SimpleNamespace(offset=offset),
        score_maps=lambda inputs, classes: [torch.as_tensor(scores)[None, classes]],
    )
    return score_heat_maps(model, {"image": torch.zeros(3, *size)}, ["b", "a"])


def test_points_lie_at_multiples_of_the_stride():
    scores = np.random.default_rng(0).random((2, 4, 5), dtype=np.float32)
    rows = maps_of(scores, 8, 0.0, (30, 36))  # without the batch's padding
    assert [[(m.class_name, m.level, m.stride) for m in row] for row in rows] == [
        [("b", "p3", 8)],
        [("a", "p3", 8)],
    ]
    sampled = rows[0][0].scores
    assert sampled.shape == (30, 36)
    np.testing.assert_allclose(sampled[::8, ::8], scores[1], atol=1e-6)
    # Half-way between two points their mean, outside the outermost points the nearest one's.
    np.testing.assert_allclose(sampled[0, 4], scores[1, 0, :2].mean(), atol=1e-6)
    np.testing.assert_allclose(sampled[:25:8, 35], scores[1, :, 4], atol=1e-6)


@pytest.mark.parametrize(("offset", "place"), [(0.0, (8, 16)), (0.5, (12, 20))])
def test_offset_moves_the_points(offset, place):
    scores = np.zeros((2, 4, 4), dtype=np.float32)
    scores[0, 1, 2] = 1.0
    peak = maps_of(scores, 8, offset, (32, 32))[1][0].scores
    assert np.unravel_index(peak.argmax(), peak.shape) == place


def test_higher_scores_are_brighter():
    image = np.full((40, 60, 3), 90, dtype=np.uint8)
    scores = np.tile(np.linspace(0, 1, 30, dtype=np.float32), (20, 1))
    drawn = overlay_heat_map(image, scores, 1.0)
    assert drawn.shape == image.shape
    assert drawn.dtype == np.uint8
    brightness = drawn.astype(int).sum(axis=2)[20]
    assert brightness[-1] > brightness[30] > brightness[0]
    np.testing.assert_array_equal(overlay_heat_map(image, 3 * scores, 3.0), drawn)
