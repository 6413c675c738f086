"""What the report of a run shows, of folders in every state; and that of the demo."""

import json
import math

import pytest
import torch
from detectron2.modeling import build_model

import hierkd.modeling.detector as meta_arch
from fake_teacher import FakeTeacher
from hierkd.inference.predictor import OpenVocabularyPredictor
from hierkd.load_config import load_config
from hierkd.reports import report
from hierkd.reports.gallery import COLORS
from hierkd.reports.page import Bar, Card, Page
from hierkd.reports.report import describe_run, write_demo_report
from hierkd.reports.run_record import read_run
from toy_world import NOVEL, VOCABULARY, register_toy_world

FIGURES = {
    "all_val/bbox/novel/AP50": 12.0, "all_val/bbox/novel/AR50": 13.0,
    "all_val/bbox/base/AP50": 34.0, "all_val/bbox/base/APl": math.nan,
    "all_val/bbox/all/AP50": 31.0, "all_val/bbox/AP50-bee": 11.0,
    "new_val/bbox/novel/AP50": 21.0, "new_val/bbox/AP50-bee": 33.3, "new_val/bbox/AP50-dog": 8.7,
}  # fmt: skip
MACHINE = {"processor": "A", "cores": 2, "gpus": []}
STARTS = [
    {"date": "1998", "iteration": 0, "commit": "abc", "hardware": MACHINE},
    {"date": "1999", "iteration": 20, "commit": "abd", "hardware": {**MACHINE, "gpus": ["B", "B"]}},
]


def write_run(folder, *, figures=FIGURES, starts=STARTS, config="SEED: 7\nSOLVER: {MAX_ITER: 80}"):
    folder.mkdir(parents=True)
    lines = [
        {"iteration": 19, "total_loss": 5.0, "loss_x": 1.0, "loss_cls": 3.0, "time": 0.5},
        {"iteration": 39, "total_loss": 4.0, "loss_x": 1.0, "loss_cls": 2.0, "time": 2.0},
        {"iteration": 39, "rank_data_time": 0.1, "data_time": 0.1, "eta_seconds": 3, "tau_c": 9.0},
        {"iteration": 40, "mine": 1.0},
        {"iteration": 20, **{name: value / 2 for name, value in figures.items()}},
        {"iteration": 40, **figures},
    ]
    (folder / "metrics.json").write_text("".join(json.dumps(each) + "\n" for each in lines))
    (folder / "config.yaml").write_text(config)
    (folder / "environment.json").write_text(json.dumps(starts))
    (folder / "last_checkpoint").write_text("model_0000019.pth")
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_run(tmp_path / "runs" / "first")


def sections(page: Page) -> dict:
    return {section.title: section for section in page.sections}


def test_a_run_is_described(folder):
    page = describe_run(read_run(folder), num_pictures=0)
    found = sections(page)
    assert page.title == "HierKD: first"
    assert list(found) == [
        *("", "Figures", "Losses", "Average precision over time"),
        *("What is learned beside the network", "Speed", "AP50 of each class"),
        *("Where it ran", "Config"),
    ]
    assert found[""].facts == {
        "State": "unfinished, at least 40 of 80 iterations; last checkpoint model_0000019.pth",
        "Begun": "1998",
        "Starts": "2, the last one 1999",
        "Commit": "abc → abd",
        "Training time": "0:00:50, without evaluations",  # 20 steps of 0.5 s, 20 of 2 s
        "Seed": "7",
    }
    assert found[""].cards == [
        Card("novel AP50, ZSD", 21.0, "new_val"),
        Card("novel AP50, GZSD", 12.0, "all_val"),
        Card("base AP50, GZSD", 34.0, "all_val"),
    ]
    table = found["Figures"].table
    assert table.headers == ["Test", "Classes", "Dataset", "AP50", "AR50", "APl"]
    assert str(table.rows) == str(  # NaN is unlike itself
        [
            ["ZSD", "novel", "new_val", 21.0, None, None],
            ["GZSD", "novel", "all_val", 12.0, 13.0, None],
            ["GZSD", "base", "all_val", 34.0, None, math.nan],
            ["GZSD", "all", "all_val", 31.0, None, None],
        ]
    )
    (before,) = found["Figures"].folded
    assert before.title == "in training, iteration 20"
    assert before.table.rows[0] == ["ZSD", "novel", "new_val", 10.5, None, None]


def test_curves_come_by_subject_and_classes_by_kind(folder):
    found = sections(describe_run(read_run(folder), num_pictures=0))
    assert [f.pictures[0].alternative for f in found["Losses"].figures] == [
        *("all losses together", "classification (Eq. 1)", "loss_x")
    ]
    assert [f.caption for f in found["Average precision over time"].figures] == [
        *("all_val", "new_val")
    ]
    assert len(found["Speed"].figures) == 2  # one process: the slowest one's time says no more
    learned = found["What is learned beside the network"].figures
    assert [f.caption for f in learned] == ["τ_c, factor of the class cosines (Eq. 1)", "mine"]
    classes = found["AP50 of each class"].table
    assert classes.headers == ["Class", "Kind", "new_val", "all_val"]
    blue = COLORS["correct"]
    assert classes.rows == [
        ["bee", "novel", Bar(33.3, blue), Bar(11.0, blue)],
        ["dog", "novel", Bar(8.7, blue), Bar(None, blue)],
    ]


def test_where_it_ran_and_which_keys_differ(folder):
    found = sections(describe_run(read_run(folder), num_pictures=0))
    ran = found["Where it ran"]
    assert ran.facts["Hardware"] == "processor A, cores 2, gpus B, B"
    assert [each.title for each in ran.folded] == ["Start 1 of 2"]
    assert ran.folded[0].facts["Hardware"] == "processor A, cores 2, gpus none"
    assert found["Config"].table.rows == [["SEED", "7", "-1"], ["SOLVER.MAX_ITER", "80", "40000"]]
    assert found["Config"].folded[0].code == "SEED: 7\nSOLVER: {MAX_ITER: 80}"


@pytest.mark.parametrize(
    ("change", "state"),
    [
        (lambda f: (f / "model_final.pth").touch(), "finished, 40 iterations"),
        (lambda f: (f / "config.yaml").write_text("SOLVER: {MAX_ITER: 40}"), "finished, 40"),
        (lambda f: (f / "config.yaml").unlink(), "unfinished, at least 40 iterations"),
        (lambda f: (f / "metrics.json").unlink(), "no step was recorded"),
    ],
)
def test_the_state_of_a_run(folder, change, state):
    change(folder)
    page = describe_run(read_run(folder), num_pictures=0)
    assert page.sections[0].facts["State"].startswith(state)


# ---------------------------------------------------------------------------------------- pictures


@pytest.fixture
def evaluated(tmp_path):
    """A run on the toy world, whose evaluation found the bee of picture 2, and a wrong dog."""
    dataset = register_toy_world(tmp_path / "world")
    run = write_run(tmp_path / "run", config=f"DATASETS: {{TEST: [{dataset}]}}\n")
    results = [
        {
            "image_id": 2,
            "category_id": 10 * (VOCABULARY.index(name) + 1),
            "bbox": box,
            "score": score,
        }
        for name, box, score in (("bee", [60, 20, 50, 70], 0.9), ("dog", [0, 0, 9, 9], 0.8))
    ]
    saved = run / "inference" / dataset / "coco_instances_results.json"
    saved.parent.mkdir(parents=True)
    saved.write_text(json.dumps(results))
    return run, dataset


@pytest.fixture
def drawn(monkeypatch):
    """Boxes that are drawn on each picture."""
    seen, draw = [], report.draw_sample

    def record(sample, boxes, **options):
        seen.append((sample.file_name[-5:], [(box.label, box.verdict) for box in boxes]))
        return draw(sample, boxes, **options)

    monkeypatch.setattr(report, "draw_sample", record)
    return seen


def test_pictures_are_those_of_the_last_evaluation(evaluated, drawn):
    run, dataset = evaluated
    page = describe_run(read_run(run), num_pictures=2)
    pictures = sections(page)["Ground truth beside detections"]
    assert page.sections[0].notes == []
    assert pictures.caption.startswith(f"{dataset}; detections of its last evaluation. ")
    assert [figure.caption for figure in pictures.figures] == ["2.png: bee", "3.png: dog"]
    assert [picture.label for picture in pictures.figures[0].pictures] == [
        *("ground truth", "detected")
    ]
    assert drawn == [
        ("2.png", [("bee", "correct"), ("ant", "uncounted")]),
        ("2.png", [("bee 90%", "correct")]),  # one novel object: the dog has no place
        ("3.png", [("dog", "correct")]),
        ("3.png", []),
    ]


def test_without_its_dataset_all_else_is_told(folder):
    (folder / "config.yaml").write_text("DATASETS: {TEST: [nowhere]}\n")
    page = describe_run(read_run(folder))
    (note,) = [note for note in page.sections[0].notes if "pictures" in note]
    assert "none of the datasets in DATASETS.TEST is registered" in note
    assert "Ground truth beside detections" not in sections(page)


def test_the_report_of_the_demo(evaluated, tmp_path, monkeypatch):
    run, dataset = evaluated
    cfg = load_config(
        "configs/miniature/hierkd.yaml", ["MODEL.DEVICE", "cpu", "DATASETS.TRAIN", "()"]
    )
    teacher = FakeTeacher(cfg.MODEL.TEXT_CLASSIFIER.EMBED_DIM)
    monkeypatch.setattr(meta_arch, "build_teacher", lambda cfg: teacher)
    torch.manual_seed(0)
    model = build_model(cfg)
    model.set_vocabulary(["something else"])
    predictor = OpenVocabularyPredictor(model=model, min_size=128, max_size=128, image_format="RGB")
    pages = []
    monkeypatch.setattr(report, "write_page", lambda path, page: pages.append(page))
    rows = [("ZSD", "novel", 10, 10.5, 30), ("GZSD", "novel", 20, None, 40)]
    rows += [("GZSD", "base", 21.0, 21.5, 41.0), ("GZSD", "all", 22.0, 22.5, 42.0)]
    facts = {"commit": "0123abc", "seconds": {"train": 12.3, "total": 20}}
    write_demo_report(
        tmp_path / "report.html", rows, facts,
        run_dir=run, predictor=predictor, dataset_name=dataset, num_pictures=3,
        stored={"the paper": (1.0, 2.0, 3.0, 4.0)},
    )  # fmt: skip
    assert predictor.vocabulary == ("something else",)
    (page,) = pages
    best, figures, _, *_ = page.sections
    found = sections(page)
    assert f"boxes of {len(VOCABULARY) - len(NOVEL)} classes" in page.lead
    assert [figure.title for figure in best.figures] == ["bee"]
    assert best.caption.endswith("Not found at all: dog.")
    assert [card.value for card in figures.cards] == [21.0, 12.0, 34.0]
    assert figures.table.rows == rows
    assert found["Beside other recipes"].table.rows == [
        ["this run", 10, 20, 21.0, 22.0],
        ["the paper", 1.0, 2.0, 3.0, 4.0],
    ]
    captions = [figure.caption for figure in found["Ground truth beside detections"].figures]
    assert captions == ["2.png: bee", "3.png: dog", "4.png: bee, dog"]
    heat_maps = found["Where each level sees a class"].figures
    assert [figure.pictures[0].alternative for figure in heat_maps] == [
        f"heat maps of {names}" for names in ("bee", "dog", "bee, dog")
    ]
    assert found["How it was made"].facts == {
        "Commit": "0123abc",
        "Seconds": "train 12.3, total 20",
    }
    assert (tmp_path / "overview.jpg").is_file()
