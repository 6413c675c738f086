"""train_net.py as a whole: train, stop, resume, evaluate, on a world of six pictures.

Most runs are calls of ``train_net.main``; one is a command line in a process of its own.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tiny_training
from hierkd import OpenVocabularyPredictor
from hierkd.miniature.world import MINIATURE_BASE, MINIATURE_CLASSES
from hierkd.teachers.clip import CLIPTeacher
from hierkd.training.trainer import Trainer
from tiny_training import call_main, command_line

ROOT = Path(__file__).resolve().parents[1]
EVALUATED = ("miniature_ovd_val_novel", "miniature_ovd_val_all")

# Nothing may warn in a run, but for what hierkd itself silences, and files detectron2 leaves open.
pytestmark = [
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore:.*`?torch.jit.script`? is deprecated"),
    pytest.mark.filterwarnings("ignore:torch.meshgrid. in an upcoming release"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


class CrashError(Exception):
    """Stands for a crash in the middle of a run."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A world and a CLIP; the miniature's dataset names mean this world while the module runs."""
    with tiny_training.prepared(tmp_path_factory.mktemp("training")) as root:
        yield root


@pytest.fixture(scope="module")
def train(folder):
    """Train into a folder of the given name; return the folder and the figures at the end."""

    def _train(name, *extra):
        call_main(command_line(folder / name, folder / "clip.pt", *extra))
        last = metrics(folder / name)[-1]
        return folder / name, {k: v for k, v in last.items() if k.startswith("miniature_")}

    return _train


@pytest.fixture(scope="module")
def finished(train):
    """A run of four iterations without interruption."""
    return train("finished")


def weights(output, name="model_final.pth"):
    return torch.load(output / name, weights_only=True)["model"]


def differing(a, b):
    """Names of the weights that are not the same to the last bit."""
    assert a.keys() == b.keys()
    return [name for name, value in a.items() if not torch.equal(value, b[name])]


def metrics(output):
    return [json.loads(line) for line in (output / "metrics.json").read_text().splitlines()]


def flat(results):
    return {
        f"{dataset}/{task}/{key}": value
        for dataset, tasks in results.items()
        for task, values in tasks.items()
        for key, value in values.items()
    }


def same_figures(a, b):
    assert a.keys() == b.keys()
    unequal = [k for k in a if a[k] != b[k] and not (math.isnan(a[k]) and math.isnan(b[k]))]
    assert unequal == []


# ------------------------------------------------------------------------------- what a run leaves


def test_files_of_a_run(finished):
    output, _ = finished
    names = {path.name for path in output.iterdir()}
    assert {"model_0000001.pth", "model_0000003.pth", "model_final.pth"} <= names
    assert (output / "last_checkpoint").read_text() == "model_final.pth"
    assert "config.yaml" in names
    log = (output / "log.txt").read_text()
    assert "Loaded 6 images with 7 boxes" in log
    assert "Loading CLIP " in log
    (events,) = output.glob("events.out.tfevents.*")
    assert events.stat().st_size > 1000


def test_the_checkpoint_is_the_detector_alone(finished):
    output, _ = finished
    content = torch.load(output / "model_final.pth", weights_only=True)
    assert set(content) == {"model", "trainer", "iteration", "teacher_trace"}
    top_level = {name.split(".")[0] for name in content["model"]}
    assert top_level == {"backbone", "head", "text_classifier", "mlca", "cls_loss_log_weight"}
    of_text = {name for name in content["model"] if name.startswith("text_classifier")}
    assert of_text == {"text_classifier.background_embedding", "text_classifier.logit_scale"}
    # the random CLIP's 49,408 token embeddings alone are 12 MB
    assert (output / "model_final.pth").stat().st_size < 2_000_000


# ------------------------------------------------------------------------------------- same or not


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_after_a_crash_changes_nothing(train, finished, monkeypatch, workers):
    name, loading = f"resumed_{workers}", ("DATALOADER.NUM_WORKERS", str(workers))
    run_step = Trainer.run_step

    def crash_in_the_third(self):
        if self.iter == 2:
            raise CrashError
        run_step(self)

    monkeypatch.setattr(Trainer, "run_step", crash_in_the_third)
    with pytest.raises(CrashError):
        train(name, *loading)
    monkeypatch.setattr(Trainer, "run_step", run_step)
    output, figures = train(name, "--resume", *loading)
    assert differing(weights(output), weights(finished[0])) == []
    same_figures(figures, finished[1])
    # also what is not in the weights: the moments of the optimizer and the schedule
    ours, theirs = (
        torch.load(each / "model_final.pth", weights_only=True)["trainer"]
        for each in (output, finished[0])
    )
    assert ours["iteration"] == theirs["iteration"] == 3
    assert ours["hooks"]["LRScheduler"] == theirs["hooks"]["LRScheduler"]
    moments, expected = (each["_trainer"]["optimizer"]["state"] for each in (ours, theirs))
    assert moments.keys() == expected.keys()
    for key, values in expected.items():
        assert all(torch.equal(moments[key][k], value) for k, value in values.items())


def test_resuming_a_finished_run(train):
    output, figures = train("again")
    before, log = weights(output), output / "log.txt"
    # it only evaluates
    _, repeated = train("again", "--resume")
    same_figures(repeated, figures)
    assert "The training has done its 4 iterations already" in log.read_text()
    # with the state of another training it does not go on
    for changed in (("SOLVER.OPTIMIZER", "SGD"), ("MODEL.GKD.LOSS_WEIGHT", "0.0")):
        with pytest.raises(ValueError, match="--resume: the checkpoint is of another training"):
            train("again", "--resume", "SOLVER.MAX_ITER", "6", *changed)
    assert differing(weights(output), before) == []
    assert "the images are others" not in log.read_text()
    # with another order of the data it does, and says so
    train("again", "--resume", "SOLVER.MAX_ITER", "5", "SEED", "3", "SOLVER.IMS_PER_BATCH", "4")
    assert "--resume: SEED is 3 and was 0: from here on the images are others" in log.read_text()
    assert "--resume: SOLVER.IMS_PER_BATCH is 4 and was 2" in log.read_text()
    assert "the number of processes" not in log.read_text()


# -------------------------------------------------------------------------------------- evaluation


def evaluate(folder, output, checkpoint, *extra):
    flags = [each for each in extra if each.startswith("--")]
    pairs = ("MODEL.WEIGHTS", str(checkpoint), *extra[len(flags) :])
    return call_main(command_line(output, folder / "clip.pt", "--eval-only", *flags, *pairs))


def test_eval_only_repeats_the_figures_without_clip(folder, finished, monkeypatch):
    output, figures = finished

    def refuse(self):
        raise AssertionError("CLIP was loaded, though the text cache has every answer")

    monkeypatch.setattr(CLIPTeacher, "_clip", refuse)
    results = evaluate(folder, folder / "evaluation", output / "model_final.pth")
    assert tuple(results) == EVALUATED
    same_figures(flat(results), figures)
    assert not list((folder / "evaluation").glob("*.pth"))


def test_evaluating_in_a_trainings_folder_leaves_its_config_and_log(folder, train):
    output, figures = train("kept")
    names = ("config.yaml", "log.txt", "metrics.json")
    before = [(output / name).read_bytes() for name in names]
    changed = ("TEST.DETECTIONS_PER_IMAGE", "3", "MODEL.WEIGHTS", "")
    results = evaluate(folder, output, "", "--resume", *changed)
    assert flat(results).keys() == figures.keys()
    assert [(output / name).read_bytes() for name in names] == before
    assert "DETECTIONS_PER_IMAGE: 3" in (output / "inference" / "config.yaml").read_text()
    assert "Evaluat" in (output / "inference" / "log.txt").read_text()
    record = json.loads((output / "evaluations.json").read_text())
    assert record[-1]["weights"] == str(output / "model_final.pth")


def test_a_run_that_was_moved_needs_no_teacher(folder, finished, tmp_path, monkeypatch):
    """Its folder alone, from elsewhere; for other names than its own, CLIP has to be beside it."""
    run = shutil.copytree(finished[0], tmp_path / "moved" / "run")
    config = (run / "config.yaml").read_text().replace(str(folder), "/gone")
    (run / "config.yaml").write_text(config)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HIERKD_CACHE", str(tmp_path / "cache"))
    evaluate = ["--eval-only", "MODEL.WEIGHTS", str(run / "model_final.pth")]
    results = call_main(["--config-file", str(run / "config.yaml"), *evaluate])
    same_figures(flat(results), finished[1])
    assert not Path("/gone").exists()
    predictor = OpenVocabularyPredictor.from_checkpoint("moved/run", opts=["DATASETS.TEST", ()])
    assert predictor.vocabulary == MINIATURE_CLASSES  # of what it left, of no dataset
    with pytest.raises(
        FileNotFoundError, match=r"not hold .*dragon.*'/gone/clip\.pt'.*for 'clip\.pt'"
    ):
        predictor.set_vocabulary([MINIATURE_BASE[0], "dragon"])
    shutil.copy(folder / "clip.pt", run)
    found = OpenVocabularyPredictor.from_checkpoint("moved/run")
    found.set_vocabulary(["dragon", MINIATURE_BASE[0]])
    rows = found.model.text_classifier.text_embeddings
    clip = CLIPTeacher(str(folder / "clip.pt"), device="cpu")
    torch.testing.assert_close(rows, clip.encode_classes(["dragon", MINIATURE_BASE[0]]))


def test_random_weights_are_not_evaluated(folder, tmp_path):
    with pytest.raises(ValueError, match="is no trained detector of this config: it lacks"):
        evaluate(folder, tmp_path / "random", "")


# ------------------------------------------------------------------------------------ proposals


@pytest.fixture(scope="module")
def proposed(train):
    """A class-agnostic RPN (Table 1), trained and evaluated."""
    return train("proposals", *PROPOSALS)


PROPOSALS = (
    *("--config-file=configs/miniature/rpn.yaml", "DATASETS.TEST", "('miniature_ovd_val_all',)"),
    *("MODEL.RPN.CONV_DIMS", "[16]"),
)


def test_a_class_agnostic_rpn_trains_and_is_scored_on_base_and_novel_boxes(proposed):
    output, figures = proposed
    prefix = "miniature_ovd_val_all/box_proposals/"
    recalls = {k.removeprefix(prefix): v for k, v in figures.items() if k.startswith(prefix)}
    groups = ("base", "novel", "all")
    assert set(recalls) == {
        f"{g}/AR{iou}@{n}" for g in groups for iou in (50, 75) for n in (100, 300, 1000)
    }
    for group in groups:
        at = [recalls[f"{group}/AR50@{n}"] for n in (100, 300, 1000)]
        assert 0 < at[0] <= at[1] <= at[2] <= 100
    # 7 base and 3 novel boxes
    assert recalls["all/AR50@100"] == pytest.approx(
        (7 * recalls["base/AR50@100"] + 3 * recalls["novel/AR50@100"]) / 10
    )
    early, late = weights(output, "model_0000001.pth"), weights(output)
    assert {k.split(".")[0] for k in late} == {"backbone", "proposal_generator"}
    assert "proposal_generator.rpn_head.objectness_logits.weight" in differing(early, late)
    merged = {key for line in metrics(output) for key in line}
    assert {"loss_rpn_cls", "loss_rpn_loc"} <= merged


# ---------------------------------------------------------------------------- from the command line


def test_command_line(folder, finished, tmp_path):
    # "val" is read through the catalog that importing hierkd fills from DETECTRON2_DATASETS
    environment = {
        **os.environ,
        "DETECTRON2_DATASETS": str(folder),
        "HIERKD_CACHE": str(tmp_path / "cache"),
    }
    done = subprocess.run(
        [sys.executable, "train_net.py", *command_line(tmp_path / "out", folder / "clip.pt")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert "WARNING" not in done.stdout
    assert "eta: " in done.stdout
    # a person reads the screen, a program the log
    before = done.stdout.partition("Starting training")[0].splitlines()
    assert 10 < len(before) < 60
    assert sum("Full config saved to" in line for line in before) == 1
    assert "MAX_ITER" in (tmp_path / "out" / "log.txt").read_text()
    assert differing(weights(tmp_path / "out"), weights(finished[0])) == []
