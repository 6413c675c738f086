"""tools/run_demo.py: following a training from outside, and failing with its last words."""

import subprocess
import sys

import pytest

from tools import run_demo

LINES = (
    '{"iteration": 5, "miniature_ovd_test_novel/bbox/novel/AP50": 1.0}\n'
    '{"iteration": 9, "miniature_ovd_test_novel/bbox/novel/AP50": 2.0,'
    ' "miniature_ovd_test_all/bbox/base/AP50": NaN, "total_loss": 3.0}\n{"iteration": 19, "tot'
)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "metrics.json").write_text(LINES)
    return tmp_path


def process(code):
    return subprocess.Popen([sys.executable, "-c", code])


def test_a_step_is_timed_for_the_estimate():
    assert 0 < run_demo.seconds_of_a_step(1) < 60


def test_the_figures_are_those_of_the_last_evaluation(folder):
    figures = run_demo.read_evaluation(process("pass"), folder)
    assert figures[run_demo.DATASETS["zsd"]] == {"novel/AP50": 2.0}
    assert list(figures[run_demo.DATASETS["gzsd"]]) == ["base/AP50"]


def test_following_ends_with_the_last_iteration_or_the_process(folder):
    run_demo.follow_training(process("pass"), folder / "nothing yet", max_iter=10)
    running = process("import time; time.sleep(60)")
    try:
        run_demo.follow_training(running, folder, max_iter=10)
        assert running.poll() is None  # it returned although the process goes on
    finally:
        running.kill()
        running.wait()


def test_a_training_that_fails_shows_its_last_words_and_forgets_earlier_metrics(
    folder, capsys, monkeypatch
):
    (folder / "train_net.py").write_text("print(*range(100), sep='\\nline '); raise SystemExit(3)")
    monkeypatch.setattr(run_demo, "ROOT", folder)
    run = run_demo.start_training("x.yaml", folder, [])
    with pytest.raises(SystemExit, match=r"status 3: see .*stdout\.txt"):
        run_demo.read_evaluation(run, folder)
    printed = capsys.readouterr().out
    assert "line 99" in printed
    assert "line 50" not in printed
    assert not (folder / "metrics.json").exists()
