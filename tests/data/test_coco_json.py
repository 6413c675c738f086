"""Reading and writing of JSON files."""

import json
import os

import pytest

from hierkd.data.coco_json import get_entries, index_by_id, read_coco_json
from hierkd.files import write_json_atomically


def test_reads_an_object_and_applies_the_hook(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"images": [{"id": 1, "junk": 2}]}')

    def drop_junk(entry):
        entry.pop("junk", None)
        return entry

    assert read_coco_json(path) == {"images": [{"id": 1, "junk": 2}]}
    assert read_coco_json(path, object_hook=drop_junk) == {"images": [{"id": 1}]}


def test_missing_file_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json does not exist\. Run make\."):
        read_coco_json(tmp_path / "none.json", missing_hint="Run make.")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        read_coco_json(tmp_path)


def test_truncated_file_names_the_position(tmp_path):
    whole = '{"images": [],\n "annotations": [{"id": 1}]}'
    path = tmp_path / "cut.json"
    path.write_text(whole[:30])
    with pytest.raises(
        ValueError, match=r"cut\.json is not valid JSON: .* line 2, column 16"
    ) as info:
        read_coco_json(path)
    assert "(character 30 of 30)" in str(info.value)


@pytest.mark.parametrize("text", [b"", b"\xff\xfe{}", b"[1, 2]"])
def test_not_an_object(tmp_path, text):
    path = tmp_path / "odd.json"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=r"odd\.json"):
        read_coco_json(path)


def test_entries_are_checked():
    fields = {"id": (int, str), "name": str}
    good = {"categories": [{"id": 1, "name": "cat"}]}
    assert get_entries(good, "categories", fields, "f.json") == [{"id": 1, "name": "cat"}]
    for bad, message in [
        ({}, r"f\.json: key 'categories' is missing; found \[\]"),
        ({"categories": {}}, "must be a list, found a dict"),
        ({"categories": [3]}, r"categories\[0\] must be an object, found a int"),
        ({"categories": [{"id": 1}]}, r"categories\[0\] has no 'name'; found \['id'\]"),
        (
            {"categories": [{"id": 1.5, "name": "a"}]},
            r"\['id'\] must be of type int or str, found 1.5",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            get_entries(bad, "categories", fields, "f.json")


def test_index_by_id_refuses_duplicates():
    assert index_by_id([{"id": 2}, {"id": "2"}], "images", "f.json") == {
        2: {"id": 2},
        "2": {"id": "2"},
    }
    with pytest.raises(ValueError, match=r"f\.json: id 7 occurs more than once in 'images'"):
        index_by_id([{"id": 7}, {"id": 7}], "images", "f.json")


def test_write_makes_folders_and_leaves_no_other_file(tmp_path):
    path = tmp_path / "new" / "a.json"
    write_json_atomically(path, {"a": [1, 2]})
    assert json.loads(path.read_text()) == {"a": [1, 2]}
    assert os.listdir(path.parent) == ["a.json"]


def test_interrupted_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text("old")

    def fail(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        write_json_atomically(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json_atomically(path, {"a": object()})
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_unchanged_file_is_left_alone(tmp_path):
    path = tmp_path / "a.json"
    assert write_json_atomically(path, {"a": "\u00e9"})
    os.utime(path, ns=(5, 5))
    assert not write_json_atomically(path, {"a": "\u00e9"})
    assert path.stat().st_mtime_ns == 5
    assert write_json_atomically(path, {"a": "e"})
    assert json.loads(path.read_text()) == {"a": "e"}


def test_broken_file_is_replaced(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"\xff\xfe\x00")  # not even text
    assert write_json_atomically(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}
