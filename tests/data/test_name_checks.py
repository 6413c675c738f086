"""Findings about class names."""

import torch

from hierkd.data.name_checks import check_embeddings, check_spelling, check_tokens
from hierkd.teachers.openai_clip import OPENAI_TOKENS


def test_words_are_fine():
    assert check_spelling(["cat", "traffic light", "bus", "glasses"]) == []


def test_spellings_that_are_no_words():
    text = "\n".join(check_spelling(["stop_sign", "TrafficLight", "n02123", "dog", "dogs", "café"]))
    for name in ("stop_sign", "TrafficLight", "n02123", "dogs", "café"):
        assert name in text
    assert ": dog\n" not in text


def test_long_prompts_and_empty_names():
    long = "very " * 80 + "long cat"
    found = check_tokens(["cat", long, " "], ["a photo of a {}."], OPENAI_TOKENS)
    assert len(found) == 2
    assert long in found[0]
    assert "77 tokens" in found[0]
    assert "anything that CLIP reads:  " in found[1]
    assert check_tokens(["cat"], ["a photo of a {}."], OPENAI_TOKENS) == []


def test_tokens_are_counted_with_start_and_end():
    assert OPENAI_TOKENS.count(["cat", "a cat", "!", ""]) == [3, 4, 3, 2]


def test_the_same_to_clip():
    rows = torch.nn.functional.normalize(
        torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]), dim=1
    )  # cosines 0.995, 0, 0.0995
    (found,) = check_embeddings(["sofa", "couch", "cup"], rows)
    assert "sofa = couch (0.995)" in found
    assert "cup" not in found
    assert check_embeddings(["sofa", "cup"], rows[[0, 2]]) == []
