"""The timed training steps, tiny: the rows are there, and cached and uncached rows agree."""

from argparse import ArgumentParser

import pytest
import torch
from detectron2.utils.events import EventStorage

from hierkd.benchmarks import step as benchmark
from hierkd.benchmarks.step import PARTS, add_arguments, build_steps, run

CPU = torch.device("cpu")
TINY = ("--miniature", "--images", "2", "--size", "64", "96", "--boxes", "2")


def arguments(*options: str):
    parser = ArgumentParser()
    parser.add_argument("--rounds", type=int, default=1)
    add_arguments(parser)
    return parser.parse_args(options)


@pytest.fixture
def one_step_for_shares(monkeypatch):
    monkeypatch.setattr(benchmark, "_STEPS_FOR_SHARES", 1)


def test_every_row_of_table_4_and_the_cache(one_step_for_shares) -> None:
    rows = run(arguments(*TINY), CPU).rows
    assert [row["row of Table 4"] for row in rows] == [
        *("no distillation", "IKD", "GKD", "IKD + GKD", "IKD + GKD + IoU branch"),
        *("HierKD, ground-truth boxes", "HierKD, ground-truth boxes, cached"),
    ]
    assert rows[0]["over ATSS"] == 1
    for row in rows:
        assert sum(row[f"{part} %"] for part in PARTS) == pytest.approx(100)
    encodes = [row["CLIP images %"] > 0 and row["crops %"] > 0 for row in rows]
    assert encodes == [False, True, False, True, True, True, False]
    assert [row["MLCA %"] > 0 for row in rows] == [False, False, *[True] * 5]


def test_steps_have_finite_losses_and_share_what_the_rows_share(tmp_path) -> None:
    batch = benchmark._random_batch(2, 64, 96, 2)
    steps = build_steps(batch, CPU, tmp_path, miniature=True, amp=False)
    with EventStorage():
        losses = {}
        for name, step in steps.items():
            torch.manual_seed(0)  # the negatives are drawn
            losses[name] = step()
    for of_row in losses.values():
        assert all(torch.isfinite(torch.tensor(value)) for value in of_row.values())
    assert "loss_ikd" not in losses["GKD"]
    assert "loss_gkd_image" not in losses["IKD"]
    gt, cached = (losses[f"HierKD, ground-truth boxes{x}"] for x in ("", ", cached"))
    assert gt.keys() == cached.keys()
    for name in ("loss_box_reg", "loss_iou"):  # texts and regions of the cache are random
        assert gt[name] == pytest.approx(cached[name], rel=1e-5)
