"""metrics.json as killed runs leave it."""

import json

import pytest
from detectron2.utils.events import EventStorage, JSONWriter

from hierkd.reports.metrics import mend_metrics, read_run_metrics

TEXT = '{"iteration": 19, "total_loss": 2.5}\n{"iteration": 39, "total_loss": 1.5}\n'


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.json"


def read(path, *entries):
    path.write_text("".join(json.dumps(each) + "\n" for each in entries))
    return read_run_metrics(path)


def test_every_place_at_which_writing_can_stop(path):
    lines = TEXT.splitlines(keepends=True)
    for length in range(len(TEXT) + 1):
        path.write_text(TEXT[:length])
        whole = TEXT[:length].count("\n")
        found = read_run_metrics(path)
        assert found.curves.get("total_loss", ([], []))[1] == [2.5, 1.5][:whole]
        mend_metrics(path)
        assert path.read_text() == "".join(lines[:whole])


def test_what_detectron2_appends_to_a_mended_file_can_be_read(path, caplog):
    mend_metrics(path)
    assert not path.exists()
    path.write_bytes(TEXT.encode() + '{"iteration": 59, "ü'.encode()[:-1])
    mend_metrics(path)
    assert f"{path}: cut off the last line" in caplog.text
    with EventStorage(40) as storage:
        writer = JSONWriter(str(path))
        storage.put_scalar("total_loss", 1.25)
        writer.write()
        writer.close()
    assert read_run_metrics(path).curves == {"total_loss": ([19, 39, 40], [2.5, 1.5, 1.25])}


def test_curves_of_a_run_that_went_back(path):
    found = read(
        path,
        {"iteration": 19, "total_loss": 5.0, "lr": 0.1},
        {"iteration": 39, "total_loss": 4.0, "lr": 0.2},
        {"iteration": 39, "val/bbox/AP50": 11.0},
        {"iteration": 59, "total_loss": 3.0, "lr": 0.3},
        {"iteration": 59, "val/bbox/AP50": 12.0},
        {"iteration": 39, "total_loss": 3.5, "lr": 0.25},  # resumed from the step before 39
    )
    assert found.curves == {"total_loss": ([19, 39], [5.0, 3.5]), "lr": ([19, 39], [0.1, 0.25])}


def test_one_writing_may_tell_of_an_evaluation_after_later_losses(path):
    found = read(
        path,
        {"iteration": 19, "total_loss": 5.0},
        {"iteration": 39, "total_loss": 4.0},
        {"iteration": 29, "val/bbox/AP50": 12.0},
        {"iteration": 59, "total_loss": 3.0},
        {"iteration": 49, "val/bbox/AP50": 11.0, "val/bbox/AP": 5.0},
        {"iteration": 49, "val/bbox/AP50": 13.0},  # evaluated again
    )
    assert found.curves["total_loss"] == ([19, 39, 59], [5.0, 4.0, 3.0])
    assert found.curves["val/bbox/AP50"] == ([29, 49], [12.0, 13.0])
    evaluations = {49: {"val/bbox/AP50": 13.0, "val/bbox/AP": 5.0}, 29: {"val/bbox/AP50": 12.0}}
    assert found.evaluations == evaluations
    assert list(found.evaluations) == [49, 29]


@pytest.mark.parametrize("line", ["not JSON", "[1, 2]", '{"total_loss": 1.0}'])
def test_a_broken_line_is_named(path, line):
    with pytest.raises(FileNotFoundError, match=r"metrics\.json"):
        read_run_metrics(path)
    path.write_text(f"{TEXT}{line}\n")
    with pytest.raises(ValueError, match=r"metrics\.json, line 3: expected an object"):
        read_run_metrics(path)
