"""OpenVocabularyPredictor: what the model is given, and what comes back."""

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tiny_training
from fake_teacher import FakeTeacher
from hierkd.inference.examples import parse_examples
from hierkd.inference.predictor import (
    OpenVocabularyPredictor,
    find_checkpoint,
    resolve_vocabulary,
)
from hierkd.miniature.world import MINIATURE_CLASSES


def gradient_image(height, width):
    """BGR picture whose blue grows to the right; red is 200, green 0."""
    image = np.zeros((height, width, 3), dtype=np.uint8)
    image[..., 0] = np.linspace(0, 255, width).astype(np.uint8)
    image[..., 2] = 200
    return image


GOOD = gradient_image(8, 8)


def test_the_largest_vocabulary_comes_first(world, pictures):
    predictor = OpenVocabularyPredictor.from_checkpoint(world / "run")
    assert predictor.vocabulary == MINIATURE_CLASSES
    assert predictor.trained_on == ("miniature_ovd_train_base",)
    saved = torch.load(world / "run" / "model_final.pth", weights_only=True)["model"]
    for name, parameter in predictor.model.state_dict().items():
        torch.testing.assert_close(parameter, saved[name])
    image = gradient_image(96, 120)
    found = predictor(image)
    assert found.image_size == (96, 120)
    assert (found.scores[:-1] >= found.scores[1:]).all()
    predictor.set_vocabulary(["one thing"])
    assert predictor.vocabulary == ("one thing",)
    assert set(predictor(image).pred_classes.tolist()) == {0}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (" , ", "empty"),
        ("cat,,dog", "blank"),
        ("miniature_ovd_tst_all", "miniature_ovd_test_all"),
        ("cat;dog", "cat;dog"),
        ("cat|dog", r"'cat\|dog' has brackets, quotes, '\|'"),
        ('["cat","dog"]', "brackets"),
        ("{cat, dog}", "brackets"),
        ("'cat','dog'", "quotes"),
        ("\u201ccat\u201d, dog", "quotes"),
        ("(cat, dog)", "'\\(cat' has"),
        ("cat . dog .", "or '\\.'"),
        ("names/mine", "names/mine"),
        (".", r"'\.' is neither a file"),
    ],
)
def test_unusable_vocabularies(text, named):
    with pytest.raises(ValueError, match=named):
        resolve_vocabulary(text)


def test_names_or_a_dataset(caplog):
    assert resolve_vocabulary("cat\uff0cdog\u3001cow") == ["cat", "dog", "cow"]
    assert resolve_vocabulary("driver's seat, crab (animal)")[0] == "driver's seat"
    assert resolve_vocabulary("traffic light") == ["traffic light"]
    assert "commas" not in caplog.text
    assert resolve_vocabulary("elephant bicycle") == ["elephant bicycle"]
    assert "one class, 'elephant bicycle'; commas, in" in caplog.text
    resolve_vocabulary("elephant and bicycle")
    assert "one class, 'elephant and bicycle'; commas, in" in caplog.text
    assert resolve_vocabulary("cat, traffic_cone ") == ["cat", "traffic_cone"]
    assert resolve_vocabulary("miniature_ovd_val_all") == list(MINIATURE_CLASSES)
    assert "repeats" not in caplog.text
    assert resolve_vocabulary("cat, Dog, dog,cat, cow") == ["cat", "Dog", "cow"]
    assert "repeats 'dog', 'cat': each counts once" in caplog.text


@pytest.mark.parametrize("text", ["- cat\n- dog", "1. cat\n2. dog", "0 cat", "# mine\ncat"])
def test_a_file_has_a_name_alone_on_each_line(tmp_path, text):
    (tmp_path / "names.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"names.yaml: .* alone on each line"):
        resolve_vocabulary(str(tmp_path / "names.yaml"))


# ------------------------------------------------------------------ from_checkpoint and predict


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A world, a CLIP and a training's folder ``run``, with text embeddings cached in here."""
    root = tmp_path_factory.mktemp("predictor")
    tiny_training.write_world(root)
    clip = tiny_training.write_clip(root / "clip.pt")
    with pytest.MonkeyPatch.context() as patch, tiny_training.miniature_at(root):
        patch.setenv("HIERKD_CACHE", str(root / "cache"))
        tiny_training.write_run(root / "run", clip)
        yield root


@pytest.fixture
def predictor(world):
    return OpenVocabularyPredictor.from_checkpoint(world / "run")


@pytest.fixture
def pictures(world):
    return sorted((world / "miniature" / "val").glob("*.png"))


def rows(instances):
    """Detections as one array: box, score, class."""
    scores, classes = instances.scores[:, None], instances.pred_classes[:, None].float()
    return torch.cat([instances.pred_boxes.tensor, scores, classes], dim=1)


def test_every_way_to_name_a_checkpoint_gives_the_same_detector(world, pictures, tmp_path):
    run = world / "run"
    lone = tmp_path / "lone"
    lone.mkdir()
    shutil.copy(run / "model_final.pth", lone / "model_0000001.pth")
    shutil.copy(run / "config.yaml", lone / "config.yaml")
    (lone / "last_checkpoint").write_text("model_0000001.pth")
    elsewhere = tmp_path / "elsewhere.pth"
    shutil.copy(run / "model_final.pth", elsewhere)
    ways = [
        (str(run), None),
        (run / "model_final.pth", None),
        (lone, None),
        (elsewhere, run / "config.yaml"),
    ]
    found = [
        rows(OpenVocabularyPredictor.from_checkpoint(*way).predict(pictures[0])) for way in ways
    ]
    assert len(found[0]) > 0
    for other in found[1:]:
        assert torch.equal(other, found[0])


def test_overrides_and_a_cache_of_the_teacher_that_is_elsewhere(world, predictor, pictures, caplog):
    other = OpenVocabularyPredictor.from_checkpoint(
        world / "run",
        device="cpu",
        opts=["TEST.DETECTIONS_PER_IMAGE", 3, "MODEL.TEACHER.CACHE", "gone/cache"],
    )
    assert other.device == torch.device("cpu")
    assert "MODEL.TEACHER.CACHE: 'gone/cache' is not there" in caplog.text
    assert torch.equal(rows(other.predict(pictures[0])), rows(predictor.predict(pictures[0]))[:3])


def test_a_folder_stands_for_its_last_checkpoint(tmp_path):
    (tmp_path / "config.yaml").touch()
    for name in ("model_final.pth", "model_0000007.pth"):
        (tmp_path / name).touch()
    last = tmp_path / "last_checkpoint"
    for named, expected in (
        (None, "model_final.pth"),
        ("model_final.pth", "model_final.pth"),
        ("model_0000007.pth\n", "model_0000007.pth"),  # begun anew in the same folder
        ("model_0000009.pth", "model_final.pth"),  # was removed
    ):
        if named is not None:
            last.write_text(named)
        assert find_checkpoint(tmp_path)[1] == str(tmp_path / expected)


@pytest.mark.parametrize(
    ("path", "options", "error", "named"),
    [
        ("gone/run", {}, FileNotFoundError, "'gone/run'"),
        ("{empty}", {}, FileNotFoundError, r"no model_final\.pth"),
        ("{noted}", {}, FileNotFoundError, r"no model_0000009\.pth"),
        ("{alone}", {}, FileNotFoundError, r"config\.yaml.*alone\.pth"),
        ("{alone}", {"config_file": "gone.yaml"}, FileNotFoundError, r"no config 'gone\.yaml'"),
        ("{run}/config.yaml", {}, ValueError, r"config\.yaml' is a config"),
        ("https://example.org/model.pth", {}, FileNotFoundError, "no config"),
        ("{run}", {"device": "gpu"}, ValueError, r"MODEL\.DEVICE: no device 'gpu'"),
        ("{run}", {"opts": ["NO.SUCH_KEY", 1]}, ValueError, r"NO\.SUCH_KEY"),
        ("{run}", {"opts": ["MODEL.WEIGHTS", ""]}, ValueError, r"MODEL\.WEIGHTS is empty"),
        ("{run}", {"opts": ["MODEL.WEIGHTS", "gone.pth"]}, FileNotFoundError, r"gone\.pth"),
    ],
)
def test_wrong_checkpoints(world, tmp_path, path, options, error, named):
    folders = {name: tmp_path / name for name in ("empty", "noted")}
    for folder in folders.values():
        folder.mkdir()
    (tmp_path / "noted" / "last_checkpoint").write_text("model_0000009.pth")
    alone = tmp_path / "alone.pth"
    shutil.copy(world / "run" / "model_final.pth", alone)
    with pytest.raises(error, match=named):
        OpenVocabularyPredictor.from_checkpoint(
            path.format(run=world / "run", alone=alone, **folders), **options
        )


def test_lists_and_batches_give_what_single_pictures_give(predictor, pictures, monkeypatch):
    wide = gradient_image(50, 120)
    images = [pictures[0], wide, pictures[1], gradient_image(80, 80), wide, pictures[2]]
    one_by_one = [rows(predictor.predict(image)) for image in images]
    detect, sizes = predictor.model.forward, []
    monkeypatch.setattr(
        predictor.model, "forward", lambda inputs: sizes.append(len(inputs)) or detect(inputs)
    )
    for size, passes in ((1, [1] * 6), (4, [3, 1, 1, 1])):
        together = predictor.predict(images, batch_size=size)
        assert sizes == passes
        sizes.clear()
        for found, expected in zip(together, one_by_one, strict=True):
            torch.testing.assert_close(rows(found), expected)
    stack = np.stack([wide, wide[:, ::-1]])
    for batch in (stack, torch.from_numpy(stack.transpose(0, 3, 1, 2).copy())):
        first, second = predictor.predict(batch)
        torch.testing.assert_close(rows(first), one_by_one[1])
        torch.testing.assert_close(rows(second), rows(predictor(stack[1])))
    assert predictor.predict([]) == []
    assert isinstance(predictor.predict([wide]), list)


def test_a_vocabulary_for_one_call(predictor, pictures):
    before = predictor.vocabulary
    expected = rows(predictor.predict(pictures[0]))
    one = predictor.predict(pictures[0], vocabulary=["only this"])
    assert set(one.pred_classes.tolist()) == {0}
    assert predictor.vocabulary == before
    assert torch.equal(rows(predictor.predict(pictures[0])), expected)
    with pytest.raises(ValueError, match="shape"):
        predictor.predict(np.zeros((0, 4, 3), np.uint8), vocabulary=["another"])
    assert predictor.vocabulary == before
    both = predictor.predict(pictures[0], vocabulary=["a", "b"])
    middle = float(both.scores[len(both) // 2])
    better = predictor.predict(pictures[0], vocabulary=["a", "b"], score_threshold=middle)
    assert torch.equal(rows(better), rows(both)[both.scores >= middle])
    options = {"vocabulary": ["a", "b"], "class_thresholds": {"b": 1}, "top_k": 3}
    kept = predictor.predict(pictures[0], **options)
    assert torch.equal(rows(kept), rows(both)[both.pred_classes == 0][:3])


def test_what_the_teacher_is_shown_of_examples(predictor, monkeypatch):
    teacher = FakeTeacher(tiny_training.EMBED_DIM)
    monkeypatch.setattr(predictor.model, "teacher", teacher)
    picture = gradient_image(128, 160)  # the model sees 96 x 120
    predictor.set_vocabulary(
        ["cup", "mug"], {"thing": [picture], "mug": [(picture, [16, 32, 80, 96])]}
    )
    assert predictor.vocabulary == ("cup", "mug", "thing")
    (_, whole, _), (views, boxes, scale) = teacher.regions
    assert [each.tolist() for each in whole] == [[[0, 0, 120, 96]]] * 2
    assert [each.tolist() for each in boxes] == [[[12, 24, 60, 72]], [[60, 24, 108, 72]]]
    assert scale == 1.5
    assert torch.equal(views[1], views[0].flip(2))
    seen = teacher.encode_regions([], [torch.zeros(2, 4)], 1.0).mean(dim=0)
    cup, mug = teacher.encode_classes(["cup", "mug"])
    expected = torch.stack([cup, mug + seen / seen.norm(), seen])
    expected /= expected.norm(dim=1, keepdim=True)
    torch.testing.assert_close(predictor.model.text_classifier.text_embeddings, expected)


def test_examples_alone_for_one_call(predictor, pictures):
    before = predictor.vocabulary
    examples = {"this": [pictures[1], (pictures[2], (0, 60, 34, 94))], "that": [GOOD]}
    found = predictor.predict(pictures[0], examples=examples)
    assert set(found.pred_classes.tolist()) == {0, 1}
    assert predictor.vocabulary == before
    predictor.set_vocabulary(examples=examples)
    assert predictor.vocabulary == ("this", "that")
    assert torch.equal(rows(predictor.predict(pictures[0])), rows(found))


def test_examples_as_a_user_types_them():
    assert parse_examples(["mug = a=b.jpg, c@d.png@1:2.5:30:40", "x@y:z.jpg=4.jpg"]) == {
        "mug": ["a=b.jpg", ("c@d.png", [1, 2.5, 30, 40])],
        "x@y:z.jpg": ["4.jpg"],
    }


@pytest.mark.parametrize(
    ("texts", "named"),
    [
        (["a.jpg"], r"expected NAME=PICTURE.* got 'a\.jpg'"),
        (["mug="], "got 'mug='"),
        (["mug=a.jpg,"], r"got 'mug=a\.jpg,'"),
        (["mug=a.jpg", "mug=b.jpg"], "'mug' comes twice"),
        (["mug=a.jpg@1:2:x:4"], r"four numbers of pixels, got 'a\.jpg@1:2:x:4'"),
    ],
)
def test_unusable_texts_of_examples(texts, named):
    with pytest.raises(ValueError, match=named):
        parse_examples(texts)


def test_threads_share_a_predictor_without_mixing_vocabularies(predictor, pictures):
    vocabularies = [[f"{letter} {i}" for i in range(1 + n)] for n, letter in enumerate("abcd")]
    expected = [rows(predictor.predict(pictures[0], vocabulary=v)) for v in vocabularies]
    started = threading.Barrier(len(vocabularies))

    def work(number):
        started.wait()
        return [
            rows(predictor.predict(pictures[0], vocabulary=vocabularies[number])) for _ in range(5)
        ]

    with ThreadPoolExecutor(len(vocabularies)) as pool:
        for number, found in enumerate(pool.map(work, range(len(vocabularies)))):
            for each in found:
                assert torch.equal(each, expected[number])


def test_the_model_is_given_the_resized_picture_in_its_channel_order(predictor):
    predictor.image_format = "BGR"
    given = predictor.prepare(gradient_image(128, 160))
    assert given["image"].shape == (3, 96, 120)
    assert (given["height"], given["width"]) == (128, 160)
    assert given["image"][1:].unique().tolist() == [0, 200]
    assert given["image"][2].unique().tolist() == [200]
    predictor.image_format = "RGB"
    assert predictor.prepare(gradient_image(128, 160))["image"][0].unique().tolist() == [200]


def test_results_say_what_they_are_and_draw_themselves(world, predictor, pictures, tmp_path):
    run = world / "run"
    text = f"'{run}/model_final.pth' on 'cpu', trained on miniature_ovd_train_base, 32 classes: "
    assert text in repr(OpenVocabularyPredictor(run))  # as from_checkpoint, by a path alone
    found = predictor.predict(pictures[0], vocabulary=["cat", "dog"], top_k=7)
    assert found.names == [("cat", "dog")[index] for index in found.pred_classes]
    assert len(found[:2].names) == 2
    first = f"Detections({str(pictures[0])!r}, 96 x 96 pixels: {found.names[0]} "
    assert repr(found).startswith(first)
    assert repr(found).endswith(", and 2 more)")
    assert "pixels: none)" in repr(found[:0])
    rgb = np.asarray(Image.open(pictures[0]).convert("RGB"))
    given = predictor.predict(rgb, vocabulary=["cat", "dog"], top_k=7, channels="RGB")
    assert np.array_equal(given.draw(), found.draw())
    empty = given[:0].draw()  # enlarged, in the colours of the picture
    assert np.abs(empty.mean((0, 1)) - rgb.mean((0, 1))).max() < 1
    found.save(tmp_path / "new" / "found.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "new" / "found.png")), found.draw())


def test_a_folder_and_a_glob_are_several_pictures(predictor, pictures):
    folder = pictures[0].parent
    for several in (folder, str(folder), f"{folder}/*.png"):
        found = predictor.predict(several)
        assert [repr(each).split("'")[1] for each in found] == list(map(str, pictures))
    assert len(predictor.predict(f"{folder}/1.*")) == 1  # of one, a list, too
    with pytest.raises(FileNotFoundError, match=r"gone/\*\.png"):
        predictor.predict("gone/*.png")


def test_the_notebook_runs(world, pictures, tmp_path, monkeypatch):
    (tmp_path / "output" / "demo").mkdir(parents=True)
    (tmp_path / "output" / "demo" / "hierkd").symlink_to(world / "run")
    folder = tmp_path / "datasets" / "miniature" / "test"
    folder.mkdir(parents=True)
    for number in (340, 341):
        Image.open(pictures[0]).save(folder / f"{number:05d}.jpg")
    path = Path(__file__).resolve().parents[2] / "docs" / "quickstart.ipynb"
    monkeypatch.chdir(tmp_path)
    cells, known = json.loads(path.read_text())["cells"], {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), known)
    assert Image.open(tmp_path / "output" / "found.jpg").size == (640, 640)
    assert path.stat().st_size < 100_000


@pytest.mark.parametrize(
    ("images", "options", "error", "named"),
    [
        (GOOD, {"score_threshold": 1.5}, ValueError, "1.5"),
        (GOOD, {"class_thresholds": {"zebra": 0.5}}, ValueError, "zebra"),
        (GOOD, {"channels": "GRB"}, ValueError, "GRB"),
        (GOOD, {"batch_size": 0}, ValueError, "batch_size"),
        (GOOD, {"vocabulary": []}, ValueError, "no names"),
        (GOOD, {"vocabulary": "cat"}, ValueError, "'cat'"),
        (GOOD, {"vocabulary": ["cat", "cat"]}, ValueError, "'cat'"),
        (GOOD, {"vocabulary": "cat", "examples": {"a": [GOOD]}}, ValueError, "'cat'"),
        (
            GOOD,
            {"vocabulary": ["Mug"], "examples": {"mug": [GOOD]}},
            ValueError,
            "one name to CLIP",
        ),
        (GOOD, {"examples": {"mug": []}}, ValueError, "'mug': expected a list .* got '\\[\\]'"),
        (GOOD, {"examples": {"mug": "a.jpg"}}, ValueError, r"list of pictures .* 'a\.jpg'"),
        (
            GOOD,
            {"examples": {"mug": [GOOD, "a.jpg"]}},
            FileNotFoundError,
            r"'mug', number 1: .*a\.jpg",
        ),
        (
            GOOD,
            {"examples": {"mug": [(GOOD, (0, 0, 9, 8))]}},
            ValueError,
            "8 x 8 pixels, got .*9, 8",
        ),
        (
            GOOD,
            {"examples": {"mug": [(GOOD, (4, 0, 4, 8))]}},
            ValueError,
            "number 0: expected a box",
        ),
        (GOOD, {"examples": {"mug": [(GOOD, (0, 0, 8))]}}, ValueError, r"got \(0, 0, 8\)"),
        ([GOOD, "gone.jpg"], {}, FileNotFoundError, r"image 1: no picture 'gone\.jpg'"),
        ([GOOD, 3], {}, TypeError, r"image 1: .*got int"),
        (b"\x89PNG", {}, TypeError, r"^an image .*got bytes"),
        ("README.md", {}, ValueError, r"README\.md cannot be decoded"),
    ],
)
def test_wrong_arguments_change_nothing(predictor, images, options, error, named):
    before = predictor.vocabulary
    with pytest.raises(error, match=named):
        predictor.predict(images, **options)
    assert predictor.vocabulary == before
