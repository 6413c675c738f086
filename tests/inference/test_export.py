"""Exported graphs: the same detections as the detector's own, at sizes that were never traced."""

import importlib.util
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image

import hierkd.inference.export as module
import hierkd.modeling.detector as meta_arch
from fake_teacher import FakeTeacher
from hierkd.inference.export import (
    Agreement,
    Detections,
    check_output,
    compare_detections,
    export_graph,
    load_graph,
)
from hierkd.inference.exportable import ExportableDetector
from hierkd.inference.predictor import OpenVocabularyPredictor
from hierkd.load_config import load_config
from hierkd.teachers.texts import make_text_embeddings, save_text_embeddings
from tools import export as command

ROOT = Path(__file__).resolve().parent.parent.parent
CONFIG = "configs/miniature/hierkd.yaml"
NAMES = ["elk", "ant", "dog", "bee", "cow"]  # in no order
SIZES = [(96, 96), (64, 200), (131, 77), (40, 300)]  # none is the one that is traced
HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))


@cache
def config():
    small = (
        "MODEL.SLIM_RESNET.WIDTHS",
        "[8, 12, 16, 20]",
        "MODEL.FPN.OUT_CHANNELS",
        "32",
        "MODEL.ATSS.NUM_CONVS",
        "1",
    )
    general = ("MODEL.DEVICE", "cpu", "DATASETS.TRAIN", "()", "MODEL.WEIGHTS", "")
    return load_config(CONFIG, [*general, *small])


def make_predictor(*opts: object, image_format: str = "BGR") -> OpenVocabularyPredictor:
    """A random detector whose scores are all different and whose boxes vary."""
    cfg = config().clone()
    cfg.merge_from_list([f"MODEL.ATSS.{x}" if i % 2 == 0 else x for i, x in enumerate(opts)])
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meta_arch, "build_teacher", lambda cfg: FakeTeacher(64))
        model = build_model(cfg)
    for name, parameter in model.head.named_parameters():
        if name.endswith("weight") and parameter.dim() == 4:
            torch.nn.init.normal_(parameter, std=0.06)
    model.training_vocabulary = tuple(NAMES[:3])
    model.set_vocabulary(NAMES)
    return OpenVocabularyPredictor(
        model=model, min_size=96, max_size=300, image_format=image_format
    )


def pictures() -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    small = [rng.integers(0, 256, (h // 8 + 1, w // 8 + 1, 3), np.uint8) for h, w in SIZES]
    return [
        np.asarray(Image.fromarray(x).resize((w, h)))
        for x, (h, w) in zip(small, SIZES, strict=True)
    ]


VARIANTS = {
    "default": (),
    "agnostic": ("CLASS_AGNOSTIC_NMS", True),
    "shifted": ("NOVEL_LOGIT_SHIFT", 0.7),
    "no quality": ("QUALITY", "none"),
    "thresholded": ("SCORE_THRESH_TEST", 0.25),
    "few anchors": ("TOPK_ANCHORS_TEST", 20, "TOPK_PAIRS_TEST", 500),
    "all pairs": ("TOPK_PAIRS_TEST", 0),
    "nothing found": ("SCORE_THRESH_TEST", 1.0),
}


@pytest.mark.parametrize("number", range(len(VARIANTS)), ids=list(VARIANTS))
def test_the_steps_of_the_graph_are_those_of_inference(number):
    variant = list(VARIANTS)[number]
    image_format, with_nms_operator = ("BGR", "RGB")[number % 2], number % 4 < 2
    predictor = make_predictor(*VARIANTS[variant], image_format=image_format)
    graph = ExportableDetector(
        predictor.model, image_format=image_format, with_nms_operator=with_nms_operator
    )
    total = 0
    for picture in pictures():
        image = predictor.prepare(picture)["image"]
        rgb = image if image_format == "RGB" else image.flip(0)
        with torch.no_grad():
            (expected,) = predictor.model([{"image": image}])
            boxes, scores, classes = graph(rgb.permute(1, 2, 0).contiguous())
        instances = expected["instances"]
        total += len(instances)
        torch.testing.assert_close(scores, instances.scores)
        torch.testing.assert_close(boxes, instances.pred_boxes.tensor, atol=1e-3, rtol=0)
        assert classes.tolist() == instances.pred_classes.tolist()
    assert (total > 40) == (variant != "nothing found")


ONNX = [pytest.param("baked.onnx", marks=pytest.mark.slow), "open.onnx"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The default variant in a form: "baked" with its classes, or "open" with them as an input."""
    folder, predictor = tmp_path_factory.mktemp("exported"), make_predictor()

    def export(name: str) -> tuple[OpenVocabularyPredictor, Path]:
        if name.endswith(".onnx") and not HAS_ONNX:
            pytest.skip("onnx, onnxscript or onnxruntime is missing")
        if not (folder / name).exists():
            before = set(folder.iterdir())
            export_graph(predictor, folder / name, vocabulary_as_input=name.startswith("open"))
            assert set(folder.iterdir()) - before == {folder / name}  # nothing else is left
        return predictor, folder / name

    return export


@pytest.mark.parametrize("name", ["baked.pt2", *ONNX])
def test_the_written_graph_detects_the_same(exported, name: str) -> None:
    predictor, path = exported(name)
    graph, metadata = load_graph(path)
    as_input = name.startswith("open")
    agreement = compare_detections(predictor, graph, pictures(), vocabulary_as_input=as_input)
    assert agreement.complete
    assert agreement.expected > 200
    assert len(set(agreement.sizes)) >= 3
    assert agreement.box_difference < 0.05
    assert metadata["class_names"] == (None if as_input else NAMES)
    assert (metadata["min_size"], metadata["max_size"]) == (96, 300)
    if as_input:
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


def run_consumer(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = str(ROOT / "tools" / "onnx_consumer.py")
    command = [sys.executable, "-c", BLOCKED, script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ONNX)
def test_the_consumer_needs_neither_torch_nor_this_package(exported, tmp_path, name: str) -> None:
    predictor, path = exported(name)
    picture = pictures()[2]
    Image.fromarray(picture[:, :, ::-1]).save(tmp_path / "picture.png")
    rows = predictor.model.text_classifier.text_embeddings.numpy()
    stored = make_text_embeddings(NAMES, rows, clip="fake", templates=("{}",))
    save_text_embeddings(stored, tmp_path / "classes.safetensors")
    embeddings = ["--embeddings", str(tmp_path / "classes.safetensors")]
    wanted, other = (embeddings, []) if name.startswith("open") else ([], embeddings)
    result = run_consumer(str(path), str(tmp_path / "picture.png"), "--threshold", "0", *wanted)
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    instances = predictor(picture)
    assert len(lines) == len(instances)
    found = Detections(
        np.array([[float(x) for x in line[2:]] for line in lines], np.float32),
        np.array([float(line[1]) for line in lines], np.float32),
        np.array([NAMES.index(line[0]) for line in lines]),
    )
    agreement = Agreement(sizes=[(1, 1)])
    boxes = instances.pred_boxes.tensor.numpy()
    agreement.add(
        Detections(boxes, instances.scores.numpy(), instances.pred_classes.numpy()), found
    )
    assert agreement.complete
    result = run_consumer(str(path), "no picture is read yet", *other)
    assert result.returncode == 2
    assert "--embeddings\n" in result.stderr
    assert "Traceback" not in result.stderr


def some(scores: list[float], shift: float = 0.0, label: int = 0) -> Detections:
    corners = np.arange(len(scores), dtype=np.float32)[:, None] * 100 + shift
    boxes = np.concatenate([corners, corners, corners + 50, corners + 50], axis=1)
    return Detections(boxes, np.array(scores, np.float32), np.full(len(scores), label))


@pytest.mark.parametrize(
    ("found", "complete", "agreeing"),
    [
        (some([0.9, 0.5, 0.2], shift=0.4), True, 3),
        (some([0.9, 0.5, 0.2], shift=0.6), False, 0),
        (some([0.9, 0.502, 0.2]), False, 2),
        (some([0.9, 0.5, 0.2], label=1), False, 0),
        (some([0.9, 0.5]), False, 2),
        (some([0.9, 0.5, 0.2, 0.1]), False, 3),
    ],
)
def test_what_counts_as_the_same(found, complete, agreeing) -> None:
    agreement = Agreement(sizes=[(1, 1)])
    agreement.add(some([0.9, 0.5, 0.2]), found)
    assert (agreement.complete, agreement.agreeing) == (complete, agreeing)
    assert not Agreement().complete  # nothing was compared


@pytest.mark.parametrize("missing", [1, 2])
def test_one_in_a_thousand_is_chance(missing: int) -> None:
    found = some(np.linspace(0.9, 0.1, 1000).tolist())
    found.boxes[:missing] += 2
    agreement = Agreement(sizes=[(1, 1)])
    agreement.add(some(np.linspace(0.9, 0.1, 1000).tolist()), found)
    assert agreement.complete is (missing == 1)


# --- What is refused, and the command line --------------------------------------------------------


def test_unusable_outputs(tmp_path, monkeypatch) -> None:
    with pytest.raises(ValueError, match="onnx"):
        check_output(tmp_path / "detector.pth")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="onnxscript"):
        check_output(tmp_path / "detector.onnx")


def test_the_names_that_a_graph_needs() -> None:
    predictor = make_predictor("NOVEL_LOGIT_SHIFT", 0.7)
    with pytest.raises(ValueError, match="NOVEL_LOGIT_SHIFT"):
        ExportableDetector(predictor.model, vocabulary_as_input=True)
    predictor = make_predictor()
    predictor.model.training_vocabulary = ()  # needed by a shift only
    assert ExportableDetector(predictor.model).novel_shift is None
    predictor.model.vocabulary_names = ()
    with pytest.raises(ValueError, match="vocabulary is empty"):
        ExportableDetector(predictor.model)


def test_a_failing_write_leaves_the_old_file(tmp_path, monkeypatch) -> None:
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


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_the_command_checks_what_it_wrote(exported, shift, tmp_path, monkeypatch, caplog) -> None:
    predictor, path = exported("baked.pt2")
    predictor.set_vocabulary(["something", "else"])  # the command changes it back

    def write(given: OpenVocabularyPredictor, output: Path, **_: object) -> None:
        assert given.vocabulary == tuple(NAMES)
        output.write_bytes(path.read_bytes())

    def moved(path: Path):
        run = lambda *_: some([0.9], shift)  # noqa: E731
        return run, {}

    monkeypatch.setattr(command, "load_predictor", lambda *_: predictor)
    monkeypatch.setattr(module, "export_graph", write)
    monkeypatch.setattr(module, "load_graph", moved)
    monkeypatch.setattr(
        OpenVocabularyPredictor, "__call__", lambda self, picture: instances_of(some([0.9]))
    )
    Image.fromarray(np.zeros((96, 96, 3), np.uint8)).save(tmp_path / "0.png")
    output = tmp_path / "new" / "detector.pt2"
    arguments = ["--config-file", CONFIG, "--output", str(output), "--check", str(tmp_path)]
    monkeypatch.setattr("detectron2.utils.logger.setup_logger", lambda **_: None)
    with caplog.at_level("INFO", logger="hierkd.export"):
        status = command.main([*arguments, "--vocabulary", ",".join(NAMES)])
    assert status == (1 if shift else 0)
    assert "1 pictures of 1 sizes" in caplog.text
    assert ("does not detect" in caplog.text) == bool(shift)


def instances_of(detections: Detections):
    from detectron2.structures import Boxes, Instances

    return Instances(
        (96, 96),
        pred_boxes=Boxes(torch.from_numpy(detections.boxes)),
        scores=torch.from_numpy(detections.scores),
        pred_classes=torch.from_numpy(detections.classes),
    )
