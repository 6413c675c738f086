"""metrics.json as killed runs leave it."""

import json
import math

import pytest
from detectron2.utils.events import EventStorage, JSONWriter

from hierkd.reports.metrics import mend_metrics, read_metric_lines, read_run_metrics

WHOLE = [{"iteration": 19, "total_loss": 2.5}, {"iteration": 39, "total_loss": 1.5}]
TEXT = "".join(json.dumps(each) + "\n" for each in WHOLE)


def test_every_place_at_which_writing_can_stop(tmp_path):
    path = tmp_path / "metrics.json"
    for length in range(len(TEXT) + 1):
        path.write_text(TEXT[:length])
        expected = WHOLE[: TEXT[:length].count("\n")]
        assert read_metric_lines(path) == expected
        mend_metrics(path)
        assert path.read_text() == "".join(json.dumps(each) + "\n" for each in expected)


def test_what_detectron2_appends_to_a_mended_file_can_be_read(tmp_path, caplog):
    path = tmp_path / "metrics.json"
    path.write_text(TEXT + '{"iteration": 59, "tot')
    mend_metrics(path)
    assert f"{path}: cut off the last line" in caplog.text
    with EventStorage(40) as storage:
        writer = JSONWriter(str(path))
        storage.put_scalar("total_loss", 1.25)
        writer.write()
        writer.close()
    assert read_metric_lines(path) == [*WHOLE, {"iteration": 40, "total_loss": 1.25}]


def test_a_character_cut_in_two(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_bytes(TEXT.encode() + '{"ü'.encode()[:-1])
    assert read_metric_lines(path) == WHOLE


@pytest.mark.parametrize("line", ["nothing", '{"a": 1', "[1]", "3"])
def test_a_broken_line_before_the_last_is_named(tmp_path, line):
    (tmp_path / "metrics.json").write_text(f"{TEXT}{line}\n{TEXT}")
    with pytest.raises(ValueError, match=r"metrics\.json, line 3: not JSON"):
        read_metric_lines(tmp_path / "metrics.json")


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metrics\.json"):
        read_metric_lines(tmp_path / "metrics.json")
    mend_metrics(tmp_path / "metrics.json")
    assert list(tmp_path.iterdir()) == []


def write_lines(path, *entries):
    path.write_text("".join(json.dumps(each) + "\n" for each in entries))
    return path


def test_curves_of_a_run_that_went_back(tmp_path):
    path = write_lines(
        tmp_path / "metrics.json",
        {"iteration": 19, "total_loss": 5.0, "lr": 0.1},
        {"iteration": 39, "total_loss": 4.0, "lr": 0.2},
        {"iteration": 59, "total_loss": 3.0, "lr": 0.3},
        {"iteration": 59, "val/bbox/AP50": 12.0},
        {"iteration": 39, "total_loss": 3.5, "lr": 0.25},  # resumed from the step before 39
    )
    found = read_run_metrics(path)
    assert dict(found.curves) == {
        "total_loss": ([19, 39], [5.0, 3.5]),
        "lr": ([19, 39], [0.1, 0.25]),
    }
    assert (found.num_restarts, found.num_broken) == (1, 0)


def test_one_writing_may_tell_of_an_evaluation_after_later_losses(tmp_path):
    path = write_lines(
        tmp_path / "metrics.json",
        {"iteration": 19, "total_loss": 5.0},
        {"iteration": 39, "total_loss": 4.0},
        {"iteration": 29, "val/bbox/AP50": 12.0},
        {"iteration": 59, "total_loss": 3.0},
        {"iteration": 49, "val/bbox/AP50": 13.0},
    )
    found = read_run_metrics(path)
    assert found.curves["total_loss"] == ([19, 39, 59], [5.0, 4.0, 3.0])
    assert found.curves["val/bbox/AP50"] == ([29, 49], [12.0, 13.0])
    assert found.num_restarts == 0


def test_evaluating_again_replaces_the_figures(tmp_path):
    path = write_lines(
        tmp_path / "metrics.json",
        {"iteration": 19, "total_loss": 5.0},
        {"iteration": 20, "val/bbox/AP50": 12.0},
        {"iteration": 20, "val/bbox/AP50": 13.0},
    )
    found = read_run_metrics(path)
    assert found.curves["val/bbox/AP50"] == ([20], [13.0])
    assert found.curves["total_loss"] == ([19], [5.0])


def test_broken_lines_are_skipped_and_counted(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text(
        '{"iteration": 19, "total_loss": NaN, "note": "x", "flag": true, "none": null}\n'
        'not JSON\n[1, 2]\n{"total_loss": 1.0}\n{"iteration": "39", "total_loss": 1.0}\n\n'
        f'{{"iteration": 39, "total_loss": 2.0, "huge": 1{400 * "0"}}}\n{{"iteration": 59, "tot'
    )
    found = read_run_metrics(path)
    assert found.num_broken == 5
    assert found.curves.keys() == {"total_loss", "huge"}
    iterations, (first, second) = found.curves["total_loss"]
    assert iterations == [19, 39]
    assert math.isnan(first)
    assert second == 2.0
    assert found.curves["huge"] == ([39], [math.inf])


def test_no_metrics_is_an_error_that_names_them(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metrics\.json"):
        read_run_metrics(tmp_path / "metrics.json")
