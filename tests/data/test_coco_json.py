"""Reading annotation files: each way in which one can be wrong, and the word that must be named."""

import copy
import json

import pytest

from hierkd.data.coco_json import read_annotations, read_coco_json

GOOD = {
    "images": [
        {"id": 9, "file_name": "b.jpg", "height": 100, "width": 200, "captions": ["a tv"]},
        {"id": 4, "file_name": "sub/a.jpg", "height": 50, "width": 60},
    ],
    "annotations": [
        {"id": 1, "image_id": 9, "category_id": 72, "bbox": [10, 20, 30, 40], "iscrowd": 1},
        {"id": 2, "image_id": 4, "category_id": 1, "bbox": [0.5, 0.5, 10.25, 3], "area": None},
    ],
    "categories": [{"id": 72, "name": "tv"}, {"id": 1, "name": "person"}],
}
GONE = object()


@pytest.fixture
def read(tmp_path):
    """Read the good file, or one with the value at a path (keys) replaced or gone."""

    def write_and_read(*path, value=None, encoding="utf-8"):
        content = copy.deepcopy(GOOD)
        at = content
        for key in path[:-1]:
            at = at[key]
        if value is GONE:
            del at[path[-1]]
        elif path:
            at[path[-1]] = value
        (tmp_path / "set.json").write_text(json.dumps(content), encoding=encoding)
        return read_annotations(tmp_path / "set.json")

    return write_and_read


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_good_file_stays_as_it_is(read, encoding):
    assert read(encoding=encoding) == GOOD


@pytest.mark.parametrize(
    ("path", "value", "word"),
    [
        (("images",), GONE, r"'images' is missing; found \['annotations'"),
        (("categories",), {}, "'categories' must be a list, found a dict"),
        (("images",), [], "'images' is empty"),
        (("categories",), [], "'categories' is empty"),
        (("categories", 1), 3, r"categories\[1\] must be an object, found 3"),
        (("images", 1, "file_name"), GONE, r"images\[1\] has no 'file_name'"),
        (("images", 1, "file_name"), "../a.jpg", "'file_name' of image 4"),
        *(
            (("images", 1, "file_name"), name, "'file_name' of image 4")
            for name in ("/a.jpg", "s/../../a.jpg", "..\\a.jpg", "a\0.jpg", "")
        ),
        (("images", 1, "width"), 0, "image 4 must be positive, found 0 x 50"),
        (("images", 1, "width"), "60", r"images\[1\]\['width'\] .* type int, found '60'"),
        (("images", 1, "width"), True, "type int, found True"),
        (("images", 1, "id"), 9, "id 9 occurs more than once in 'images'"),
        (("images", 1, "id"), "4", "all be numbers or all be strings, found 9, '4'"),
        (("images", 1, "id"), None, r"images\[1\]\['id'\] must be of type int or str"),
        (("images", 0, "captions"), "a tv", "'captions' of image 9"),
        (("annotations", 1, "id"), 1, "id 1 occurs more than once in 'annotations'"),
        (("annotations", 1, "id"), 2**63, r"annotations\[1\]\['id'\] .* 64 bits"),
        (("annotations", 1, "image_id"), 77, "annotation 2 has image_id 77, which"),
        (("annotations", 1, "image_id"), "4", "image_id '4', .* contains 4, .* of another type"),
        (("annotations", 1, "category_id"), 0, "annotation 2 has category_id 0, which"),
        (("annotations", 1, "bbox"), GONE, r"annotations\[1\] has no 'bbox'"),
        (("annotations", 1, "bbox"), [1, 2, 3], r"annotation 2 must be four .* \[1, 2, 3\]"),
        (("annotations", 1, "bbox"), [1, 2, 3, "4"], "annotation 2 must be four numbers"),
        (("annotations", 1, "iscrowd"), 2, "annotation 2: 'iscrowd' must be 0 or 1, found 2"),
        (("annotations", 1, "area"), float("nan"), "annotation 2: 'area' must be a finite"),
        (("annotations", 1, "bbox"), [1, 2, 3, 10**400], "annotation 2 must be four numbers"),
        (("categories", 1, "id"), 72, "id 72 occurs more than once in 'categories'"),
        (("categories", 1, "name"), "tv", "several 'categories' are called 'tv'"),
        (("categories", 1, "name"), 5, r"categories\[1\]\['name'\] must be of type str, found 5"),
    ],
)
def test_what_is_wrong_is_named(read, path, value, word):
    with pytest.raises(ValueError, match=word) as caught:
        read(*path, value=value)
    assert "set.json: " in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value"),
    [(("images", 1, "width"), 60.0), (("annotations", 0, "category_id"), 72.0)],
)
def test_whole_numbers_may_be_written_with_a_point(read, path, value):
    assert json.dumps(read(*path, value=value)) == json.dumps(GOOD)


def test_lvis_names_pictures_by_their_address(tmp_path):
    content = copy.deepcopy(GOOD)
    del content["images"][0]["file_name"]
    content["images"][0]["coco_url"] = "http://images.cocodataset.org/val2017/000000000139.jpg"
    (tmp_path / "lvis.json").write_text(json.dumps(content))
    images = read_annotations(tmp_path / "lvis.json")["images"]
    assert [image["file_name"] for image in images] == ["val2017/000000000139.jpg", "sub/a.jpg"]


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b'{"images": [],\n "annotations"', r"not valid JSON: .*line 2 column 15"),
        (b"", "not valid JSON.* completely"),
        (b'{"id": 1}\n{"id": 2}', "no JSON Lines"),
        (b"\xff\xfe{}", "not a UTF-8 text file"),
        (b"[1, 2]", "found a list at the top level"),
        (b"[" * 100_000, "not valid JSON"),
        (b"9" * 5000, "not valid JSON"),
    ],
)
def test_no_json_object(tmp_path, data, word):
    (tmp_path / "odd.json").write_bytes(data)
    with pytest.raises(ValueError, match=word) as caught:
        read_coco_json(tmp_path / "odd.json")
    assert "odd.json" in str(caught.value)


def test_no_file_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.json does not exist\. Run make\."):
        read_coco_json(tmp_path / "none.json", missing_hint="Run make.")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        read_coco_json(tmp_path)
