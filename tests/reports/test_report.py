"""The report and results.json: complete, self-contained, escaped."""

import json
import math
import re
from html.parser import HTMLParser

import pytest
import torch
from detectron2.modeling import build_model

import hierkd.modeling.detector as meta_arch
from fake_teacher import FakeTeacher
from hierkd.experiments.results import collect_results, summary_rows, write_results
from hierkd.inference.predictor import OpenVocabularyPredictor
from hierkd.load_config import load_config
from hierkd.reports.report import write_report
from toy_world import NOVEL, VOCABULARY, register_toy_world

GROUPS = ("novel", "base", "all")


def metrics(start, groups=GROUPS):
    """Distinct figures: novel AP50 is ``start``, AR50 ``start + .5``, the next group one more."""
    values = {}
    for k, group in enumerate(groups):
        values |= {f"{group}/AP50": start + k, f"{group}/AR50": start + k + 0.5}
    return {**values, "novel/AP": 99.0, "AP50-ant": 98.0}


@pytest.fixture
def results():
    return collect_results(
        zsd=metrics(10, ("novel",)),
        gzsd=metrics(20),
        upper_bound_zsd=metrics(30, ("novel",)),
        upper_bound_gzsd=metrics(40),
        config="configs/<miniature>.yaml",
        seed=7,
        commit="0123abc",
        seconds={"train": 12.345},
    )


def test_results_have_the_promised_layout(results, tmp_path):
    write_results(tmp_path / "new" / "results.json", results)
    assert json.loads((tmp_path / "new" / "results.json").read_text()) == {
        "zsd": {"novel": {"AP50": 10, "AR50": 10.5}},
        "gzsd": {
            "novel": {"AP50": 20, "AR50": 20.5},
            "base": {"AP50": 21, "AR50": 21.5},
            "all": {"AP50": 22, "AR50": 22.5},
        },
        "upper_bound": {
            "zsd": {"novel": {"AP50": 30, "AR50": 30.5}},
            "gzsd": {
                "novel": {"AP50": 40, "AR50": 40.5},
                "base": {"AP50": 41, "AR50": 41.5},
                "all": {"AP50": 42, "AR50": 42.5},
            },
        },
        "config": "configs/<miniature>.yaml",
        "seed": 7,
        "commit": "0123abc",
        "seconds": {"train": 12.3},
    }


def test_what_cannot_be_computed_is_null(tmp_path):
    empty = dict.fromkeys(metrics(0), math.nan)
    results = collect_results(
        zsd=empty, gzsd=empty, upper_bound_zsd=empty, upper_bound_gzsd=empty,
        config="", seed=0, commit="", seconds={},
    )  # fmt: skip
    write_results(tmp_path / "results.json", results)
    assert json.loads((tmp_path / "results.json").read_text())["zsd"]["novel"]["AP50"] is None


def test_summary_lists_every_figure_once(results):
    rows = summary_rows(results)
    assert rows[0] == ("ZSD", "novel", 10, 10.5, 30)
    assert [row[1:] for row in rows[1:]] == [
        ("novel", 20, 20.5, 40), ("base", 21, 21.5, 41), ("all", 22, 22.5, 42)
    ]  # fmt: skip


def write_metrics(folder, *entries):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").write_text("".join(json.dumps(e) + "\n" for e in entries))


class Page(HTMLParser):
    """Collects what a page would fetch, and checks that its tags pair up."""

    VOID = frozenset({"meta", "img", "br"})

    def __init__(self, text):
        super().__init__()
        self.sources, self.open, self.texts = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert tag not in {"script", "link", "iframe"}
        self.sources += [value for key, value in attrs if key in {"src", "href"}]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture
def report(results, tmp_path, monkeypatch):
    """Report of an untrained detector on the toy world."""
    dataset = register_toy_world(tmp_path / "world")
    cfg = load_config(
        "configs/miniature/hierkd.yaml", ["MODEL.DEVICE", "cpu", "DATASETS.TRAIN", "()"]
    )
    teacher = FakeTeacher(cfg.MODEL.TEXT_CLASSIFIER.EMBED_DIM)
    monkeypatch.setattr(meta_arch, "build_teacher", lambda cfg: teacher)
    torch.manual_seed(0)
    model = build_model(cfg)
    model.set_vocabulary(["something else"])
    predictor = OpenVocabularyPredictor(model=model, min_size=128, max_size=128, image_format="RGB")
    write_metrics(
        tmp_path / "run",
        {"iteration": 19, "loss_cls": 3.0, "total_loss": 5.0},
        {"iteration": 39, "loss_cls": 2.0, "total_loss": 4.0},
    )
    path = tmp_path / "out" / "report.html"
    write_report(
        path,
        results,
        run_dir=tmp_path / "run",
        predictor=predictor,
        dataset_name=dataset,
        num_examples=3,
    )
    assert predictor.vocabulary == ("something else",)
    return path.read_text(encoding="utf-8")


def test_report_is_one_file_that_fetches_nothing(report):
    page = Page(report)
    assert page.sources
    assert all(
        s.startswith(("data:image/jpeg;base64,", "data:image/svg+xml;base64,"))
        for s in page.sources
    )
    assert not re.search(r"url\(|@import|https?:", report)


def test_report_shows_the_figures_and_where_they_come_from(report, results):
    text = " ".join(Page(report).texts)
    for _, _, *values in summary_rows(results):
        assert all(f"{value:.1f}" in text for value in values)
    for part in ("0123abc", "12.3", "miniature", "never had a box", "one run with one"):
        assert part in re.sub(r"\s+", " ", text)
    assert f"boxes of {len(VOCABULARY) - len(NOVEL)} classes" in text


def test_report_escapes_what_it_is_given(report):
    assert "<miniature>" not in report
    assert "configs/&lt;miniature&gt;.yaml" in report


def test_report_has_the_pictures(report):
    pairs = report.count('class="pair"')
    assert pairs == 3
    assert report.count('alt="ground truth"') == report.count('alt="detections"') == pairs
    # Pictures 2, 3 and 4 are chosen: bee; dog; bee and dog. A row for each class of each.
    assert report.count('class="grid four heat"') == 4
    assert report.count("data:image/svg+xml") == 2  # two losses
