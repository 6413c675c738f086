"""Heat maps: where a point of a level lies in the picture, and what the colours say."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hierkd.evaluation.heat_maps import overlay_heat_map, sample_score_map, score_heat_maps


def test_points_lie_at_multiples_of_the_stride():
    scores = np.random.default_rng(0).random((4, 5), dtype=np.float32)
    sampled = sample_score_map(scores, 8, 0.0, (32, 40))
    np.testing.assert_allclose(sampled[::8, ::8], scores, atol=1e-6)
    # Half-way between two points: their mean.
    np.testing.assert_allclose(sampled[0, 4], scores[0, :2].mean(), atol=1e-6)


def test_offset_moves_the_points():
    scores = np.zeros((4, 4), dtype=np.float32)
    scores[1, 2] = 1.0
    peak = sample_score_map(scores, 8, 0.5, (32, 32))
    assert np.unravel_index(peak.argmax(), peak.shape) == (12, 20)  # (1.5, 2.5) strides


def test_outside_the_outermost_points_the_nearest_counts():
    scores = np.array([[0.2, 0.7]], dtype=np.float32)
    sampled = sample_score_map(scores, 8, 0.0, (16, 24))
    np.testing.assert_allclose(sampled[:, 8:], 0.7, atol=1e-6)
    assert sampled.shape == (16, 24)


def test_a_level_of_one_point():
    sampled = sample_score_map(np.array([[0.3]], dtype=np.float32), 128, 0.0, (20, 30))
    np.testing.assert_allclose(sampled, 0.3)


class TwoLevelModel:
    """Scores of 3 classes: the class index at level 0, ten times it at level 1, in percent."""

    vocabulary_names = ("ant", "bee", "cow")
    head_in_features = ("p3", "p4")
    backbone = SimpleNamespace(
        output_shape=lambda: {"p3": SimpleNamespace(stride=8), "p4": SimpleNamespace(stride=16)}
    )
    anchor_generator = SimpleNamespace(offset=0.0)

    def score_maps(self, batched_inputs, classes):
        (one,) = batched_inputs
        assert one["image"].shape == (3, 20, 30)
        index = torch.arange(3.0)[None, classes, None, None]
        # The batch is padded to 32 x 32.
        return [(0.01 * index).expand(1, -1, 4, 4), (0.1 * index).expand(1, -1, 2, 2)]


def test_one_map_per_class_and_level_without_the_padding():
    rows = score_heat_maps(TwoLevelModel(), {"image": torch.zeros(3, 20, 30)}, ["cow", "bee"])
    assert [[m.class_name for m in row] for row in rows] == [["cow", "cow"], ["bee", "bee"]]
    assert [(m.level, m.stride) for m in rows[0]] == [("p3", 8), ("p4", 16)]
    assert rows[0][0].scores.shape == (20, 30)
    np.testing.assert_allclose(rows[0][1].scores, 0.2, atol=1e-6)
    np.testing.assert_allclose(rows[1][0].scores, 0.01, atol=1e-6)


def test_unknown_class_is_named():
    with pytest.raises(ValueError, match=r"unicorn.*ant"):
        score_heat_maps(TwoLevelModel(), {"image": torch.zeros(3, 20, 30)}, ["unicorn"])


def test_higher_scores_are_brighter():
    image = np.full((40, 60, 3), 90, dtype=np.uint8)
    scores = np.tile(np.linspace(0, 1, 30, dtype=np.float32), (20, 1))
    drawn = overlay_heat_map(image, scores, 1.0)
    assert drawn.shape == image.shape
    assert drawn.dtype == np.uint8
    brightness = drawn.astype(int).sum(axis=2)[20]
    assert brightness[-1] > brightness[30] > brightness[0]


def test_scores_beyond_the_range_saturate():
    image = np.zeros((4, 4, 3), dtype=np.uint8)
    at_the_end = overlay_heat_map(image, np.full((4, 4), 0.5, np.float32), 0.5)
    beyond = overlay_heat_map(image, np.full((4, 4), 0.9, np.float32), 0.5)
    np.testing.assert_array_equal(at_the_end, beyond)


def test_range_must_be_positive():
    with pytest.raises(ValueError, match="max_score"):
        overlay_heat_map(np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.float32), 0.0)
