"""The CLIP upper bound with teachers whose answers are known."""

import json
import math

import pytest
from detectron2.data import MetadataCatalog

from hierkd.evaluation.split_coco_evaluation import SplitCOCOEvaluator
from hierkd.evaluation.upper_bound import clip_upper_bound
from toy_world import PICTURES, VOCABULARY, ColourTeacher, register_toy_world


@pytest.fixture
def world(tmp_path):
    return register_toy_world(tmp_path / "world")


@pytest.mark.parametrize(("images_per_batch", "image_format"), [(1, "RGB"), (4, "BGR")])
def test_a_teacher_that_knows_scores_one_hundred(world, images_per_batch, image_format):
    teacher = ColourTeacher(7, image_format=image_format)
    results = clip_upper_bound(
        teacher, world, 1.25, images_per_batch=images_per_batch, image_format=image_format
    )
    for group in ("base", "novel", "all"):
        for metric in ("AP", "AP50", "APm", "AR50"):
            assert results[f"{group}/{metric}"] == pytest.approx(100.0)
        assert math.isnan(results[f"{group}/APl"])  # no box is large
    assert {crop_scale for _, _, crop_scale in teacher.regions} == {1.25}
    assert sum(len(boxes) for _, boxes, _ in teacher.regions) == len(PICTURES)


def test_the_score_is_clips_probability_among_the_classes(world, monkeypatch):
    """Cosines 0.02 and 0 four times, times CLIP's 100."""
    scores, process = [], SplitCOCOEvaluator.process

    def recording(self, inputs, outputs):
        scores.extend(outputs[0]["instances"].scores.tolist())
        process(self, inputs, outputs)

    monkeypatch.setattr(SplitCOCOEvaluator, "process", recording)
    names = dict.fromkeys(VOCABULARY, 0.02)
    clip_upper_bound(ColourTeacher(7, sure=names), world)
    assert scores == pytest.approx([math.exp(2) / (math.exp(2) + 4)] * sum(map(len, PICTURES)))


def test_each_box_has_one_label(world):
    """A teacher that takes dogs for bees: dogs are missed, and cost the bees precision."""
    results = clip_upper_bound(ColourTeacher(7, confuse={"dog": "bee"}), world)
    assert results["base/AP50"] == pytest.approx(100.0)
    assert 0 < results["AP50-bee"] < 100
    assert results["AP50-dog"] == 0
    assert results["novel/AR50"] == pytest.approx(50.0)  # of bees 100, of dogs 0


def test_crowd_regions_are_not_classified(world):
    path = MetadataCatalog.get(world).json_file
    with open(path) as file:
        content = json.load(file)
    content["annotations"][1]["iscrowd"] = 1
    with open(path, "w") as file:
        json.dump(content, file)
    teacher = ColourTeacher(7)
    clip_upper_bound(teacher, world)
    seen = sum(len(of_image) for _, boxes, _ in teacher.regions for of_image in boxes)
    assert seen == sum(map(len, PICTURES)) - 1
