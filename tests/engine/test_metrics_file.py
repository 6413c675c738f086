"""metrics.json as killed runs leave it."""

import json

import pytest
from detectron2.utils.events import EventStorage, JSONWriter

from hierkd.engine.metrics_file import mend_metrics, read_metric_lines

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
