"""Every image is evaluated once: what is refused, and what of it is named."""

import pytest
from detectron2.data import MetadataCatalog

from hierkd.evaluation.completeness import check_each_image_once


@pytest.mark.parametrize("complete", [True, False])
def test_each_once_in_any_order(complete):
    check_each_image_once(iter([3, 1, "b", 2]), {1, 2, 3, "b"}, "photos", complete=complete)


def test_missing_images():
    with pytest.raises(ValueError, match=r"'photos' has 7 images.* 6 are missing, such as \[1, 2"):
        check_each_image_once([7], range(1, 8), "photos", complete=True)
    check_each_image_once([7], range(1, 8), "photos", complete=False)


@pytest.mark.parametrize("complete", [True, False])
def test_repeated_images(complete):
    with pytest.raises(ValueError, match=r"2 came more than once, such as \[1, 'b'\]"):
        check_each_image_once([1, "b", 1, "b", 2], [1, 2, "b"], "photos", complete=complete)


def test_both():
    with pytest.raises(ValueError, match=r"1 are missing, such as \[2\]; 1 came more than once"):
        check_each_image_once([1, 1], [1, 2], "photos", complete=True)


def test_the_evaluators_ask(tmp_path):
    """Through the evaluators of train_net, with an image seen twice and one not at all."""
    import tiny_training
    import train_net
    from hierkd.load_config import load_config

    name = "miniature_ovd_val_all"
    for architecture, outputs in (("HierKD", "instances"), ("ProposalNetwork", "proposals")):
        cfg = load_config(tiny_training.CONFIG, ["MODEL.META_ARCHITECTURE", architecture])
        cfg.defrost()
        cfg.OUTPUT_DIR = str(tmp_path)
        tiny_training.write_world(tmp_path / architecture)
        with tiny_training.miniature_at(tmp_path / architecture):
            assert MetadataCatalog.get(name).json_file.startswith(str(tmp_path))
            for ids, message in (
                ([1, 2, 3, 4, 5], r"1 are missing, such as \[6\]"),
                ([1, 2, 3, 4, 5, 6, 6], r"1 came more than once, such as \[6\]"),
            ):
                evaluator = train_net.Trainer.build_evaluator(cfg, name)
                evaluator.reset()
                for image_id in ids:
                    evaluator.process([{"image_id": image_id}], [{outputs: nothing(outputs)}])
                with pytest.raises(ValueError, match=message):
                    evaluator.evaluate()


def nothing(kind):
    """An image's result without a single box."""
    import torch
    from detectron2.structures import Boxes, Instances

    found = Instances((96, 96))
    boxes = Boxes(torch.zeros(0, 4))
    if kind == "instances":
        found.pred_boxes, found.scores = boxes, torch.zeros(0)
        found.pred_classes = torch.zeros(0, dtype=torch.int64)
    else:
        found.proposal_boxes, found.objectness_logits = boxes, torch.zeros(0)
    return found
