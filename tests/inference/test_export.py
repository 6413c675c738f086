"""Exported graphs: the same detections as the detector's own, at sizes that were never traced."""

import importlib.util
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image

import hierkd.modeling.detector as meta_arch
from fake_teacher import FakeTeacher
from hierkd.inference.export import (
    Agreement,
    Detections,
    check_output,
    compare_detections,
    export_graph,
    load_graph,
    require_packages,
)
from hierkd.inference.exportable import ExportableDetector
from hierkd.inference.predictor import OpenVocabularyPredictor
from hierkd.load_config import load_config
from hierkd.teachers.texts import make_text_embeddings, save_text_embeddings
from tools import export as command

ROOT = Path(__file__).resolve().parent.parent.parent
CONFIG = "configs/miniature/hierkd.yaml"
NAMES = ["ant", "bee", "cow", "dog", "elk"]
SIZES = [(96, 96), (64, 200), (131, 77), (40, 300)]  # none is the one that is traced


@pytest.fixture(scope="module", autouse=True)
def _no_trace() -> Iterator[None]:
    """pytest collects the log, and torch's own of tracing takes minutes to format."""
    log = logging.getLogger("torch.__trace")
    log.disabled = True
    yield
    log.disabled = False


def make_predictor(*opts: str, quality: bool = True) -> OpenVocabularyPredictor:
    """A random detector whose scores are all different and whose boxes vary."""
    general = ["MODEL.DEVICE", "cpu", "DATASETS.TRAIN", "()", "MODEL.WEIGHTS", ""]
    if not quality:
        general += ["MODEL.ATSS.QUALITY", "none"]
    cfg = load_config(CONFIG, [*general, *opts])
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        teacher = FakeTeacher(cfg.MODEL.TEXT_CLASSIFIER.EMBED_DIM)
        patch.setattr(meta_arch, "build_teacher", lambda cfg: teacher)
        model = build_model(cfg)
    for name, parameter in model.head.named_parameters():
        if name.endswith("weight") and parameter.dim() == 4:
            torch.nn.init.normal_(parameter, std=0.06)
    model.training_vocabulary = tuple(NAMES[:3])
    model.set_vocabulary(NAMES)
    return OpenVocabularyPredictor(model=model, min_size=96, max_size=300)


def pictures() -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    small = [rng.integers(0, 256, (h // 8 + 1, w // 8 + 1, 3), np.uint8) for h, w in SIZES]
    return [
        np.asarray(Image.fromarray(x).resize((w, h)))
        for x, (h, w) in zip(small, SIZES, strict=True)
    ]


VARIANTS = {
    "default": make_predictor,
    "rgb": lambda: _with_format(make_predictor(), "RGB"),
    "agnostic": lambda: make_predictor("MODEL.ATSS.CLASS_AGNOSTIC_NMS", "True"),
    "shifted": lambda: make_predictor("MODEL.ATSS.NOVEL_LOGIT_SHIFT", "0.7"),
    "no quality": lambda: make_predictor(quality=False),
    "thresholded": lambda: make_predictor("MODEL.ATSS.SCORE_THRESH_TEST", "0.25"),
    "few anchors": lambda: make_predictor(
        "MODEL.ATSS.TOPK_ANCHORS_TEST", "20", "MODEL.ATSS.TOPK_PAIRS_TEST", "500"
    ),
    "all pairs": lambda: make_predictor("MODEL.ATSS.TOPK_PAIRS_TEST", "0"),
}


def _with_format(predictor: OpenVocabularyPredictor, image_format: str) -> OpenVocabularyPredictor:
    predictor.image_format = image_format
    return predictor


@pytest.mark.parametrize("nms_operator", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_steps_of_the_graph_are_those_of_inference(variant: str, nms_operator: bool) -> None:
    predictor = VARIANTS[variant]()
    graph = ExportableDetector(
        predictor.model, image_format=predictor.image_format, with_nms_operator=nms_operator
    )
    total = 0
    for picture in pictures():
        image = predictor.prepare(picture)["image"]
        rgb = image if predictor.image_format == "RGB" else image.flip(0)
        with torch.no_grad():
            (expected,) = predictor.model([{"image": image}])
            boxes, scores, classes = graph(rgb.permute(1, 2, 0).contiguous())
        instances = expected["instances"]
        total += len(instances)
        torch.testing.assert_close(scores, instances.scores)
        torch.testing.assert_close(boxes, instances.pred_boxes.tensor, atol=1e-3, rtol=0)
        assert classes.tolist() == instances.pred_classes.tolist()
    assert total > 40  # of up to 400


def test_a_picture_without_detections() -> None:
    predictor = make_predictor("MODEL.ATSS.SCORE_THRESH_TEST", "1.0")
    for nms_operator in (False, True):
        graph = ExportableDetector(predictor.model, with_nms_operator=nms_operator)
        with torch.no_grad():
            boxes, scores, classes = graph(torch.zeros(64, 64, 3, dtype=torch.uint8))
        assert (boxes.shape, scores.shape, classes.shape) == ((0, 4), (0,), (0,))


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> dict[str, tuple[OpenVocabularyPredictor, Path]]:
    """The default variant in every form that can be written here."""
    folder = tmp_path_factory.mktemp("exported")
    found = {}
    forms = {"baked.pt2": False}
    if all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime")):
        forms |= {"baked.onnx": False, "open.onnx": True}
    predictor = make_predictor()
    for name, as_input in forms.items():
        export_graph(predictor, folder / name, vocabulary_as_input=as_input)
        found[name] = predictor, folder / name
    assert sorted(path.name for path in folder.iterdir()) == sorted(forms)  # nothing else is left
    return found


@pytest.mark.parametrize("name", ["baked.pt2", "baked.onnx", "open.onnx"])
def test_the_written_graph_detects_the_same(exported, name: str) -> None:
    if name not in exported:
        pytest.skip("onnx, onnxscript or onnxruntime is missing")
    predictor, path = exported[name]
    graph, metadata = load_graph(path)
    as_input = name.startswith("open")
    agreement = compare_detections(predictor, graph, pictures(), vocabulary_as_input=as_input)
    assert agreement.complete
    assert agreement.expected > 200
    assert len(agreement.sizes) >= 3
    assert agreement.box_difference < 0.05
    assert metadata["class_names"] == (None if as_input else NAMES)
    assert (metadata["min_size"], metadata["max_size"]) == (96, 300)


def test_another_vocabulary_as_input(exported) -> None:
    if "open.onnx" not in exported:
        pytest.skip("onnx, onnxscript or onnxruntime is missing")
    predictor, path = exported["open.onnx"]
    graph, _ = load_graph(path)
    other = make_predictor()
    other.set_vocabulary([f"thing {number}" for number in range(23)])
    agreement = compare_detections(other, graph, pictures(), vocabulary_as_input=True)
    assert agreement.complete
    assert predictor.vocabulary == tuple(NAMES)


BLOCKED = """
import runpy, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "torchvision", "detectron2", "hierkd", "cv2", "fvcore"}:
            raise ImportError(f"{name} is not for a consumer")
sys.meta_path.insert(0, Refuse())
script, *sys.argv[1:] = sys.argv[1:]
sys.argv[0] = script
runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.parametrize("name", ["baked.onnx", "open.onnx"])
def test_the_consumer_needs_neither_torch_nor_this_package(exported, tmp_path, name: str) -> None:
    if name not in exported:
        pytest.skip("onnx, onnxscript or onnxruntime is missing")
    predictor, path = exported[name]
    picture = pictures()[2]
    Image.fromarray(picture[:, :, ::-1]).save(tmp_path / "picture.png")
    options = ["--threshold", "0"]
    if name.startswith("open"):
        rows = predictor.model.text_classifier.text_embeddings.numpy()
        stored = make_text_embeddings(NAMES, rows, clip="fake", templates=("{}",))
        save_text_embeddings(stored, tmp_path / "classes.npz")
        options += ["--embeddings", str(tmp_path / "classes.npz")]
    result = run_consumer(str(path), str(tmp_path / "picture.png"), *options)
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    instances = predictor(picture)
    assert len(lines) == len(instances)
    found = Detections(
        np.array([[float(x) for x in line[2:]] for line in lines], np.float32),
        np.array([float(line[1]) for line in lines], np.float32),
        np.array([NAMES.index(line[0]) for line in lines]),
    )
    agreement = Agreement()
    agreement.add(_detections(instances), found, 0.4)
    assert agreement.complete


def run_consumer(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = str(ROOT / "tools" / "onnx_consumer.py")
    return subprocess.run(
        [sys.executable, "-c", BLOCKED, script, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("open.onnx", [], "asks for classes: give --embeddings"),
        ("baked.onnx", ["--embeddings", "a.npz"], "has classes of its own: leave out --embeddings"),
    ],
)
def test_the_consumer_says_whether_it_needs_classes(exported, name, options, words) -> None:
    if name not in exported:
        pytest.skip("onnx, onnxscript or onnxruntime is missing")
    result = run_consumer(str(exported[name][1]), "no picture is read yet", *options)
    assert result.returncode == 2
    assert f"{name} {words}\n" in result.stderr
    assert "Traceback" not in result.stderr


def _detections(instances) -> Detections:
    boxes = instances.pred_boxes.tensor.numpy()
    return Detections(boxes, instances.scores.numpy(), instances.pred_classes.numpy())


def _some(scores: list[float], shift: float = 0.0, label: int = 0) -> Detections:
    corners = np.arange(len(scores), dtype=np.float32)[:, None] * 100 + shift
    boxes = np.concatenate([corners, corners, corners + 50, corners + 50], axis=1)
    return Detections(boxes, np.array(scores, np.float32), np.full(len(scores), label))


@pytest.mark.parametrize(
    ("found", "complete", "agreeing", "tied"),
    [
        (_some([0.9, 0.5, 0.2], shift=0.4), True, 3, 0),
        (_some([0.9, 0.5, 0.2], shift=0.6), False, 0, 3),  # far too many ties
        (_some([0.9, 0.5004, 0.2], shift=0.6), False, 0, 2),
        (_some([0.9, 0.502, 0.2]), False, 2, 0),
        (_some([0.9, 0.5, 0.2], label=1), False, 0, 1),  # only the last may be of another class
        (_some([0.9, 0.5]), False, 2, 0),
        (_some([0.9, 0.5, 0.2, 0.1]), False, 3, 0),
    ],
)
def test_what_counts_as_the_same(found, complete, agreeing, tied) -> None:
    agreement = Agreement()
    agreement.add(_some([0.9, 0.5, 0.2]), found, 0.4)
    assert (agreement.complete, agreement.agreeing, agreement.tied) == (complete, agreeing, tied)
    assert not Agreement().complete  # nothing was compared


@pytest.mark.parametrize(("ties", "complete"), [(1, True), (2, False)])
def test_one_tie_in_a_thousand_is_chance(ties: int, complete: bool) -> None:
    scores = np.linspace(0.9, 0.1, 1000).tolist()
    found = _some(scores)
    found.boxes[:ties] += 2  # the other one of two overlapping boxes with the same score
    agreement = Agreement()
    agreement.add(_some(scores), found, 0.4)
    assert (agreement.agreeing, agreement.tied) == (1000 - ties, ties)
    assert agreement.complete is complete


# --- What is refused, and the command line --------------------------------------------------------


def test_missing_packages_are_named_with_the_command(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install onnx onnxscript, or pip install -e '.\["):
        check_output(tmp_path / "detector.onnx")
    with pytest.raises(ImportError, match="onnxruntime is not installed"):
        require_packages("onnxruntime")


def test_unusable_outputs(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"must end in \.onnx or \.pt2"):
        check_output(tmp_path / "detector.pth")
    (tmp_path / "folder.pt2").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        check_output(tmp_path / "folder.pt2")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        check_output(tmp_path / "file" / "detector.pt2")


def test_without_a_shift_the_training_vocabulary_need_not_be_known() -> None:
    predictor = make_predictor()
    predictor.model.training_vocabulary = ()
    assert ExportableDetector(predictor.model).novel_shift is None


def test_a_shift_by_name_needs_the_names() -> None:
    predictor = make_predictor("MODEL.ATSS.NOVEL_LOGIT_SHIFT", "0.7")
    with pytest.raises(ValueError, match="NOVEL_LOGIT_SHIFT"):
        ExportableDetector(predictor.model, vocabulary_as_input=True)


def test_an_empty_vocabulary_is_refused() -> None:
    predictor = make_predictor()
    predictor.model.vocabulary_names = ()
    with pytest.raises(ValueError, match="vocabulary is empty"):
        ExportableDetector(predictor.model)


def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch) -> None:
    import hierkd.inference.export as module

    output = tmp_path / "detector.pt2"
    output.write_bytes(b"old")

    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:100])
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(module, "trace", lambda *_, **__: None)
    monkeypatch.setattr(module, "_pt2_bytes", lambda *_: b"new" * 100)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        export_graph(make_predictor(), output)
    assert output.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "detector.txt"], "must end in .onnx or .pt2"),
        (["--output", "{tmp}/a.pt2", "--check", "nowhere.jpg"], "no such picture or folder"),
        (["--output", "{tmp}/a.pt2", "--check", "{tmp}"], "no pictures in the folder"),
        (["--output", "{tmp}/a.pt2", "--vocabulary", " , "], "the vocabulary is empty"),
        (["--output", "{tmp}/a.pt2", "--opts", "MODEL.WEIGHTS", "gone.pth"], "gone.pth"),
    ],
)
def test_wrong_input_ends_with_a_message(arguments, message, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(meta_arch, "build_teacher", lambda cfg: FakeTeacher(64))
    given = [argument.format(tmp=tmp_path) for argument in arguments]
    with pytest.raises(SystemExit) as exit_info:
        command.main(["--config-file", CONFIG, *given])
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "a.pt2").exists()


@pytest.mark.parametrize("same", [True, False])
def test_the_command_checks_what_it_wrote(exported, same, tmp_path, monkeypatch, caplog) -> None:
    predictor, path = exported["baked.pt2"]
    predictor.set_vocabulary(["something", "else"])  # the command changes it back

    def write(given: OpenVocabularyPredictor, output: Path, **_: object) -> None:
        assert given.vocabulary == tuple(NAMES)
        output.write_bytes(path.read_bytes())

    monkeypatch.setattr(command, "load_predictor", lambda *_: predictor)
    monkeypatch.setattr(command, "export_graph", write)
    if not same:
        load = command.load_graph
        monkeypatch.setattr(command, "load_graph", lambda path: (_moved(load(path)[0]), {}))
    for number, picture in enumerate(pictures()[:2]):
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
    output = tmp_path / "new" / "detector.pt2"
    arguments = ["--config-file", CONFIG, "--output", str(output), "--check", str(tmp_path)]
    monkeypatch.setattr("tools.export.setup_logger", lambda **_: None)
    with caplog.at_level("INFO", logger="hierkd.export"):
        status = command.main([*arguments, "--vocabulary", ",".join(NAMES)])
    assert status == (0 if same else 1)
    assert "2 pictures of 2 sizes" in caplog.text
    assert ("does not detect" in caplog.text) is not same


def _moved(graph):
    def run(image, embeddings):
        found = graph(image, embeddings)
        return found._replace(boxes=found.boxes + 1.0)

    return run
