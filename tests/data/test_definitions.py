"""The YAML of a dataset: what it says, and that every mistake names the file and the key."""

import pytest

from hierkd.data.definitions import caption_of, read_definition

GOOD = """
name: fruit
train: {json: t.json, images: train, captions: c.json}
val: {json: v.json, images: /pictures/val}
base: [apple, pear]
novel: [kiwi]
rename: {pear: nashi pear}
"""


@pytest.fixture
def write(tmp_path):
    def write_yaml(text):
        path = tmp_path / "fruit.yaml"
        path.write_text(text)
        return path

    return write_yaml


def test_what_it_says(write, tmp_path):
    fruit = read_definition(write(GOOD))
    assert fruit.train is not None
    assert fruit.val is not None
    assert (fruit.train.json, fruit.train.captions) == (tmp_path / "t.json", tmp_path / "c.json")
    assert str(fruit.val.images) == "/pictures/val"
    assert list(fruit.groups) == ["base", "novel", "all"]
    assert fruit.spoken("pear") == "nashi pear"
    assert fruit.spoken("red_apple") == "red_apple"
    assert fruit.detections_per_image is None
    assert not fruit.lvis


def test_lvis_reads_underscores_as_spaces_and_takes_300_detections(write):
    lvis = read_definition(write("name: l\nformat: lvis\nval: {json: v.json, images: .}\n"))
    assert lvis.spoken("bow_(weapon)") == "bow (weapon)"
    assert lvis.detections_per_image == 300
    assert list(lvis.groups) == ["all"]
    assert not lvis.has_split


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("name: fruit", "name: a/b"), "'name'"),
        (("novel:", "novle:"), "did you mean 'novel'"),
        (("novel: [kiwi]", "novel: [kiwi, no]"), "found False"),
        (("novel: [kiwi]", "novel: [7]"), "in quotes"),
        (("novel: [kiwi]", "novel: [kiwi, apple]"), "both base and novel: \\['apple'\\]"),
        (("novel: [kiwi]", "novel: kiwi"), "must be a list"),
        (("base: [apple, pear]", "base: [apple, apple]"), "repeats \\['apple'\\]"),
        (("base: [apple, pear]", ""), "'train' needs 'base'"),
        (("json: v.json, ", ""), "'val' has no 'json'"),
        (("captions: c.json", "captions: [1]"), "train.captions must be a path"),
        (("name: fruit", "name: fruit\nformat: voc"), "'format' must be one of"),
        (("name: fruit", "name: fruit\nformat: lvis"), "leave 'train' out"),
        (("name: fruit", "name: fruit\ndetections_per_image: -1"), "'detections_per_image'"),
        (("name: fruit", "name: fruit\ncaption_template: hello"), "must have one {}"),
        (("{pear: nashi pear}", "{pear: 3}"), "'rename' must map"),
        (("[kiwi]", "[kiwi"), "is not YAML"),
    ],
)
def test_mistakes_are_named(write, change, words):
    assert change[0] in GOOD
    path = write(GOOD.replace(*change))
    with pytest.raises(ValueError, match=words) as caught:
        read_definition(path)
    assert "fruit.yaml" in str(caught.value)


def test_yaml_cannot_run_code(write, tmp_path):
    mark = tmp_path / "ran"
    path = write(f"name: !!python/object/apply:os.system ['touch {mark}']\n")
    with pytest.raises(ValueError, match="is not YAML"):
        read_definition(path)
    assert not mark.exists()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        read_definition(tmp_path / "nothing.yaml")


def test_captions_of_names():
    assert caption_of(["cat"], "a photo of {}.") == "a photo of a cat."
    assert caption_of(["cat", "apple", "dog"], "{}!") == "a cat, an apple and a dog!"
