"""The comparison with onnxruntime, at a tiny size."""

import importlib.util
from argparse import ArgumentParser

import pytest
import torch

from hierkd.benchmarks.onnx import add_arguments, run


def arguments(*options: str):
    parser = ArgumentParser()
    parser.add_argument("--rounds", type=int, default=1)
    add_arguments(parser)
    return parser.parse_args(options)


def test_without_onnxruntime_the_error_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install onnx onnxscript onnxruntime"):
        run(arguments(), torch.device("cpu"))


def test_other_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="--device cpu"):
        run(arguments(), torch.device("cuda"))


@pytest.mark.slow
def test_rows() -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    options = ("--size", "96", "128", "--classes", "3")
    report = run(
        arguments(*options, "--config-file", "configs/miniature/hierkd.yaml"), torch.device("cpu")
    )
    names = [row["runs in"] for row in report.rows]
    assert names == ["PyTorch", "onnxruntime", "PyTorch, the exported .pt2"]
    assert all(row["seconds"] > 0 for row in report.rows)
    assert report.rows[0]["over PyTorch"] == 1
