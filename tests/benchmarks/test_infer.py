"""The inference benchmark: its rows, and that the variants detect the same."""

from argparse import ArgumentParser

import pytest
import torch

from hierkd.benchmarks import infer
from hierkd.benchmarks.random_models import random_hierkd, random_retinanet

CPU = torch.device("cpu")
SMALL = (
    *("--size", "64", "96", "--batch", "2", "--no-compile"),
    *("--config-file", "configs/miniature/hierkd.yaml"),
)


def test_rows_say_what_each_variant_costs():
    parser = ArgumentParser()
    infer.add_arguments(parser)
    args = parser.parse_args(SMALL)
    args.rounds = 1
    rows = infer.run(args, CPU).rows
    assert [row["detector"] for row in rows] == [
        "RetinaNet",
        "RetinaNet, batch of 2",
        "HierKD",
        "HierKD, contiguous",
        "HierKD, AMP",
        "HierKD, batch of 2",
        "HierKD, contiguous, batch of 2",
        "HierKD, AMP, batch of 2",
    ]
    assert rows[0]["over RetinaNet"] == rows[2]["over HierKD"] == 1
    assert all(row["seconds"] > 0 for row in rows)


@torch.no_grad()
def test_as_many_pairs_of_retinanet_pass_its_threshold_as_asked():
    model = random_retinanet(CPU)
    inputs = [{"image": torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)}]
    infer.balance_retinanet(model, inputs, 300)
    features = model.backbone(model.preprocess_image(inputs).tensor)
    logits, _ = model.head([features[f] for f in model.head_in_features])
    passing = sum(int((of_level.sigmoid() > 0.05).sum()) for of_level in logits)
    assert passing == pytest.approx(300, abs=3)


@torch.no_grad()
def test_channels_last_and_a_batch_detect_the_same():
    inputs = [{"image": torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8)}]
    scores = []
    for opts in ((), ("MODEL.CHANNELS_LAST", "False")):
        torch.manual_seed(0)
        opts = ("MODEL.WEIGHTS", "", *opts)
        model = random_hierkd("configs/hierkd_R50.yaml", 65, CPU, opts)
        scores += [output["instances"].scores for output in model(inputs) + model(2 * inputs)]
    assert len(scores[0]) > 10
    for other in scores[1:]:
        torch.testing.assert_close(other, scores[0], rtol=1e-3, atol=1e-6)
