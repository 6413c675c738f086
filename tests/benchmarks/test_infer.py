"""The benchmarks of inference: their rows, and that what they compare is comparable."""

import sys

import numpy as np
import pytest
import torch

from hierkd.benchmarks import infer, peers, vocabulary
from hierkd.benchmarks.timing import random_hierkd

CPU = torch.device("cpu")
MINIATURE = "configs/miniature/hierkd.yaml"


def test_rows_say_what_each_variant_costs():
    report = infer.run(
        CPU, rounds=1, size=(64, 96), batch=2, classes=5, compiled=False, config_file=MINIATURE
    )
    assert [row["detector"] for row in report.rows] == [
        *("RetinaNet", "RetinaNet, batch of 2", "HierKD", "HierKD, contiguous", "HierKD, AMP"),
        *(f"HierKD{variant}, batch of 2" for variant in ("", ", contiguous", ", AMP")),
    ]
    assert report.rows[0]["over RetinaNet"] == report.rows[2]["over HierKD"] == 1
    assert all(row["seconds"] > 0 for row in report.rows)


@torch.no_grad()
def test_as_many_pairs_of_retinanet_pass_its_threshold_as_asked():
    model = infer.random_retinanet(CPU)
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
        model = random_hierkd("configs/hierkd_R50.yaml", 65, CPU, opts).eval()
        scores += [output["instances"].scores for output in model(inputs) + model(2 * inputs)]
    assert len(scores[0]) > 10
    for other in scores[1:]:
        torch.testing.assert_close(other, scores[0], rtol=1e-3, atol=1e-6)


def test_a_row_for_each_vocabulary(tmp_path):
    file = tmp_path / "texts.npy"
    np.save(file, np.random.default_rng(0).standard_normal((30, 64)).astype(np.float16))
    options = {"rounds": 1, "size": (64, 96), "names": [5, 4001], "config_file": MINIATURE}
    rows = vocabulary.run(CPU, embeddings=file, **options).rows
    assert [row["names"] for row in rows] == [5, 30, 65, 4001]
    assert [row["embeddings"] for row in rows] == ["random", "real", "random", "random"]
    assert rows[2]["over 65"] == 1
    with pytest.raises(FileNotFoundError, match=r"none\.npy"):
        vocabulary.run(CPU, embeddings=tmp_path / "none.npy", **options)


def test_peers_without_transformers_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="pip install 'transformers>=5'"):
        peers.run(CPU, rounds=1, classes=3, scale=0.1, config_file=MINIATURE)


def test_rows_of_all_peers():
    pytest.importorskip("transformers")
    report = peers.run(CPU, rounds=1, classes=3, scale=0.25, config_file="configs/hierkd_R50.yaml")
    assert [row["detector"].split(",")[0].split(" (")[0] for row in report.rows] == [
        *("RetinaNet-R50-FPN", "HierKD-R50", *["OWLv2 base/16"] * 2, "Grounding DINO tiny")
    ]
    assert all(row["seconds"] > 0 for row in report.rows)
    assert report.rows[1]["over HierKD"] == 1
