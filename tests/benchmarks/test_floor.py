"""Counting operations and bytes without computing anything."""

from argparse import ArgumentParser

import pytest
import torch
import torch.nn.functional as F

from hierkd.benchmarks.floor import add_arguments, count, run

META = torch.device("meta")


def test_matrix_product() -> None:
    left, right = torch.empty(20, 30, device=META), torch.empty(30, 50, device=META)
    operations, moved = count(lambda: left @ right)
    assert operations == pytest.approx(20 * 30 * 50 / 1e9)
    assert moved == pytest.approx(4 * (20 * 30 + 30 * 50 + 20 * 50) / 1e9)


def test_convolution_and_its_backward() -> None:
    image = torch.empty(2, 3, 16, 16, device=META)
    weight = torch.empty(8, 3, 3, 3, device=META, requires_grad=True)
    forward, _ = count(lambda: F.conv2d(image, weight, padding=1))
    assert forward == pytest.approx(2 * 8 * 3 * 9 * 16 * 16 / 1e9)
    # the image needs no gradient: one more product, for the weight
    both, _ = count(lambda: F.conv2d(image, weight, padding=1).sum().backward())
    assert both == pytest.approx(2 * forward)


def test_views_move_nothing() -> None:
    values = torch.empty(20, 30, device=META)
    assert count(lambda: values.T.unsqueeze(0)[:, :5]) == (0, 0)


def test_report_grows_with_the_vocabulary_and_the_picture() -> None:
    parser = ArgumentParser()
    add_arguments(parser)
    sizes = ["--height", "128", "--width", "128", "--images", "1", "--crops", "3"]
    small = run(parser.parse_args(sizes), torch.device("cpu")).rows
    sizes[1] = "256"
    large = run(parser.parse_args(sizes), torch.device("cpu")).rows
    column = "10^9 multiply-adds"
    by_part = {row["part"]: row[column] for row in small}
    assert large[0][column] == pytest.approx(2 * small[0][column], rel=0.02)
    points = 16 * 16 + 8 * 8 + 4 * 4 + 2 * 2 + 1
    assert by_part[f"inference: {points} points x 65 classes"] == pytest.approx(
        points * 66 * 512 / 1e9
    )
    # ViT-B/32: 4.4e9 multiply-adds a crop
    assert by_part["step: CLIP ViT-B/32 on 3 crops"] == pytest.approx(3 * 4.4, rel=0.02)
