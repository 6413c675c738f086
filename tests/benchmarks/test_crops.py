"""The comparison of ways to cut regions out, at a tiny size."""

from argparse import ArgumentParser
from functools import partial

import pytest
import torch

from hierkd.benchmarks import crops

CPU = torch.device("cpu")
SIZE = 32


def arguments(*options: str):
    parser = ArgumentParser()
    parser.add_argument("--rounds", type=int, default=1)
    crops.add_arguments(parser)
    return parser.parse_args(options)


@pytest.fixture
def task():
    return crops._random_task(3, 11, (96, 130), (16, 60), SIZE, CPU)


def test_rows_of_all_ways_on_both_sizes(monkeypatch) -> None:
    vit = partial(crops._random_vit, width=64, layers=1)
    monkeypatch.setattr(crops, "_random_vit", vit)
    report = crops.run(arguments("--images", "1", "--boxes", "3", "--encoded", "2"), CPU)
    names = [row["boxes"] for row in report.rows]
    assert names == ["3 of 1 x 800 x 1088 to 224"] * 7 + ["96 of 16 x 128 x 128 to 64"] * 7
    rows = {row["way"]: row for row in report.rows[7:]}
    assert rows["loop: slice, F.interpolate, pad"]["over the loop"] == 1
    assert rows["crop_regions"]["max error"] < 1e-5
    assert rows["crop_regions, together"]["max error"] < 1e-5
    assert rows["crop_regions, together"]["1 - cosine"] < 1e-5
    # Rounded to whole levels, and overshoot clipped: more than rounding, less than another filter.
    assert rows["loop in uint8"]["max error"] > 1e-3
    assert 1e-4 < rows["loop in uint8"]["mean error"] < 5e-3 < rows["grid_sample"]["mean error"]
    assert rows["loop: slice, F.interpolate, pad"]["1 - cosine"] > 1e-3


def test_all_ways_show_the_same_part_of_the_picture(task) -> None:
    # A ramp is the same after any linear resampling, away from the borders of the picture.
    ramp = torch.arange(130.0).expand(3, 96, 130) + 60
    smooth = crops._Task(task.name, [ramp] * 3, task.boxes, SIZE, task.windows)
    ways = {name: call() for name, call in crops._ways(smooth).items() if "uint8" not in name}
    expected = ways["loop: slice, F.interpolate, pad"]
    for index, (left, top, width, height) in enumerate(task.placements):
        rows = slice(top + height // 3, top + 2 * height // 3)
        columns = slice(left + width // 3, left + 2 * width // 3)
        for found in ways.values():
            torch.testing.assert_close(
                found[index, :, rows, columns], expected[index, :, rows, columns], atol=0.02, rtol=0
            )


def test_images_without_boxes_are_passed_over() -> None:
    task = crops._random_task(5, 2, (64, 64), (16, 40), SIZE, CPU)
    assert sum(map(len, task.boxes)) == 2
    assert {call().shape for call in crops._ways(task).values()} == {(2, 3, SIZE, SIZE)}


def test_nothing_to_do_is_an_error() -> None:
    with pytest.raises(ValueError, match="--boxes must be at least 1, got 0"):
        crops.run(arguments("--boxes", "0"), CPU)
