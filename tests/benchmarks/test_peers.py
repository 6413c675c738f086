"""The comparison with other detectors, at a tiny size."""

import sys
from argparse import ArgumentParser

import pytest
import torch

from hierkd.benchmarks.peers import add_arguments, run

CPU = torch.device("cpu")


def arguments(*options: str):
    parser = ArgumentParser()
    parser.add_argument("--rounds", type=int, default=1)
    add_arguments(parser)
    return parser.parse_args(options)


def test_without_transformers_the_error_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="pip install 'transformers>=5'"):
        run(arguments("--scale", "0.1"), CPU)


def test_rows_of_all_detectors() -> None:
    pytest.importorskip("transformers")
    report = run(arguments("--scale", "0.25", "--classes", "3"), CPU)
    detectors = [row["detector"].split(",")[0].split(" (")[0] for row in report.rows]
    assert detectors == [
        "RetinaNet-R50-FPN",
        "HierKD-R50",
        *["OWLv2 base/16"] * 2,
        "Grounding DINO tiny",
    ]
    assert all(row["seconds"] > 0 for row in report.rows)
    assert report.rows[1]["over HierKD"] == 1
