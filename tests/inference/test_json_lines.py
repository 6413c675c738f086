"""Requests as JSON lines: good ones, and every kind of bad one."""

import base64
import json

import numpy as np
import pytest

import tiny_training
from hierkd.inference.detections import DetectionFilter
from hierkd.inference.json_lines import answer_lines
from hierkd.inference.predictor import OpenVocabularyPredictor


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("lines")
    tiny_training.write_world(root)
    clip = tiny_training.write_clip(root / "clip.pt")
    with pytest.MonkeyPatch.context() as patch, tiny_training.miniature_at(root):
        patch.setenv("HIERKD_CACHE", str(root / "cache"))
        tiny_training.write_run(root / "run", clip)
        yield root


@pytest.fixture(scope="module")
def predictor(world):
    return OpenVocabularyPredictor.from_checkpoint(world / "run")


@pytest.fixture
def picture(world):
    return world / "miniature" / "val" / "2.png"


def ask(predictor, *requests, keep=None):
    lines = [each if isinstance(each, str) else json.dumps(each) for each in requests]
    answers = list(answer_lines(predictor, lines, keep or DetectionFilter()))
    assert all("\n" not in answer for answer in answers)
    return [json.loads(answer) for answer in answers]


def test_three_ways_to_send_a_picture(predictor, picture):
    content = base64.b64encode(picture.read_bytes()).decode()
    first, second, third = ask(
        predictor,
        {"image": str(picture), "id": {"any": "thing"}},
        {"image": f"data:image/png;base64,{content}"},
        {"image_base64": content},
    )
    assert first.pop("id") == {"any": "thing"}
    assert first == second == third
    instances = predictor.predict(picture)
    assert [d["score"] for d in first["detections"]] == pytest.approx(
        instances.scores.tolist(), abs=1e-4
    )
    assert (first["height"], first["width"]) == (96, 96)
    assert first["vocabulary"] == list(predictor.vocabulary)


def test_vocabulary_threshold_and_top_k_of_a_request(predictor, picture):
    before = predictor.vocabulary
    keep = DetectionFilter(class_thresholds={before[0]: 1.0, "b": 1.0})
    (found,) = ask(
        predictor, {"image": str(picture), "vocabulary": ["a", "b"], "top_k": 4}, keep=keep
    )
    assert found["vocabulary"] == ["a", "b"]
    assert [d["class"] for d in found["detections"]] == ["a"] * 4
    (nothing,) = ask(predictor, {"image": str(picture), "score_threshold": 1})
    assert nothing["detections"] == []
    assert predictor.vocabulary == before


def test_the_vocabulary_is_not_embedded_anew_for_each_request(predictor, picture, monkeypatch):
    def embed(names):
        pytest.fail(f"embedded {names}")

    monkeypatch.setattr(predictor.model.teacher, "encode_classes", embed)
    (found,) = ask(predictor, {"image": str(picture)})
    assert len(found["detections"]) > 0


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ("not json", "not JSON: Expecting value at column 1"),
        ("[" * 100_000, "deeply nested"),
        ("[1]", "a request is an object, got a list"),
        ({}, "either 'image' or 'image_base64'"),
        ({"image": "a", "image_base64": "b"}, "either 'image' or 'image_base64'"),
        ({"image": 3}, "'image' must be a text, got a int"),
        ({"image": "gone.png"}, "no picture 'gone.png'"),
        ({"image": "a\0b"}, "no picture"),
        ({"image": "data:image/png,abc"}, "must be base64"),
        ({"image_base64": "*"}, "no base64"),
        ({"image_base64": "AAAA"}, "3 bytes cannot be decoded (no known format)"),
        ({"image": "PICTURE", "vocabulary": "cat"}, "must be a list of names"),
        ({"image": "PICTURE", "vocabulary": []}, "no names, the list is empty"),
        ({"image": "PICTURE", "vocabulary": ["cat", 3]}, "must be texts"),
        ({"image": "PICTURE", "vocabulary": ["cat", "cat"]}, "each name must occur once"),
        ({"image": "PICTURE", "score_threshold": 2}, "must be 0 to 1, got 2"),
        ({"image": "PICTURE", "score_threshold": "high"}, "must be 0 to 1, got 'high'"),
        ({"image": "PICTURE", "top_k": 0}, "at least 1, got 0"),
        ({"image": "PICTURE", "threshold": 0.1}, "a request has no ['threshold']"),
    ],
)
def test_bad_requests_are_answered_and_the_next_one_too(predictor, picture, request_, message):
    if isinstance(request_, dict) and request_.get("image") == "PICTURE":
        request_ = {**request_, "image": str(picture)}
    bad, good = ask(predictor, "  ", request_, {"image": str(picture), "id": 2})
    assert message in bad["error"]
    assert bad["line"] == 2
    assert good["id"] == 2
    assert "error" not in good


def test_random_bytes_never_end_it(predictor):
    rng = np.random.default_rng(0)
    lines = [bytes(rng.integers(1, 128, 60, dtype=np.uint8)).decode() for _ in range(200)]
    lines = [line.replace("\n", " ") for line in lines if line.strip()]
    assert all("error" in answer for answer in ask(predictor, *lines))
