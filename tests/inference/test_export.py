"""Exported graphs: the same detections as the detector's own, at sizes that were never traced."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data.transforms import Resize
from detectron2.modeling import build_model
from detectron2.structures import Instances
from PIL import Image

import hierkd.inference.export as module
import hierkd.modeling.detector as meta_arch
from evaluated_datasets import register
from fake_teacher import FakeTeacher
from hierkd.inference.export import (
    GraphDetections,
    as_model,
    check_output,
    count_agreeing,
    export_graph,
    load_graph,
    same_detections,
)
from hierkd.inference.exportable import ExportableDetector
from hierkd.inference.predictor import OpenVocabularyPredictor
from hierkd.load_config import load_config
from hierkd.teachers.texts import make_text_embeddings, save_text_embeddings
from tools import export as command

ROOT = Path(__file__).resolve().parent.parent.parent
CONFIG = "configs/miniature/hierkd.yaml"
NAMES = ["elk", "ant", "dog", "bee", "cow"]  # in no order
HAS_ONNX = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))


def make_predictor(*opts: object, image_format: str = "BGR") -> OpenVocabularyPredictor:
    """A random detector whose scores are all different and whose boxes vary."""
    small = ("MODEL.SLIM_RESNET.WIDTHS", "[8, 12, 16, 20]", "MODEL.FPN.OUT_CHANNELS", "32")
    plain = ("MODEL.DEVICE", "cpu", "DATASETS.TRAIN", "()", "MODEL.WEIGHTS", "")
    own = [f"MODEL.ATSS.{x}" if i % 2 == 0 else str(x) for i, x in enumerate(opts)]
    cfg = load_config(CONFIG, [*small, *plain, "MODEL.ATSS.NUM_CONVS", "1", *own])
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
    sizes = [(96, 96), (64, 200), (131, 77), (40, 300)]  # none is the one that is traced
    small = [rng.integers(0, 256, (h // 8 + 1, w // 8 + 1, 3), np.uint8) for h, w in sizes]
    return [
        np.asarray(Image.fromarray(x).resize((w, h)))
        for x, (h, w) in zip(small, sizes, strict=True)
    ]


@pytest.mark.parametrize(
    ("options", "image_format", "with_nms_operator"),
    [
        ((), "BGR", True),
        (("NOVEL_LOGIT_SHIFT", 0.7), "BGR", False),
        (("QUALITY", "none"), "RGB", False),
        (("SCORE_THRESH_TEST", 0.25), "BGR", True),
        (("TOPK_ANCHORS_TEST", 20, "TOPK_PAIRS_TEST", 500), "RGB", True),
        (("TOPK_PAIRS_TEST", 0), "BGR", False),
        (("SCORE_THRESH_TEST", 1.0), "RGB", False),  # nothing is found
    ],
)
def test_the_steps_of_the_graph_are_those_of_inference(options, image_format, with_nms_operator):
    predictor = make_predictor(*options, image_format=image_format)
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
    assert (total > 40) == (options != ("SCORE_THRESH_TEST", 1.0))


@pytest.fixture(scope="module")
def predictor():
    return make_predictor()


@pytest.fixture(scope="module")
def onnx_file(predictor, tmp_path_factory):
    """A graph of any classes."""
    if not HAS_ONNX:
        pytest.skip("onnx, onnxscript or onnxruntime is missing")
    path = tmp_path_factory.mktemp("exported") / "open.onnx"
    export_graph(predictor, path, vocabulary_as_input=True)
    assert list(path.parent.iterdir()) == [path]
    return path


def test_a_written_pt2_detects_the_same(predictor, tmp_path) -> None:
    export_graph(predictor, tmp_path / "baked.pt2")
    exported = as_model(predictor, load_graph(tmp_path / "baked.pt2"))
    assert same_detections(predictor, exported, pictures())
    files = {"hierkd.json": ""}
    torch.export.load(tmp_path / "baked.pt2", extra_files=files)
    metadata = {name: json.loads(value) for name, value in json.loads(files["hierkd.json"]).items()}
    assert metadata["class_names"] == NAMES
    assert (metadata["min_size"], metadata["max_size"]) == (96, 300)


@pytest.mark.parametrize(
    ("names", "examples"),
    [
        (NAMES, {}),
        ([f"thing {number}" for number in range(23)], {}),
        (["elk"], {"mug": [pictures()[0], (pictures()[2], (5, 9, 60, 100))]}),
    ],
)
def test_a_written_onnx_detects_the_same(onnx_file, names, examples) -> None:
    other = make_predictor()
    other.set_vocabulary(names, examples)
    assert len(other.vocabulary) == len(names) + len(examples)
    exported = as_model(other, load_graph(onnx_file), vocabulary_as_input=True)
    assert same_detections(other, exported, pictures())


def test_openvino_runs_the_graph_unchanged(predictor, onnx_file) -> None:
    openvino = pytest.importorskip("openvino")
    run = openvino.Core().compile_model(onnx_file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def graph(*inputs: np.ndarray) -> GraphDetections:
        found = run(inputs)
        return GraphDetections(*(found[name].copy() for name in module.OUTPUTS))

    exported = as_model(predictor, graph, vocabulary_as_input=True)
    assert same_detections(predictor, exported, pictures())


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


def consume(*arguments: object) -> subprocess.CompletedProcess[str]:
    script = str(ROOT / "tools" / "onnx_consumer.py")
    command = [sys.executable, "-c", BLOCKED, script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def check_consumer(result: subprocess.CompletedProcess[str], wanted: Instances) -> None:
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    fields = (wanted.pred_boxes.tensor, wanted.scores, wanted.pred_classes)
    found = GraphDetections(
        np.array([[float(x) for x in line[2:]] for line in lines], np.float32),
        np.array([float(line[1]) for line in lines], np.float32),
        np.array([NAMES.index(line[0]) for line in lines]),
    )
    expected = GraphDetections(*(each.numpy() for each in fields))
    assert count_agreeing(expected, found) == len(wanted) == len(lines) > 0


def test_the_consumer_needs_neither_torch_nor_this_package(predictor, onnx_file, tmp_path) -> None:
    shown, stored = tmp_path / "picture.png", tmp_path / "classes.safetensors"
    picture = pictures()[2]
    Image.fromarray(picture[:, :, ::-1]).save(shown)
    rows = predictor.model.text_classifier.text_embeddings.numpy()
    texts = make_text_embeddings(NAMES, rows, clip="fake", templates=("{}",))
    save_text_embeddings(texts, stored)
    result = consume(onnx_file, shown, "--threshold", 0, "--embeddings", stored)
    check_consumer(result, predictor(picture))
    result = consume(onnx_file, shown)
    assert (result.returncode, "--embeddings\n" in result.stderr) == (2, True)
    Image.new("RGB", (3000, 1)).save(shown)
    assert consume(onnx_file, shown, "--embeddings", stored).returncode == 0
    Image.fromarray(np.full((9, 9), 4000, np.uint16)).save(shown)
    result = consume(onnx_file, shown, "--embeddings", stored)
    assert (result.returncode, "more than 8 bits" in result.stderr) == (2, True)


def test_a_graph_of_one_size_in_8_bit_integers(tmp_path, monkeypatch) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    predictor, path, shown = make_predictor(), tmp_path / "small.onnx", tmp_path / "picture.png"
    predictor.resize = Resize((80, 120))
    export_graph(predictor, path, calibration=pictures())
    model = onnx.load(path)
    size = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    assert size == [80, 120, 3]
    made_by = {output: node.op_type for node in model.graph.node for output in node.output}
    sources = [node.input[:2] for node in model.graph.node if node.op_type == "Conv"]
    assert {made_by[each] for pair in sources for each in pair} == {"DequantizeLinear"}
    exported = as_model(predictor, load_graph(path))
    least, _, *tolerances = module.INT8
    # Random weights have scores so close that rounding decides more often which box is suppressed.
    monkeypatch.setattr(module, "INT8", (least, 0.3, *tolerances))
    assert same_detections(predictor, exported, pictures(), int8=True)
    assert not same_detections(predictor, exported, pictures())
    picture = pictures()[2]
    Image.fromarray(picture[:, :, ::-1]).save(shown)
    (output,) = exported([predictor.prepare(picture)])
    check_consumer(consume(path, shown, "--threshold", 0), output["instances"])


def some(scores: list[float], shift: float = 0.0, label: int = 0) -> GraphDetections:
    corners = np.arange(len(scores), dtype=np.float32)[:, None] * 100 + shift
    boxes = np.concatenate([corners, corners, corners + 50, corners + 50], axis=1)
    return GraphDetections(boxes, np.array(scores, np.float32), np.full(len(scores), label))


@pytest.mark.parametrize(
    ("found", "agreeing"),
    [
        (some([0.9, 0.5, 0.2], shift=0.4), 3),
        (some([0.9, 0.5, 0.2], shift=0.6), 0),
        (some([0.9, 0.502, 0.2]), 2),
        (some([0.9, 0.5, 0.2], label=1), 0),
        (some([0.9, 0.5]), 2),
        (some([0.9, 0.5, 0.2, 0.1]), 3),
    ],
)
def test_what_counts_as_the_same(predictor, found, agreeing) -> None:
    assert count_agreeing(some([0.9, 0.5, 0.2]), found) == agreeing


@pytest.mark.parametrize("extra", [0, 1])
def test_a_graph_that_finds_more_is_not_the_same(predictor, extra) -> None:
    """The detector itself, as a graph."""

    def twice(inputs: list[dict[str, object]]) -> list[dict[str, Instances]]:
        (output,) = predictor.model(inputs)
        found = output["instances"]
        return [{"instances": Instances.cat([found, found[:extra]])}]

    picture = np.zeros((96, 96, 3), np.uint8)
    assert same_detections(predictor, twice, [picture]) is not bool(extra)


def test_what_was_exported_is_evaluated_beside_the_detector(predictor, tmp_path, caplog) -> None:
    dataset = register(tmp_path, [[("dog", (10, 10, 60, 60))]], vocabulary=("dog", "cat"))
    Image.fromarray(np.zeros((96, 96, 3), np.uint8)).save(tmp_path / "1.png")
    record = {"file_name": str(tmp_path / "1.png"), "image_id": 1}
    with caplog.at_level("INFO"), predictor.model.vocabulary(("dog", "cat")):
        command.evaluate(predictor, predictor.model, dataset, [record])
    tables = [x.getMessage() for x in caplog.records if x.name.endswith("split_coco_evaluation")]
    assert len(tables) == 2
    assert tables[0] == tables[1]


# --- What is refused, and the command line --------------------------------------------------------


def test_a_missing_package_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"onnxscript.*pip install -e '\.\[export\]'"):
        check_output(tmp_path / "detector.onnx")


def test_the_names_that_a_graph_needs() -> None:
    predictor = make_predictor("NOVEL_LOGIT_SHIFT", 0.7)
    with pytest.raises(ValueError, match="NOVEL_LOGIT_SHIFT"):
        ExportableDetector(predictor.model, vocabulary_as_input=True)
    predictor.model.vocabulary_names = ()
    with pytest.raises(ValueError, match="vocabulary is empty"):
        ExportableDetector(predictor.model)


def test_a_failing_write_leaves_the_old_file(predictor, tmp_path, monkeypatch) -> None:
    output = tmp_path / "detector.pt2"
    output.write_bytes(b"old")

    def full(program: object, file, **_: object) -> None:
        file.write(b"new")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_trace", lambda *_: None)
    monkeypatch.setattr(torch.export, "save", full)
    with pytest.raises(OSError, match="No space left"):
        export_graph(predictor, output)
    assert output.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "detector.txt"], "must end in .onnx or .pt2"),
        (["--output", "{tmp}/a.pt2", "--check", "nowhere.jpg"], "no picture or video matches"),
        (["--output", "{tmp}/a.pt2", "--int8", "--calibrate", "{tmp}"], "--int8 needs"),
        (["--output", "{tmp}/a.pt2", "--calibrate", "{tmp}"], "--int8 and --calibrate"),
        (["--output", "{tmp}/a.pt2", "--fixed-size", "0", "9"], "--fixed-size must be positive"),
        (["--output", "{tmp}/a.pt2", "--evaluate", "miniature_tset"], "Unknown dataset"),
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
def test_the_command_checks_what_it_wrote(predictor, same, tmp_path, monkeypatch) -> None:
    def write(given: OpenVocabularyPredictor, output: Path, **_: object) -> None:
        assert given.vocabulary == ("something", "else")
        output.write_bytes(b"graph")

    monkeypatch.setattr("hierkd.inference.detectors.load_detectors", lambda *_: {"": predictor})
    monkeypatch.setattr("detectron2.utils.logger.setup_logger", lambda **_: None)
    monkeypatch.setattr(module, "export_graph", write)
    monkeypatch.setattr(module, "load_graph", lambda path: path.read_bytes())
    monkeypatch.setattr(module, "as_model", lambda predictor, graph, **_: graph)
    monkeypatch.setattr(
        module, "same_detections", lambda p, graph, read, **_: len(list(read)) == 1 and same
    )
    Image.fromarray(np.zeros((96, 96, 3), np.uint8)).save(tmp_path / "0.png")
    arguments = ["--config-file", CONFIG, "--output", str(tmp_path / "new" / "detector.pt2")]
    arguments += ["--check", str(tmp_path), "--vocabulary", "something,else"]
    assert command.main(arguments) == (0 if same else 1)
    predictor.set_vocabulary(NAMES)
