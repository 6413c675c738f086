"""The timed training steps, tiny: the rows, the shares of the parts."""

import pytest
import torch

from hierkd.benchmarks import step as benchmark


def test_every_row_of_table_4_and_one_without_clip(monkeypatch):
    monkeypatch.setattr(benchmark, "_STEPS_FOR_SHARES", 1)
    device = torch.device("cpu")
    rows = benchmark.run(device, rounds=1, miniature=True, images=2, size=(64, 96), boxes=2).rows
    assert [row["row of Table 4"] for row in rows] == [
        *("no distillation", "IKD", "GKD", "IKD + GKD", "IKD + GKD + IoU branch"),
        "HierKD, embeddings looked up",
    ]
    assert rows[0]["over ATSS"] == 1
    for row in rows:
        shares = [row[f"{part} %"] for part in benchmark.PARTS]
        assert sum(shares) == pytest.approx(100)
        assert min(shares) >= 0
    assert [row["CLIP images %"] > 0.5 for row in rows] == [False, True, False, True, True, False]
    assert [row["MLCA %"] > 0 for row in rows] == [False, False, *[True] * 4]
