"""tools/run_demo.py: following a training from outside, and failing with its last words."""

import subprocess
import sys

import pytest

from tools import run_demo


def process(code):
    return subprocess.Popen([sys.executable, "-c", code])


def write_lines(folder, text):
    (folder / "metrics.json").write_text(text)


def test_half_written_line_is_left_for_later(tmp_path):
    assert run_demo.read_last_metrics(tmp_path) == {}
    write_lines(tmp_path, '{"iteration": 19')
    assert run_demo.read_last_metrics(tmp_path) == {}
    write_lines(tmp_path, '{"iteration": 19}\n{"iteration": 39, "tot')
    assert run_demo.read_last_metrics(tmp_path) == {"iteration": 19}


def test_figures_come_from_the_last_line_without_the_datasets_name(tmp_path):
    write_lines(
        tmp_path,
        '{"iteration": 5, "miniature_ovd_test_novel/bbox/novel/AP50": 1.0}\n'
        '{"iteration": 9, "miniature_ovd_test_novel/bbox/novel/AP50": 2.0,'
        ' "miniature_ovd_test_all/bbox/base/AP50": NaN, "total_loss": 3.0}\n',
    )
    figures = run_demo.read_evaluation(process("pass"), tmp_path)
    assert figures[run_demo.ZSD] == {"novel/AP50": 2.0}
    assert list(figures[run_demo.GZSD]) == ["base/AP50"]


def test_failure_shows_the_end_of_the_log_and_names_it(tmp_path, capsys):
    (tmp_path / "stdout.txt").write_text("\n".join(f"line {i}" for i in range(100)))
    with pytest.raises(SystemExit, match=r"status 3: see .*stdout\.txt"):
        run_demo.read_evaluation(process("raise SystemExit(3)"), tmp_path)
    printed = capsys.readouterr().out
    assert "line 99" in printed
    assert "line 50" not in printed


def test_following_ends_with_the_last_iteration(tmp_path):
    write_lines(tmp_path, '{"iteration": 9, "total_loss": 1.5}\n')
    running = process("import time; time.sleep(60)")
    try:
        run_demo.follow_training(running, tmp_path, max_iter=10)
        assert running.poll() is None  # it returned although the process goes on
    finally:
        running.kill()
        running.wait()


def test_following_ends_with_the_process(tmp_path):
    run_demo.follow_training(process("pass"), tmp_path, max_iter=10)


def test_training_of_an_unknown_config_fails_with_its_message(tmp_path, capsys):
    run = run_demo.start_training("nowhere.yaml", tmp_path / "run", [])
    with pytest.raises(SystemExit):
        run_demo.read_evaluation(run, tmp_path / "run")
    assert "nowhere.yaml" in capsys.readouterr().out


def test_metrics_of_an_earlier_run_are_not_read_again(tmp_path):
    write_lines(tmp_path, '{"iteration": 599}\n')
    run_demo.start_training("nowhere.yaml", tmp_path, []).wait()
    assert run_demo.read_last_metrics(tmp_path) == {}


def test_stages_are_numbered_and_timed(capsys):
    stages = run_demo.Stages()
    with stages("train", "Training"):
        pass
    assert f"/{len(run_demo.STAGES)}] Training" in capsys.readouterr().out
    assert 0 <= stages.seconds["train"] <= stages.total
