"""Detectors as a command line names them."""

import shutil

import pytest

import tiny_training
from hierkd.inference.detections import DetectionFilter
from hierkd.inference.detectors import Detectors, icons_only, load_detectors, unknown_to_icons


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("detectors")
    with tiny_training.prepared(root):
        yield tiny_training.write_run(root / "run", root / "clip.pt")


def test_weights_are_those_named_or_those_beside_the_config(run, tmp_path):
    copied = tmp_path / "mine.yaml"
    shutil.copy(run / "config.yaml", copied)
    weights = ["MODEL.WEIGHTS", str(run / "model_final.pth")]
    assert list(load_detectors(None, str(run / "config.yaml"))) == ["run"]
    assert list(load_detectors(None, str(copied), weights, device="cpu")) == ["mine"]
    with pytest.raises(ValueError, match=r"MODEL\.WEIGHTS is empty"):
        load_detectors(None, str(copied))
    with pytest.raises(FileNotFoundError, match=r"gone\.pth"):
        load_detectors(None, str(run / "config.yaml"), ["MODEL.WEIGHTS", "gone.pth"])


def test_without_make_demo_the_message_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="run `make demo` first"):
        load_detectors(None, None)


def test_several_have_titles_one_vocabulary_and_records(run):
    compared = [f"again={run}", str(run / "model_final.pth")]
    with pytest.raises(ValueError, match="two detectors are called 'run'"):
        load_detectors(str(run), None, compared=compared)
    one = ["TEST.DETECTIONS_PER_IMAGE", "1"]
    predictors = load_detectors(str(run), None, compared=compared[:1], opts_of_all=one)
    assert icons_only(predictors).startswith(
        "Trained on the miniature's rendered icons only: run, again."
    )
    said = unknown_to_icons(predictors, ["cup", "zebra", "red Elephant", "Cow"])
    assert "the 32 words of its world alone. What is found as 'zebra', 'red Elephant' is" in said
    assert not unknown_to_icons(predictors, ["cup", "Cow"])
    both = Detectors(predictors, DetectionFilter(), ["cup", "zebra"])
    assert both.vocabulary == predictors["again"].vocabulary == ("cup", "zebra")
    (found,) = both.detect([str(run.parent / "miniature" / "val" / "2.png")])
    assert both.best[0] == pytest.approx(float(found["run"].scores[0]))
    records = both.records(found)
    assert len(records["detections"]) == 1
    assert records["compared"] == {"again": records["detections"]}
    assert list(both.records({"run": found["run"]})) == ["detections"]
    examples = {"this": [run.parent / "miniature" / "val" / "2.png"]}
    for names, vocabulary in ((None, ("this",)), (["cup"], ("cup", "this"))):
        assert Detectors(predictors, DetectionFilter(), names, examples).vocabulary == vocabulary
        assert predictors["again"].vocabulary == vocabulary
