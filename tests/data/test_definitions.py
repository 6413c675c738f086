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
clean_names:
"""


@pytest.fixture
def read(tmp_path):
    def write_and_read(text):
        (tmp_path / "fruit.yaml").write_text(text, encoding="utf-8-sig")
        return read_definition(tmp_path / "fruit.yaml")

    return write_and_read


def test_what_it_says(read, tmp_path):
    fruit = read(GOOD)
    assert fruit.path == tmp_path / "fruit.yaml"
    assert fruit.train.json_file == tmp_path / "t.json"
    assert fruit.train.captions == tmp_path / "c.json"
    assert not fruit.train.make_captions
    assert str(fruit.val.images) == "/pictures/val"
    assert fruit.parts("train") == {"train_base": ["apple", "pear"]}
    assert list(fruit.parts("val")) == ["val_base", "val_novel", "val_all"]
    assert fruit.spoken("pear") == "nashi pear"
    assert fruit.spoken("red_apple") == "red_apple"
    assert read(GOOD.replace("c.json", "from_class_names")).train.make_captions


def test_lvis_reads_underscores_as_spaces_and_takes_300_detections(read):
    lvis = read("name: l\nformat: lvis\nval: {json: v.json, images: .}\n")
    assert lvis.spoken("bow_(weapon)") == "bow (weapon)"
    assert lvis.detections_per_image == 300
    assert lvis.parts("val") == {"val_all": []}
    own = read(
        "name: l\nformat: lvis\nval: {json: v.json, images: .}\nclean_names: false\n"
        "detections_per_image: 7\n"
    )
    assert (own.spoken("a_b"), own.detections_per_image) == ("a_b", 7)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("name: fruit", "name: a/b", "name: .* found 'a/b'"),
        ("name: fruit", "", "name: "),
        ("name: fruit", "names: [apple]", "key of YOLO.s data.yaml"),
        ("novel:", "novle:", "novle: is no key here; known are name, .* novel,.*found"),
        ("json: v.json", "json: v.json, captions: c", "val.captions: is no key here"),
        ("novel: [kiwi]", "novel: [kiwi, no]", r"novel.1: .*in quotes.*, found False"),
        ("novel: [kiwi]", "novel: [kiwi, apple]", r"both base and novel: \['apple'\]"),
        ("novel: [kiwi]", "novel: kiwi", "novel: .* list, found 'kiwi'"),
        ("[apple, pear]", "[apple, apple]", r"repeats \['apple'\]"),
        ("base: [apple, pear]", "", "'train' needs 'base'"),
        ("json: v.json, ", "", "val.json: Field required"),
        ("captions: c.json", "captions: [1]", r"train.captions: must be a path, found \[1\]"),
        ("name: fruit", "name: fruit\nformat: voc", "format: .*'coco' or 'lvis', found 'voc'"),
        ("name: fruit", "name: fruit\nformat: lvis", "leave 'train' out"),
        ("clean_names:", "detections_per_image: -1", "detections_per_image: .* found -1"),
        ("clean_names:", "caption_template: hello", "must have one {}, found 'hello'"),
        ("{pear: nashi pear}", "{pear: 3}", "rename.pear: .* found 3"),
        ("[kiwi]", "[kiwi", "is not YAML"),
        (GOOD, "- fruit", r"expected keys such as 'name', found \['fruit'\]"),
        (GOOD, "name: fruit", "neither 'train' nor 'val'"),
    ],
)
def test_mistakes_are_named(read, old, new, words):
    assert old in GOOD
    with pytest.raises(ValueError, match=words) as caught:
        read(GOOD.replace(old, new))
    assert "fruit.yaml" in str(caught.value)
    if "YAML" not in words:
        assert "\n" not in str(caught.value)


def test_yaml_cannot_run_code(read, tmp_path):
    with pytest.raises(ValueError, match="is not YAML"):
        read(f"name: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']\n")
    assert not (tmp_path / "made").exists()
    with pytest.raises(FileNotFoundError, match="nothing"):
        read_definition(tmp_path / "nothing.yaml")


def test_captions_of_names():
    assert caption_of(["cat"], "a photo of {}.") == "a photo of a cat."
    assert caption_of(["cat", "apple", "dog"], "{}!") == "a cat, an apple and a dog!"
