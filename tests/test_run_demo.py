"""tools/run_demo.py: following a training from outside, and failing with its last words."""

import subprocess
import sys

import pytest

from tools import run_demo


def process(code):
    return subprocess.Popen([sys.executable, "-c", code])


def write_lines(folder, text):
    (folder / "metrics.json").write_text(text)


def test_the_figures_are_those_of_the_last_evaluation(tmp_path):
    write_lines(
        tmp_path,
        '{"iteration": 5, "miniature_ovd_test_novel/bbox/novel/AP50": 1.0}\n'
        '{"iteration": 9, "miniature_ovd_test_novel/bbox/novel/AP50": 2.0,'
        ' "miniature_ovd_test_all/bbox/base/AP50": NaN, "total_loss": 3.0}\n',
    )
    figures = run_demo.read_evaluation(process("pass"), tmp_path)
    assert figures[run_demo.DATASETS["zsd"]] == {"novel/AP50": 2.0}
    assert list(figures[run_demo.DATASETS["gzsd"]]) == ["base/AP50"]


def test_following_ends_with_the_last_iteration(tmp_path):
    write_lines(tmp_path, '{"iteration": 9, "total_loss": 1.5}\n{"iteration": 19, "tot')
    running = process("import time; time.sleep(60)")
    try:
        run_demo.follow_training(running, tmp_path, max_iter=10)
        assert running.poll() is None  # it returned although the process goes on
    finally:
        running.kill()
        running.wait()


def test_following_ends_with_the_process(tmp_path):
    run_demo.follow_training(process("pass"), tmp_path, max_iter=10)


def test_a_training_that_fails_shows_its_last_words_and_forgets_earlier_metrics(tmp_path, capsys):
    write_lines(tmp_path, '{"iteration": 599}\n')
    run = run_demo.start_training("nowhere.yaml", tmp_path, [])
    with pytest.raises(SystemExit, match=r"status \d: see .*stdout\.txt"):
        run_demo.read_evaluation(run, tmp_path)
    assert "nowhere.yaml" in capsys.readouterr().out
    assert not (tmp_path / "metrics.json").exists()


def test_only_the_end_of_a_long_log_is_shown(tmp_path, capsys):
    (tmp_path / "stdout.txt").write_text("\n".join(f"line {i}" for i in range(100)))
    with pytest.raises(SystemExit, match="status 3"):
        run_demo.read_evaluation(process("raise SystemExit(3)"), tmp_path)
    printed = capsys.readouterr().out
    assert "line 99" in printed
    assert "line 50" not in printed


def test_stages_are_numbered_and_timed(capsys):
    stages = run_demo.Stages()
    with stages("train", "Training"):
        pass
    assert f"[2/{len(run_demo.STAGES)}] Training" in capsys.readouterr().out
    assert 0 <= stages.seconds["train"] < 1
