"""Hooks of a training: signals are real ones, and infinite numbers arise in real steps."""

import math
import os
import re
import signal

import pytest
import torch
from detectron2.engine import SimpleTrainer
from torch import nn

import tiny_training
from hierkd.checkpoint import HierKDCheckpointer
from hierkd.modeling.detector import HierKD
from hierkd.training.hooks import SIGNALS, FiniteGuard, Interruption, NonFiniteError
from tiny_training import call_main, command_line

# ------------------------------------------------------------------------------------- signals


@pytest.fixture(autouse=True)
def handlers_come_back():
    before = [signal.getsignal(each) for each in SIGNALS]
    yield
    assert [signal.getsignal(each) for each in SIGNALS] == before


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with tiny_training.prepared(tmp_path_factory.mktemp("interruption")) as root:
        yield root


def train(folder, name, *extra):
    return call_main(command_line(folder / name, folder / "clip.pt", *extra))


def content(folder, name):
    return torch.load(folder / name / "model_final.pth", weights_only=True)


@pytest.fixture(scope="module")
def finished(folder):
    train(folder, "finished")
    assert names(folder, "finished") == ["model_0000001", "model_0000003", "model_final"]
    return content(folder, "finished")


def signal_in(monkeypatch, number, *, call, training):
    """Send a signal to this process in the given call of the model."""
    forward, calls = HierKD.forward, []

    def signalling(self, inputs):
        if self.training == training:
            calls.append(None)
            if len(calls) == call:
                os.kill(os.getpid(), number)
        return forward(self, inputs)

    monkeypatch.setattr(HierKD, "forward", signalling)
    return calls


def names(folder, name):
    return sorted(path.stem for path in (folder / name).glob("model_*.pth"))


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("number", SIGNALS, ids=lambda each: each.name)
def test_the_step_is_finished_saved_and_taken_up_again(
    folder, finished, monkeypatch, caplog, capfd, number
):
    name = number.name
    with monkeypatch.context() as patch:
        calls = signal_in(patch, number, call=3, training=True)
        with pytest.raises(SystemExit) as stopped:
            train(folder, name)
    assert stopped.value.code == 128 + number
    assert len(calls) == 3
    assert names(folder, name) == ["model_0000001", "model_0000002"]
    log = (folder / name / "log.txt").read_text()
    assert f"{number.name}: stopped after iteration 3 of 4." in log
    assert str(folder / name / "model_0000002.pth") in log
    assert "Traceback" not in log
    assert f"{number.name}: finishing this step" in capfd.readouterr().err
    train(folder, name, "--resume")
    assert names(folder, name) == ["model_0000001", "model_0000002", "model_0000003", "model_final"]
    assert same(content(folder, name), finished)


def test_a_signal_in_the_last_step(folder, finished, monkeypatch):
    def evaluated():
        return len(list((folder / "last").rglob("coco_instances_results.json")))

    with monkeypatch.context() as patch:
        signal_in(patch, signal.SIGTERM, call=4, training=True)
        with pytest.raises(SystemExit) as stopped:
            train(folder, "last")
    assert stopped.value.code == 143
    assert evaluated() == 0  # though detectron2 evaluates after the last step, however it ended
    assert names(folder, "last") == ["model_0000001", "model_0000003", "model_final"]
    assert same(content(folder, "last"), finished)
    train(folder, "last", "--resume")
    assert evaluated() == 2


@pytest.mark.parametrize("period", [0, 1])  # at the end, or on the way
def test_an_evaluation_is_not_waited_for(folder, finished, monkeypatch, period):
    name = f"evaluation {period}"
    with monkeypatch.context() as patch:
        calls = signal_in(patch, signal.SIGTERM, call=2, training=False)
        with pytest.raises(SystemExit) as stopped:
            train(folder, name, "TEST.EVAL_PERIOD", str(period), "TEST.IMS_PER_BATCH", "1")
    assert stopped.value.code == 143
    assert len(calls) == 2  # of 12 at the end, of 48 on the way
    assert names(folder, name)[0] == ("model_0000000" if period else "model_0000001")
    train(folder, name, "--resume")
    assert same(content(folder, name), finished)


def test_a_run_that_was_stopped_behind_its_last_step_gets_its_final_file(folder, finished):
    # as after a kill between the last two checkpoints
    train(folder, "behind")
    (folder / "behind" / "model_final.pth").unlink()
    (folder / "behind" / "last_checkpoint").write_text("model_0000003.pth")
    train(folder, "behind", "--resume")
    assert same(content(folder, "behind"), finished)
    assert (folder / "behind" / "last_checkpoint").read_text() == "model_final.pth"


def test_a_launcher_may_repeat_the_signal_of_a_terminal(capfd):
    interruption = Interruption(HierKDCheckpointer(nn.Linear(1, 1)))
    for _ in range(2):
        interruption._handle(signal.SIGINT, None)
    assert capfd.readouterr().err.count("finishing this step") == 1


# ------------------------------------------------------------------------------- finite numbers


class ToyDetector(nn.Module):
    """Two losses of one weight; an image says what goes wrong with it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, batch):
        x = torch.stack([sample["image"] for sample in batch])
        loss = self.layer(x).square().mean()
        offset = sum(sample.get("offset", 0.0) for sample in batch)  # no gradient
        steep = (0.0 * self.layer.weight).sum().abs().sqrt()  # 0, and its derivative is NaN
        wrong = steep if any(sample.get("steep") for sample in batch) else 0.0 * steep.detach()
        return {"loss_a": loss, "loss_b": loss + offset + wrong}


def images(count=3, **wrong):
    """A batch; ``wrong`` goes to its last image."""
    generator = torch.Generator().manual_seed(0)
    batch = [
        {"image": torch.randn(1, generator=generator), "file_name": f"{i}.png"}
        for i in range(count)
    ]
    batch[-1] |= wrong
    return batch


class ScaledTrainer(SimpleTrainer):
    """detectron2's AMPTrainer on a CPU: the same calls of the scaler."""

    def __init__(self, *args):
        super().__init__(*args)
        self.grad_scaler = torch.amp.GradScaler("cpu")

    def run_step(self):
        losses = self.model(next(self._data_loader_iter))
        self.optimizer.zero_grad()
        self.grad_scaler.scale(sum(losses.values())).backward()
        self.after_backward()
        self._write_metrics(losses, 0.0)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()


def guarded(batches, trainer_class=SimpleTrainer):
    torch.manual_seed(0)
    model = ToyDetector()
    trainer = trainer_class(model, batches, torch.optim.SGD(model.parameters(), lr=1.0))
    trainer.register_hooks([FiniteGuard(model)])
    return trainer


WRONG = {
    "inf": ({"offset": math.inf}, "loss_b is inf"),
    "nan": ({"offset": math.nan}, "loss_b is nan"),
    "gradient": ({"steep": True}, "the losses are finite, the gradients of layer.weight are not"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_not_finite_stops_the_run_and_is_named(case):
    wrong, told = WRONG[case]
    trainer = guarded([images(), images(**wrong)])
    trainer.train(0, 1)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    with pytest.raises(NonFiniteError) as caught:
        trainer.train(1, 2)
    expected = f"iteration 1: in process 0, {told}; its images are 0.png, 1.png, 2.png. "
    assert str(caught.value).startswith(expected)
    assert same(trainer.model.state_dict(), before)


def test_the_guard_takes_huge_numbers():
    trainer = guarded([images()])
    for p in trainer.model.parameters():
        p.register_hook(lambda gradient: torch.full_like(gradient, 1e30))  # its square is infinite
    trainer.train(0, 1)


def test_endless_skipping_is_no_overflow():
    trainer = guarded([images(steep=True)] * 40, ScaledTrainer)
    before = trainer.model.layer.weight.clone()
    with pytest.raises(NonFiniteError, match="no overflow of half precision"):
        trainer.train(0, 40)
    assert 20 < trainer.iter < 30
    assert torch.equal(trainer.model.layer.weight, before)


def test_training_stops_at_the_step(folder):
    extra = ["SOLVER.BASE_LR", "1e25", "SOLVER.OPTIMIZER", "SGD", "SOLVER.WARMUP_ITERS", "0"]
    with pytest.raises(NonFiniteError) as caught:
        train(folder, "exploded", *extra, "SOLVER.CHECKPOINT_PERIOD", "1")
    assert str(caught.value).startswith("iteration 1: in process 0, loss_")
    assert len(re.findall(r"\d\.png", str(caught.value))) == 2
    assert (folder / "exploded" / "last_checkpoint").read_text() == "model_0000000.pth"
    assert names(folder, "exploded") == ["model_0000000"]
