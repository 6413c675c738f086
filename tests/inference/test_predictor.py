"""OpenVocabularyPredictor: what the model is given, and what comes back."""

import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, Instances
from PIL import Image

import hierkd.teachers.clip as teacher
import tiny_training
from hierkd.inference.predictor import (
    OpenVocabularyPredictor,
    find_checkpoint,
    resolve_vocabulary,
)
from hierkd.miniature.world import MINIATURE_CLASSES
from toy_world import VOCABULARY, register_toy_world


class RecordingModel(torch.nn.Module):
    """Remembers its input and finds one object."""

    vocabulary_names = ("cat", "dog")

    def forward(self, batched_inputs):
        self.batched_inputs = batched_inputs
        instances = Instances(
            (10, 10),
            pred_boxes=Boxes(torch.tensor([[1.0, 2.0, 3.0, 4.0]])),
            scores=torch.tensor([0.5]),
            pred_classes=torch.tensor([1]),
        )
        return [{"instances": instances}]


def gradient_image(height, width):
    """BGR picture whose blue grows to the right; red is 200, green 0."""
    image = np.zeros((height, width, 3), dtype=np.uint8)
    image[..., 0] = np.linspace(0, 255, width).astype(np.uint8)
    image[..., 2] = 200
    return image


def recording(**options):
    return OpenVocabularyPredictor(**{"model": RecordingModel(), "min_size": 64} | options)


def test_short_side_is_resized_and_the_original_size_told():
    predictor = recording(model=RecordingModel().train(), max_size=100)
    instances = predictor(gradient_image(128, 160))
    (given,) = predictor.model.batched_inputs
    assert given["image"].shape == (3, 64, 80)
    assert (given["height"], given["width"]) == (128, 160)
    assert not predictor.model.training
    assert instances.pred_boxes.tensor.tolist() == [[1, 2, 3, 4]]
    # The long side is limited.
    assert predictor.prepare(gradient_image(128, 1280))["image"].shape == (3, 10, 100)


@pytest.mark.parametrize(("image_format", "red_channel"), [("BGR", 2), ("RGB", 0)])
def test_channels_come_in_the_models_order(image_format, red_channel):
    predictor = recording(max_size=128, image_format=image_format)
    image = predictor.prepare(gradient_image(128, 128))["image"]
    assert image[red_channel].unique().tolist() == [200]
    assert image[1].unique().tolist() == [0]
    with pytest.raises(ValueError, match=r"INPUT\.FORMAT.*'YUV'"):
        recording(max_size=1, image_format="YUV")


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
    ("trained_on", "icons"),
    [
        (["miniature_ovd_train_base"], True),
        (["coco_ovd_train_base_48_17"], False),
        (["miniature_ovd_train_base", "mine_train_base"], False),
        ([], False),  # not known
    ],
)
def test_a_detector_of_the_miniature_alone_says_so(trained_on, icons):
    predictor = recording(max_size=64, trained_on=trained_on)
    assert predictor.trained_on == tuple(trained_on)
    assert predictor.knows_icons_only is icons


def test_vocabulary_from_a_dataset(tmp_path):
    name = register_toy_world(tmp_path / "world")
    assert resolve_vocabulary("cat, traffic_cone ") == ["cat", "traffic_cone"]
    assert resolve_vocabulary(name) == list(VOCABULARY)
    resolve_vocabulary(name).clear()  # a copy: the dataset keeps its own
    assert tuple(MetadataCatalog.get(name).thing_classes) == VOCABULARY


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "empty"),
        (" , ", "empty"),
        ("cat,,dog", "blank"),
        ("cat,dog,cat", "repeats 'cat'"),
        ("miniature_ovd_tst_all", "miniature_ovd_test_all"),
        ("cat;dog", "cat;dog"),
        ("names/mine", "names/mine"),
        (".", r"'\.' is neither a file"),
    ],
)
def test_unusable_vocabularies(text, named):
    with pytest.raises(ValueError, match=named):
        resolve_vocabulary(text)


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


def test_test_datasets_that_are_not_known_here_are_said(world, caplog):
    predictor = OpenVocabularyPredictor.from_checkpoint(
        world / "run", opts=["DATASETS.TEST", "('gone_val_all',)"]
    )
    assert "['gone_val_all'], which are not registered here" in caplog.text
    assert predictor.vocabulary == tuple(
        MetadataCatalog.get("miniature_ovd_train_base").thing_classes
    )


@pytest.mark.parametrize(
    ("path", "options", "error", "named"),
    [
        ("gone/run", {}, FileNotFoundError, "'gone/run'"),
        ("{empty}", {}, FileNotFoundError, r"no model_final\.pth"),
        ("{noted}", {}, FileNotFoundError, r"names 'model_0000009\.pth'"),
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


def test_every_kind_of_picture_gives_the_same_detections(predictor, pictures):
    with Image.open(pictures[1]) as opened:
        pillow = opened.convert("RGB")
    rgb = np.array(pillow)
    expected = rows(predictor(rgb[:, :, ::-1]))
    assert len(expected) > 0
    tensor = torch.from_numpy(rgb.transpose(2, 0, 1).copy())
    for kind in (str(pictures[1]), pictures[1], pillow, pillow.convert("RGBA")):
        assert torch.equal(rows(predictor.predict(kind)), expected)
    for kind in (rgb, tensor):
        assert torch.equal(rows(predictor.predict(kind, channels="RGB")), expected)
    for kind in (rgb[:, :, ::-1], tensor.flip(0)):
        assert torch.equal(rows(predictor.predict(kind)), expected)
        assert not torch.equal(rows(predictor.predict(kind, channels="RGB")), expected)


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
    with pytest.raises(ValueError, match="pixels"):
        predictor.predict(np.zeros((0, 4, 3), np.uint8), vocabulary=["another"])
    assert predictor.vocabulary == before
    both = predictor.predict(pictures[0], vocabulary=["a", "b"])
    middle = float(both.scores[len(both) // 2])
    better = predictor.predict(pictures[0], vocabulary=["a", "b"], score_threshold=middle)
    assert torch.equal(rows(better), rows(both)[both.scores >= middle])
    options = {"vocabulary": ["a", "b"], "class_thresholds": {"b": 1}, "top_k": 3}
    kept = predictor.predict(pictures[0], **options)
    assert torch.equal(rows(kept), rows(both)[both.pred_classes == 0][:3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"score_threshold": 1.5}, "1.5"),
        ({"class_thresholds": {"zebra": 0.5}}, "zebra"),
        ({"channels": "GRB"}, "GRB"),
        ({"batch_size": 0}, "batch_size"),
        ({"vocabulary": []}, "empty"),
        ({"vocabulary": "cat"}, "'cat'"),
    ],
)
def test_wrong_arguments(predictor, arguments, message):
    with pytest.raises(ValueError, match=message):
        predictor.predict(gradient_image(8, 8), **arguments)


def test_wrong_vocabularies_leave_the_old_one(predictor):
    before = predictor.vocabulary
    for names in ("cat", [], ["cat", " "], ["cat", "cat"], ["cat", 3]):
        with pytest.raises(ValueError, match=r"class|names|list is empty|must occur once"):
            predictor.set_vocabulary(names)
    assert predictor.vocabulary == before
    predictor.set_vocabulary(name for name in ("a generator", "of names"))
    assert predictor.vocabulary == ("a generator", "of names")


def test_a_wrong_picture_of_a_list_is_named(predictor, tmp_path):
    good = gradient_image(8, 8)
    with pytest.raises(FileNotFoundError, match=r"image 2: no picture 'gone\.jpg'"):
        predictor.predict([good, good, "gone.jpg"])
    with pytest.raises(TypeError, match=r"image 1: .*got int"):
        predictor.predict([good, 3])
    with pytest.raises(TypeError, match=r"^an image .*got bytes"):
        predictor.predict(b"\x89PNG")
    (tmp_path / "broken.jpg").write_text("no picture")
    with pytest.raises(ValueError, match=r"broken\.jpg cannot be decoded"):
        predictor.predict(tmp_path / "broken.jpg")


def test_known_names_need_no_clip_and_come_at_once(world, monkeypatch):
    names = [f"thing {i}" for i in range(50)]
    OpenVocabularyPredictor.from_checkpoint(world / "run").set_vocabulary(names)

    def refuse(self):
        raise AssertionError("CLIP was loaded")

    monkeypatch.setattr(teacher.CLIPTeacher, "_clip", refuse)
    fresh = OpenVocabularyPredictor.from_checkpoint(world / "run")
    fresh.set_vocabulary(names)  # from the disk
    monkeypatch.setattr(teacher.TextCache, "read", refuse)
    started = time.perf_counter()
    fresh.set_vocabulary(names[::-1])  # from memory
    assert time.perf_counter() - started < 0.1
    assert fresh.vocabulary == tuple(names[::-1])


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
