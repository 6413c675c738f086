"""The benchmark of the training loader on a few tiny pictures."""

from argparse import ArgumentParser

import pytest
import torch
from PIL import Image

from hierkd.benchmarks import loader as benchmark


def arguments(*extra):
    parser = ArgumentParser()
    benchmark.add_arguments(parser)
    parser.add_argument("--rounds", type=int)
    small = ["--pictures", "9", "--size", "24", "32", "--short-side", "32", "--batches", "1"]
    return parser.parse_args([*small, "--workers", "0", "--rounds", "2", *extra])


def test_both_loaders_and_every_part_have_a_row():
    report = benchmark.run(arguments(), torch.device("cpu"))
    names = [row["what"].split(": ")[1] for row in report.rows]
    assert names[:2] == ["detectron2", "ours, resumable and with captions"]
    assert {"one whole sample", "decode", "resize", "seed"} <= set(names)
    assert all(row["images/s"] > 0 for row in report.rows)
    assert report.rows[0]["ratio"] == 1.0


def test_both_loaders_read_the_same_pictures(tmp_path):
    records = benchmark.random_pictures(tmp_path, 9, (24, 32))
    with benchmark._loaders(records, 32, 0) as loaders:
        theirs, ours = (next(batches) for batches in loaders.values())
    assert len(theirs) == len(ours) == 8
    for sample in (*theirs, *ours):
        assert sample["image"].shape == (3, 32, 43)
        assert len(sample["instances"]) == 7
    assert all("caption" in sample for sample in ours)


def test_pictures_are_jpegs_of_the_size_asked_for(tmp_path):
    for record in benchmark.random_pictures(tmp_path, 2, (24, 32)):
        with Image.open(record["file_name"]) as image:
            assert image.format == "JPEG"
            assert image.size == (32, 24)
        for annotation in record["annotations"]:
            x0, y0, x1, y1 = annotation["bbox"]
            assert 0 <= x0 < x1 <= 32
            assert 0 <= y0 < y1 <= 24


def test_numbers_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="must be positive"):
        benchmark.run(arguments("--pictures", "0"), torch.device("cpu"))
