"""A number that is not finite stops a run before the optimizer sees it, and can be seen again."""

import json
import math
import re

import pytest
import torch
import torch.multiprocessing
from detectron2.engine import SimpleTrainer
from detectron2.structures import Boxes, Instances
from non_finite_processes import NUM_PROCESSES, ToyDetector, build_trainer, images, process

import tiny_training
from hierkd.checkpoint import HierKDCheckpointer
from hierkd.training.non_finite import NonFiniteError, pack_batch, unpack_batch
from hierkd.training.replay import read_dump
from tiny_training import call_main, command_line
from tools import replay


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


# ------------------------------------------------------------------------------- one step by itself


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_and_is_named(tmp_path, value):
    trainer = build_trainer(tmp_path, [images(), images(offset=value)])
    trainer.train(0, 1)
    before = state_of(trainer.model)
    with pytest.raises(NonFiniteError) as caught:
        trainer.train(1, 2)
    message = str(caught.value)
    assert message.startswith(f"iteration 1: loss_b is {value}; images 0.png, 1.png, 2.png")
    assert "loss_a" not in message
    assert same(state_of(trainer.model), before)  # with the means of batch normalisation
    dump = read_dump(tmp_path / "iteration_0000001.pth")
    assert same(dump["model"], before)
    assert dump["iteration"] == dump["trainer"]["iteration"] == 0
    assert dump["non_finite"]["images"] == ["0.png", "1.png", "2.png"]


def test_gradients_alone_stop_the_run_and_are_named(tmp_path):
    trainer = build_trainer(tmp_path, [images(), images(steep=True)])
    trainer.train(0, 1)
    before = state_of(trainer.model)
    with pytest.raises(
        NonFiniteError, match=r"iteration 1: the losses are finite, gradients are"
    ) as caught:
        trainer.train(1, 2)
    assert "layer.weight" in str(caught.value)
    assert "layer.bias" not in str(caught.value)
    assert same(state_of(trainer.model), before)
    assert read_dump(tmp_path / "iteration_0000001.pth")["non_finite"]["gradients"] == [
        "layer.weight"
    ]


def test_without_the_guard_the_weights_are_lost(tmp_path):
    """What the guard is there for: detectron2 itself looks at the losses alone."""
    model = ToyDetector()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    SimpleTrainer(model, [images(steep=True)], optimizer).train(0, 1)
    assert not model.layer.weight.isfinite().all()


def test_huge_but_finite_gradients_are_no_fault(tmp_path):
    trainer = build_trainer(tmp_path, [images()])
    trainer.model.norm = torch.nn.Identity()
    for p in trainer.model.parameters():
        p.register_hook(lambda gradient: torch.full_like(gradient, 1e30))  # its square is infinite
    trainer.train(0, 1)
    assert list(tmp_path.iterdir()) == []
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_the_guard_changes_no_number(tmp_path):
    batches = [images(count) for count in (3, 4, 5)]
    guarded = build_trainer(tmp_path, batches)
    guarded.train(0, 3)
    torch.manual_seed(0)
    model = ToyDetector()
    SimpleTrainer(model, batches, torch.optim.SGD(model.parameters(), lr=1.0)).train(0, 3)
    assert same(state_of(model), state_of(guarded.model))


# -------------------------------------------------------------------------------- mixed precision


class ScaledTrainer(SimpleTrainer):
    """detectron2's AMPTrainer on a CPU: the same calls of the scaler."""

    def __init__(self, *args, scale=2.0**16):
        super().__init__(*args)
        self.grad_scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10_000)

    def run_step(self):
        data = next(self._data_loader_iter)
        losses = self.model(data)
        self.optimizer.zero_grad()
        self.grad_scaler.scale(sum(losses.values())).backward()
        self.after_backward()
        self._write_metrics(losses, 0.0)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()


def test_an_overflow_of_scaled_gradients_is_skipped_and_counted(tmp_path, caplog):
    batches = [images() for _ in range(24)]
    trainer = build_trainer(tmp_path, batches, ScaledTrainer, scale=2.0**127)
    trainer.optimizer.param_groups[0]["lr"] = 1e-6
    for p in trainer.model.parameters():
        p.register_hook(lambda gradient: 64 * gradient)
    trainer.train(0, 24)
    lowered = round(127 - math.log2(trainer.grad_scaler.get_scale()))
    assert 0 < lowered < 20
    assert trainer.storage.history("amp_skipped_steps").latest() == lowered
    skips = [r.getMessage() for r in caplog.records if "AMP overflow" in r.getMessage()]
    assert len(skips) == lowered
    assert "iteration 0 did not fit" in skips[0]
    assert list(tmp_path.iterdir()) == []


def test_endless_skipping_is_no_overflow(tmp_path):
    trainer = build_trainer(tmp_path, [images(steep=True)] * 40, ScaledTrainer)
    before = state_of(trainer.model)
    with pytest.raises(NonFiniteError, match=r"25 steps in a row were skipped .* layer.weight"):
        trainer.train(0, 40)
    assert trainer.iter == 25
    assert torch.equal(trainer.model.layer.weight, before["layer.weight"])


def test_an_infinite_loss_is_no_overflow_either(tmp_path):
    trainer = build_trainer(tmp_path, [images(offset=math.inf)], ScaledTrainer)
    with pytest.raises(NonFiniteError, match="iteration 0: loss_b is inf"):
        trainer.train(0, 1)
    assert read_dump(tmp_path / "iteration_0000000.pth")["non_finite"]["half_precision"]


# ---------------------------------------------------------------------------- several processes


def test_all_processes_end_and_know_whose_images(tmp_path):
    wrong = {"offset": math.inf}  # which the gradients that the processes share do not show
    torch.multiprocessing.start_processes(
        process, args=(tmp_path, wrong), nprocs=NUM_PROCESSES, start_method="fork"
    )
    for rank in range(NUM_PROCESSES):
        message = (tmp_path / f"{rank}.txt").read_text()
        assert message.startswith("NonFiniteError: iteration 1: process 1: loss_b is ")
        assert "process 0" not in message
    assert [path.name for path in tmp_path.glob("*.pth")] == ["iteration_0000001_process1.pth"]


# ----------------------------------------------------------------------------- the real training


@pytest.fixture(scope="module")
def exploded(tmp_path_factory):
    """A run whose learning rate is far too high: the second step is not finite."""
    root = tmp_path_factory.mktemp("exploded")
    tiny_training.write_world(root)
    tiny_training.write_clip(root / "clip.pt")
    extra = ["SOLVER.BASE_LR", "1e25", "SOLVER.OPTIMIZER", "SGD", "SOLVER.WARMUP_ITERS", "0"]
    arguments = command_line(
        root / "output", root / "clip.pt", *extra, "SOLVER.CHECKPOINT_PERIOD", "1"
    )
    with pytest.MonkeyPatch.context() as patch, tiny_training.miniature_at(root):
        patch.setenv("HIERKD_CACHE", str(root / "cache"))
        patch.setenv("PYTHONHASHSEED", "0")
        with pytest.raises(NonFiniteError) as caught:
            call_main(arguments)
        yield root / "output", str(caught.value)


def test_training_stops_at_the_step(exploded):
    output, message = exploded
    assert message.startswith("iteration 1: loss_")
    assert len(re.findall(r"\d\.png", message)) == 2
    (path,) = (output / "non_finite").iterdir()
    assert str(path) in message
    assert (output / "last_checkpoint").read_text() == "model_0000000.pth"
    dump = read_dump(path)
    before = torch.load(output / "model_0000000.pth", weights_only=True)
    for weights in (dump["model"], before["model"]):
        del weights["text_classifier.logit_scale"]  # brought into its range at once
        del weights["mlca.logit_scale"]
    assert same(dump["model"], before["model"])
    assert json.dumps(dump["trainer"]["_trainer"]["iteration"]) == "0"


def test_the_dump_is_a_checkpoint(exploded):
    output, _ = exploded
    (path,) = (output / "non_finite").iterdir()
    model = torch.nn.Linear(1, 1)
    loaded = HierKDCheckpointer(model).load(str(path))
    assert loaded["iteration"] == 0


def test_replay_shows_the_same_losses(exploded, capsys):
    output, message = exploded
    (path,) = (output / "non_finite").iterdir()
    assert replay.main([str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "iteration 1"
    table = {line.split("  ")[0].split("/")[-1].strip(): line.split()[1:] for line in lines[3:]}
    in_training = next(line for line in lines if line.startswith("in training")).split()[2:]
    here = next(line for line in lines if line.startswith("here")).split()[1:]
    assert in_training == here
    assert len(here) == 6
    bad = re.search(r"not finite here: (.*)", lines[-2]).group(1).split(", ")
    assert bad == re.findall(r"(loss_\w+) is", message)
    assert sum(name.endswith(".png") for name in table) == 2


def test_replay_of_weights_that_are_fine_says_so(exploded, tmp_path, capsys):
    output, _ = exploded
    (path,) = (output / "non_finite").iterdir()
    dump = torch.load(path, weights_only=True)
    dump["model"] = {
        name: value if "running_var" in name else torch.full_like(value, 0.01)
        for name, value in dump["model"].items()
    }
    for name, value in dump["model"].items():
        if "running_var" in name:
            value.fill_(1.0)
    torch.save(dump, tmp_path / "fine.pth")
    assert replay.main([str(tmp_path / "fine.pth")]) == 1
    assert "losses that are not finite here: none" in capsys.readouterr().out


def test_what_is_no_dump_is_refused(exploded, tmp_path, capsys):
    output, _ = exploded
    assert replay.main([str(tmp_path / "missing.pth")]) == 2
    assert "no file" in capsys.readouterr().err
    assert replay.main([str(output / "model_0000000.pth")]) == 2
    assert "is no dump" in capsys.readouterr().err
    (tmp_path / "broken.pth").write_bytes(b"no dump at all")
    assert replay.main([str(tmp_path / "broken.pth")]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_a_batch_comes_back():
    instances = Instances((4, 6))
    instances.gt_boxes = Boxes(torch.rand(2, 4))
    instances.gt_classes = torch.tensor([1, 0])
    batch = [{"image": torch.zeros(3, 4, 6), "instances": instances, "caption": "ü", "height": 4}]
    (back,) = unpack_batch(pack_batch(batch))
    assert back["caption"] == "ü"
    assert back["height"] == 4
    assert torch.equal(back["image"], batch[0]["image"])
    assert back["instances"].image_size == (4, 6)
    assert torch.equal(back["instances"].gt_boxes.tensor, instances.gt_boxes.tensor)
    assert torch.equal(back["instances"].gt_classes, instances.gt_classes)
