"""The vocabulary benchmark: its rows, and what is wrong input."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

from hierkd.benchmarks import vocabulary

CPU = torch.device("cpu")


def arguments(*extra: str) -> Namespace:
    parser = ArgumentParser()
    vocabulary.add_arguments(parser)
    small = ("--size", "64", "96", "--config-file", "configs/miniature/hierkd.yaml")
    args = parser.parse_args([*small, *extra])
    args.rounds = 1
    return args


def test_a_row_for_each_vocabulary(tmp_path: Path) -> None:
    file = tmp_path / "texts.npy"
    np.save(file, np.random.default_rng(0).standard_normal((30, 64)).astype(np.float16))
    args = arguments("--names", "5", "4001", "--embeddings", str(file))
    rows = vocabulary.run(args, CPU).rows
    assert [row["names"] for row in rows] == ["5", "30", "65", "4001"]
    assert [row["embeddings"] for row in rows] == ["-", "real", "-", "-"]
    assert rows[2]["over 65"] == 1


def test_models_share_the_network_and_nothing_of_the_vocabulary() -> None:
    torch.manual_seed(0)
    model = vocabulary.random_hierkd("configs/miniature/hierkd.yaml", 65, CPU)
    one, other = (vocabulary._with_vocabulary(model, n, {}) for n in (5, 9))
    assert one.backbone is other.backbone is model.backbone
    sizes = [m.text_classifier.num_classes for m in (one, other, model)]
    assert sizes == [len(m.vocabulary_names) for m in (one, other, model)] == [5, 9, 65]


def test_wrong_input_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--names: .* got 0"):
        vocabulary.run(arguments("--names", "0"), CPU)
    with pytest.raises(FileNotFoundError, match=r"none\.npy"):
        vocabulary.run(arguments("--embeddings", str(tmp_path / "none.npy")), CPU)
