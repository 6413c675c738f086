"""A detector as a file that runs without detectron2, and without PyTorch: ONNX, or a ``.pt2``.

Both hold one graph from a resized picture to its detections, of any size of picture, with the
class names and all that a consumer needs to know as metadata. ONNX is written with ``onnx`` and
``onnxscript`` and run with ``onnxruntime`` (``pip install -e '.[export]'``); the ``.pt2`` of
:func:`torch.export.save` needs nothing more, and torchvision where it is loaded.
"""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata as distributions
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.export import Dim, ExportedProgram

from hierkd.files import replacing
from hierkd.inference.exportable import ExportableDetector
from hierkd.inference.predictor import OpenVocabularyPredictor

__all__ = [
    "Agreement",
    "Detections",
    "check_output",
    "compare_detections",
    "describe_graph",
    "export_graph",
    "load_graph",
    "require_packages",
    "trace",
]

logger = logging.getLogger(__name__)

OPSET = 18  # of ONNX: what PyTorch's exporter translates to by itself; onnxruntime >= 1.14 runs it
OUTPUTS = ("boxes", "scores", "classes")
SUFFIXES = (".onnx", ".pt2")
METADATA_FILE = "hierkd.json"  # of a .pt2
BOX_TOLERANCE = 0.5  # pixels of the picture
SCORE_TOLERANCE = 1e-3


class Detections(NamedTuple):
    """What a graph finds in one picture, best first."""

    boxes: NDArray[np.float32]  # (n, 4) XYXY, pixels
    scores: NDArray[np.float32]  # (n,)
    classes: NDArray[np.int64]  # (n,)


Graph = Callable[[NDArray[np.uint8], "NDArray[np.float32] | None"], Detections]


def require_packages(*names: str) -> None:
    """Make sure that optional packages are there.

    Raises:
        ImportError: some are not; the message names them and the command that installs them.
    """
    if missing := [name for name in names if importlib.util.find_spec(name) is None]:
        raise ImportError(
            f"not installed: {', '.join(missing)}; pip install {' '.join(missing)}, or "
            "pip install -e '.[export]'"
        )


def check_output(path: Path) -> None:
    """Make sure that a graph can be written to ``path``, before it is made.

    Raises:
        ValueError: the file name's ending is no format, or the path is a folder.
        ImportError: a package that the format needs is missing.
        OSError: the folder cannot be made or written to.
    """
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} must end in {' or '.join(SUFFIXES)}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder")
    if path.suffix == ".onnx":
        require_packages("onnx", "onnxscript")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
        pass


def trace(
    predictor: OpenVocabularyPredictor,
    *,
    vocabulary_as_input: bool = False,
    with_nms_operator: bool = False,
) -> ExportedProgram:
    """Record a detector's inference as a graph for pictures of any size.

    Args:
        predictor: of a detector on the CPU, with the vocabulary that the graph will have.
        vocabulary_as_input: the class embeddings are a second input of the graph instead.
        with_nms_operator: for ONNX; see :class:`hierkd.inference.exportable.ExportableDetector`.

    Raises:
        ValueError: the detector cannot be exported like that.
    """
    detector = predictor.model
    graph = ExportableDetector(
        detector,
        image_format=predictor.image_format,
        vocabulary_as_input=vocabulary_as_input,
        with_nms_operator=with_nms_operator,
    ).eval()
    stride = detector.backbone.size_divisibility
    # Sides of an example that are no multiples, and so large that no level is a single point: a
    # tracer takes a size of one for a constant.
    coarsest = max(stride, *detector.anchor_generator.strides)
    height, width = 2 * coarsest + 5, 3 * coarsest + 9
    sides = {0: Dim("height", min=coarsest + 1), 1: Dim("width", min=coarsest + 1)}
    examples = [torch.zeros(height, width, 3, dtype=torch.uint8)]
    shapes: dict[str, Any] = {"image": sides}
    if vocabulary_as_input:
        examples.append(torch.randn(7, detector.text_classifier.embed_dim))
        shapes["text_embeddings"] = {0: Dim("num_classes", min=1)}
    with torch.no_grad(), _quiet():
        return torch.export.export(
            graph,
            tuple(examples),
            dynamic_shapes=shapes,
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )


def describe_graph(
    predictor: OpenVocabularyPredictor, *, vocabulary_as_input: bool = False
) -> dict[str, str]:
    """What a consumer has to know of a graph: its metadata; every value is JSON.

    ``class_names`` (null if the vocabulary is an input), ``min_size`` and ``max_size`` (the shorter
    side is resized to the first unless the longer one would exceed the second), ``embed_dim``,
    ``nms_thresh``, ``max_detections``, and the version of ``hierkd``.
    """
    settings = predictor.model.inference_settings
    (min_size, *_), max_size = predictor.resize.short_edge_length, predictor.resize.max_size
    content = {
        "class_names": None if vocabulary_as_input else list(predictor.vocabulary),
        "min_size": min_size,
        "max_size": max_size,
        "embed_dim": predictor.model.text_classifier.embed_dim,
        "nms_thresh": settings.nms_thresh,
        "max_detections": settings.max_detections,
        "hierkd": distributions.version("hierkd"),
    }
    return {name: json.dumps(value) for name, value in content.items()}


def export_graph(
    predictor: OpenVocabularyPredictor, path: Path, *, vocabulary_as_input: bool = False
) -> None:
    """Write a detector's inference to a file, whole or not at all.

    Args:
        predictor: see :func:`trace`.
        path: ends in ".onnx" or ".pt2".
        vocabulary_as_input: see :func:`trace`.

    Raises:
        ValueError, ImportError, OSError: see :func:`check_output` and :func:`trace`.
    """
    check_output(path)
    metadata = describe_graph(predictor, vocabulary_as_input=vocabulary_as_input)
    as_onnx = path.suffix == ".onnx"
    program = trace(predictor, vocabulary_as_input=vocabulary_as_input, with_nms_operator=as_onnx)
    content = _onnx_bytes(program, metadata) if as_onnx else _pt2_bytes(program, metadata)
    with replacing(path) as making:
        making.write_bytes(content)


def _pt2_bytes(program: ExportedProgram, metadata: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with _quiet():
        torch.export.save(program, buffer, extra_files={METADATA_FILE: json.dumps(metadata)})
    return buffer.getvalue()


def _onnx_bytes(program: ExportedProgram, metadata: dict[str, str]) -> bytes:
    """Translate to ONNX."""
    import onnx

    user_input = torch.export.graph_signature.InputKind.USER_INPUT
    specs = program.graph_signature.input_specs
    inputs = [spec.arg.name for spec in specs if spec.kind == user_input]
    with _quiet():
        translated: Any = torch.onnx.export(
            program,
            (),
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=inputs,
            output_names=OUTPUTS,
            custom_translation_table={torch.ops.hierkd.nms_of_classes.default: _onnx_nms},
        )
    model = translated.model_proto
    _name_sizes(model.graph)
    for name, value in metadata.items():
        model.metadata_props.add(key=name, value=value)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def _onnx_nms(boxes: Any, scores: Any, classes: Any, iou_thresh: float, limit: int) -> Any:
    """:func:`hierkd.modeling.inference.nms_of_classes` in ONNX's operators."""
    from onnxscript import opset18 as op

    zero, one = op.Constant(value_ints=[0]), op.Constant(value_ints=[1])
    most = op.Constant(value_ints=[limit])
    last = op.ReduceMax(op.Concat(classes, zero, axis=0), keepdims=0)
    labels = op.Range(
        op.Constant(value_int=0), op.Add(last, op.Constant(value_int=1)), op.Constant(value_int=1)
    )
    own = op.Equal(op.Unsqueeze(labels, one), op.Unsqueeze(classes, zero))  # (K, n)
    by_class = op.Where(own, scores, op.Constant(value_float=-1.0))
    selected = op.NonMaxSuppression(  # (m, 3): picture, class, box
        op.Unsqueeze(boxes, zero),
        op.Unsqueeze(by_class, zero),
        most,
        op.Constant(value_floats=[iou_thresh]),
        op.Constant(value_floats=[-0.5]),  # scores below are of other classes
    )
    kept = op.Gather(selected, op.Constant(value_int=2), axis=1)
    _, order = op.TopK(op.Gather(scores, kept), op.Min(op.Shape(kept), most))
    return op.Gather(kept, order)


def _name_sizes(graph: Any) -> None:
    """Call the sizes that vary by their names, where the tracer numbered them."""

    def sizes(value: Any) -> Any:
        return value.type.tensor_type.shape.dim

    height, width, _ = sizes(graph.input[0])
    names = {height.dim_param: "height", width.dim_param: "width"}
    names |= {sizes(value)[0].dim_param: "num_classes" for value in graph.input[1:]}
    names |= {sizes(value)[0].dim_param: "num_detections" for value in graph.output}
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dim in sizes(value):
            if dim.dim_param in names:
                dim.dim_param = names[dim.dim_param]


@contextmanager
def _quiet() -> Iterator[None]:
    """Drop what the exporters warn of: their own internals."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


# --- Running what was written ---------------------------------------------------------------------


def load_graph(path: Path, *, threads: int | None = None) -> tuple[Graph, dict[str, Any]]:
    """Load an exported file to run it on the CPU.

    Args:
        path: ends in ".onnx" or ".pt2".
        threads: of onnxruntime; by default as many as PyTorch uses.

    Returns:
        A function of a picture (H, W, 3) RGB, resized, and of class embeddings (K, D) or None; and
        the metadata of :func:`describe_graph`, decoded.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: onnxruntime is missing.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no exported detector {str(path)!r}")
    run, metadata = (
        _load_onnx(path, threads or torch.get_num_threads())
        if path.suffix == ".onnx"
        else _load_pt2(path)
    )
    return run, {name: json.loads(value) for name, value in metadata.items()}


def _load_onnx(path: Path, threads: int) -> tuple[Graph, dict[str, str]]:
    require_packages("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(image: NDArray[np.uint8], embeddings: NDArray[np.float32] | None) -> Detections:
        feed: dict[str, Any] = {"image": image}
        if embeddings is not None:
            feed["text_embeddings"] = embeddings
        return Detections(*session.run(list(OUTPUTS), feed))

    return run, session.get_modelmeta().custom_metadata_map


def _load_pt2(path: Path) -> tuple[Graph, dict[str, str]]:
    files = {METADATA_FILE: ""}
    module = torch.export.load(path, extra_files=files).module()

    def run(image: NDArray[np.uint8], embeddings: NDArray[np.float32] | None) -> Detections:
        inputs = [torch.from_numpy(image)]
        if embeddings is not None:
            inputs.append(torch.from_numpy(embeddings))
        with torch.no_grad():
            return Detections(*(each.numpy() for each in module(*inputs)))

    return run, json.loads(files[METADATA_FILE])


# --- Comparing with the detector ------------------------------------------------------------------


@dataclass
class Agreement:
    """Detections of a graph beside those of the detector that it was made of.

    Attributes:
        sizes: (height, width) of the network inputs, one a picture.
        expected: number of the detector's detections.
        found: of the graph's.
        agreeing: pairs of one class within the tolerances.
        box_difference: largest of these, in pixels of the picture.
        score_difference: largest of these.
    """

    sizes: list[tuple[int, int]] = field(default_factory=list)
    expected: int = 0
    found: int = 0
    agreeing: int = 0
    box_difference: float = 0.0
    score_difference: float = 0.0

    @property
    def complete(self) -> bool:
        """Whether each detection of the one is one of the other, one in 1000 aside.

        Of two boxes whose scores differ by rounding only, chance says which suppresses the other.
        """
        missing = self.expected - self.agreeing
        return bool(self.sizes) and self.expected == self.found and missing * 1000 <= self.expected

    def add(self, expected: Detections, found: Detections) -> None:
        """Compare the detections in one picture: each with the nearest that is left."""
        self.expected += len(expected.scores)
        self.found += len(found.scores)
        free = np.ones(len(found.scores), dtype=bool)
        for box, score, label in zip(*expected, strict=True):
            boxes = np.abs(found.boxes - box).max(axis=1, initial=0)
            scores = np.abs(found.scores - score)
            fits = free & (found.classes == label)
            fits &= (boxes <= BOX_TOLERANCE) & (scores <= SCORE_TOLERANCE)
            if fits.any():
                nearest = int(np.where(fits, boxes, np.inf).argmin())
                free[nearest] = False
                self.agreeing += 1
                self.box_difference = max(self.box_difference, float(boxes[nearest]))
                self.score_difference = max(self.score_difference, float(scores[nearest]))

    def __str__(self) -> str:
        return (
            f"{len(self.sizes)} pictures of {len(set(self.sizes))} sizes; detections: "
            f"{self.expected} by PyTorch, {self.found} by the exported graph, {self.agreeing} the "
            f"same; largest differences: {self.box_difference:.2g} pixels, "
            f"{self.score_difference:.2g} in score"
        )


def compare_detections(
    predictor: OpenVocabularyPredictor,
    graph: Graph,
    pictures: Iterable[NDArray[np.uint8]],
    *,
    vocabulary_as_input: bool = False,
) -> Agreement:
    """Run a graph beside the detector that it was made of.

    Args:
        predictor: with the vocabulary of the graph.
        graph: of :func:`load_graph`.
        pictures: (H, W, 3), BGR.
        vocabulary_as_input: give the graph the predictor's class embeddings.
    """
    agreement = Agreement()
    texts = predictor.model.text_classifier.text_embeddings.numpy() if vocabulary_as_input else None
    for picture in pictures:
        size = np.array(picture.shape[1::-1], np.float32)
        prepared = predictor.prepare(picture)["image"].permute(1, 2, 0).numpy()
        if predictor.image_format == "BGR":
            prepared = prepared[:, :, ::-1]
        found = graph(np.ascontiguousarray(prepared), texts)
        height, width = prepared.shape[:2]
        scale = np.tile(size / np.array([width, height], np.float32), 2).astype(np.float32)
        instances = predictor(picture)
        expected = Detections(
            instances.pred_boxes.tensor.numpy(),
            instances.scores.numpy(),
            instances.pred_classes.numpy(),
        )
        agreement.sizes.append((height, width))
        agreement.add(expected, found._replace(boxes=found.boxes * scale))
    return agreement
