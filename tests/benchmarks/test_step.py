"""The timed training steps, tiny: the rows, the shares of the parts, finite losses."""

import math

import pytest
import torch

from hierkd.benchmarks import step as benchmark


def test_every_row_of_table_4_and_one_without_clip(monkeypatch):
    monkeypatch.setattr(benchmark, "_STEPS_FOR_SHARES", 1)
    losses = []
    call = benchmark.TrainingStep.__call__
    monkeypatch.setattr(
        benchmark.TrainingStep, "__call__", lambda *args: losses.append(call(*args)) or losses[-1]
    )
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
    assert all(math.isfinite(value) for of_step in losses for value in of_step.values())
    assert sum("loss_ikd" in of_step for of_step in losses) == len(losses) * 4 / 6
