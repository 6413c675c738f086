"""Ending on a signal. The signals are real ones, sent to this process or to two others."""

import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as mp

import interrupted_processes
import tiny_training
import train_net
from hierkd.data.loader import await_main_process
from hierkd.modeling.detector import HierKD
from hierkd.training.interruption import SIGNALS, Interruption
from tiny_training import call_main, command_line

USED = (*SIGNALS, signal.SIGALRM)


@pytest.fixture(autouse=True)
def handlers_come_back():
    before = {each: signal.getsignal(each) for each in USED}
    yield
    after = {each: signal.getsignal(each) for each in USED}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert after == before


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
    with monkeypatch.context() as patch:
        signal_in(patch, signal.SIGTERM, call=4, training=True)
        evaluated = record_evaluations(patch)
        with pytest.raises(SystemExit) as stopped:
            train(folder, "last")
    assert stopped.value.code == 143
    assert evaluated == []  # though detectron2 evaluates after the last step, however it ended
    assert names(folder, "last") == ["model_0000001", "model_0000003", "model_final"]
    assert same(content(folder, "last"), finished)
    with monkeypatch.context() as patch:
        evaluated = record_evaluations(patch)
        train(folder, "last", "--resume")
    assert len(evaluated) == 2


def record_evaluations(monkeypatch):
    """The datasets that are evaluated to their end."""
    done, test = [], train_net.Trainer.test.__func__

    def recorded(cls, *args, **kwargs):
        results = test(cls, *args, **kwargs)
        done.extend(results)
        return results

    monkeypatch.setattr(train_net.Trainer, "test", classmethod(recorded))
    return done


@pytest.mark.parametrize("period", [0, 1], ids=["at the end", "on the way"])
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


def test_a_run_without_a_signal_saves_nothing_more(folder, finished):
    assert names(folder, "finished") == ["model_0000001", "model_0000003", "model_final"]


def test_a_run_that_was_stopped_behind_its_last_step_gets_its_final_file(folder, finished):
    # as after a kill between the last two checkpoints
    train(folder, "behind")
    (folder / "behind" / "model_final.pth").unlink()
    (folder / "behind" / "last_checkpoint").write_text("model_0000003.pth")
    train(folder, "behind", "--resume")
    assert same(content(folder, "behind"), finished)
    assert (folder / "behind" / "last_checkpoint").read_text() == "model_final.pth"


class FakeTrainer:
    """What the hook asks of a trainer."""

    def __init__(self):
        self.model = torch.nn.Linear(1, 1)
        self.iter, self.max_iter = 7, 10


def hook():
    """The hook, and the names under which it saved."""
    saved = []
    checkpointer = SimpleNamespace(
        saved_iteration=None,
        save=lambda name, **kwargs: saved.append((name, kwargs)),
        get_checkpoint_file=lambda: "somewhere.pth",
    )
    interruption = Interruption(checkpointer)
    interruption.trainer = FakeTrainer()
    return interruption, saved


def test_signals_that_are_ignored_stay_ignored():
    # as SIGINT is in a job that a shell has put into the background
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        interruption, saved = hook()
        with interruption.listening():
            os.kill(os.getpid(), signal.SIGINT)
            interruption.after_step()
        assert saved == []
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_launcher_may_repeat_the_signal(capfd):
    interruption, saved = hook()
    with interruption.listening():
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        with pytest.raises(SystemExit) as stopped:
            interruption.after_step()
    assert stopped.value.code == 143
    assert saved == [("model_0000007", {"iteration": 7})]
    assert capfd.readouterr().err.count("finishing this step") == 1


def test_outside_of_the_main_thread_nothing_is_handled():
    interruption, saved = hook()
    errors = []

    def work():
        try:
            with interruption.listening():
                interruption.after_step()
        except ValueError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert errors == []
    assert saved == []


def test_two_processes_stop_after_the_same_step(tmp_path):
    mp.spawn(interrupted_processes.process, (tmp_path,), interrupted_processes.NUM_PROCESSES)
    stopping = interrupted_processes.STOPPING
    for rank in range(interrupted_processes.NUM_PROCESSES):
        assert (tmp_path / f"status_{rank}").read_text() == "143"
        assert (tmp_path / f"steps_{rank}").read_text() == str(stopping)
    (saved,) = tmp_path.glob("model_*.pth")
    assert saved.name == f"model_{stopping:07d}.pth"


@pytest.mark.slow
def test_the_process_that_starts_others_waits_for_them(tmp_path):
    """A signal to it alone reaches both; it leaves after them, with their status and no traceback.

    What ``kill``, ``docker stop`` and batch systems do.
    """
    script = interrupted_processes.__file__
    with (tmp_path / "said.txt").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, script, str(tmp_path)], stdout=log, stderr=subprocess.STDOUT
        )
    try:
        until = time.monotonic() + 120
        while len(list(tmp_path.glob("steps_*"))) < 2:
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.1)
        process.send_signal(signal.SIGUSR1)
        status = process.wait(timeout=60)
    finally:
        process.kill()
    text = (tmp_path / "said.txt").read_text()
    assert status == 128 + signal.SIGUSR1, text
    assert "Traceback" not in text
    steps = {(tmp_path / f"steps_{rank}").read_text() for rank in range(2)}
    assert len(steps) == 1
    (saved,) = tmp_path.glob("model_*.pth")
    assert saved.name == f"model_{int(steps.pop()):07d}.pth"


def test_loader_processes_ignore_the_signals_but_do_not_stay_for_ever():
    child = os.fork()
    if child == 0:
        await_main_process(0)
        for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), number)
        remaining = signal.getitimer(signal.ITIMER_REAL)[0]
        if not 30 < remaining <= 60:
            os._exit(1)
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        signal.pause()
        os._exit(2)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGALRM
