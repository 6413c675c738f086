"""What a dry run sees of COCO's files. Reading them is tested together with the recipe."""

import pytest

from hierkd.data.official_coco import describe_inputs, where_from
from hierkd.data.splits import COCO_2014, COCO_2017


@pytest.fixture
def coco(tmp_path):
    """The folder of a COCO without files."""
    (tmp_path / "coco" / "annotations").mkdir(parents=True)
    return tmp_path / "coco"


def look_at(coco, name, variant=COCO_2017):
    """Return state and detail of the input called ``name``."""
    (found,) = [each for each in describe_inputs(coco.parent, variant) if each.path.name == name]
    return found.state, found.detail


@pytest.mark.parametrize("variant", [COCO_2014, COCO_2017])
def test_names_and_archives_follow_the_year(tmp_path, variant):
    inputs = describe_inputs(tmp_path, variant)
    assert [str(each.path.relative_to(tmp_path / "coco")) for each in inputs] == [
        f"annotations/instances_train{variant.year}.json",
        f"annotations/instances_val{variant.year}.json",
        f"annotations/captions_train{variant.year}.json",
        f"train{variant.year}",
        f"val{variant.year}",
    ]
    assert {each.state for each in inputs} == {"MISSING"}
    assert len({each.archive for each in inputs}) == 3
    assert all(each.archive.url.endswith(f"{variant.year}.zip") for each in inputs)


def test_both_years_are_the_same_pictures():
    totals = [sum(variant.num_images.values()) for variant in (COCO_2014, COCO_2017)]
    assert totals == [123_287, 123_287]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"images": []}', ("found", "14 bytes")),
        (b'{"images": []}' + b"\n" * 9, ("found", "23 bytes")),
        (b'{"images": [' + b"1," * 500, ("PARTIAL", "cut off after 1,012 bytes")),
        (b"", ("PARTIAL", "0 bytes, and no JSON object")),
        (b"<html>404</html>", ("PARTIAL", "16 bytes, and no JSON object")),
    ],
)
def test_state_of_a_file(coco, content, expected):
    (coco / "annotations" / "instances_val2017.json").write_bytes(content)
    assert look_at(coco, "instances_val2017.json") == expected


def test_folder_and_file_mistaken_for_each_other(coco):
    (coco / "annotations" / "instances_val2017.json").mkdir()
    (coco / "val2017").touch()
    assert look_at(coco, "instances_val2017.json")[0] == "MISSING"
    assert look_at(coco, "val2017")[0] == "MISSING"


def test_state_of_a_folder(coco, monkeypatch):
    monkeypatch.setitem(COCO_2014.num_images, "val2014", 2)
    folder = coco / "val2014"
    folder.mkdir()
    (folder / "COCO_val2014_000000000042.jpg").touch()
    (folder / "COCO_val2014_000000000073.jpg.part").touch()  # a download under way
    text = "{} of the 2 pictures of the whole COCO"
    assert look_at(coco, "val2014", COCO_2014) == ("PARTIAL", text.format(1))
    (folder / "COCO_val2014_000000000073.jpg").touch()
    assert look_at(coco, "val2014", COCO_2014) == ("found", text.format(2))


def test_where_from(tmp_path):
    path = tmp_path / "coco" / "train2014"
    assert where_from(path) == (
        "Download http://images.cocodataset.org/zips/train2014.zip and unpack it so that "
        f"{path} exists."
    )
