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
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
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
    "Detections",
    "check_output",
    "count_agreeing",
    "export_graph",
    "load_graph",
    "same_detections",
]

logger = logging.getLogger(__name__)

OPSET = 18  # of ONNX: what PyTorch's exporter translates to by itself; onnxruntime >= 1.14 runs it
OUTPUTS = ("boxes", "scores", "classes")
METADATA_FILE = "hierkd.json"  # of a .pt2
BOX_TOLERANCE = 0.5  # pixels of the picture
SCORE_TOLERANCE = 1e-3


class Detections(NamedTuple):
    """What a graph finds in one picture, best first."""

    boxes: NDArray[np.float32]  # (n, 4) XYXY, pixels
    scores: NDArray[np.float32]  # (n,)
    classes: NDArray[np.int64]  # (n,)


Graph = Callable[..., Detections]


def check_output(path: Path) -> None:
    """Make sure that a graph can be written to ``path``, and run from there, before it is made.

    Raises:
        ValueError: The file name's ending is no format.
        ImportError: A package that the format needs is missing.
        OSError: The folder cannot be made.
    """
    if path.suffix not in (".onnx", ".pt2"):
        raise ValueError(f"{path} must end in .onnx or .pt2")
    needed = ("onnx", "onnxscript", "onnxruntime") if path.suffix == ".onnx" else ()
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise ImportError(f"not installed: {', '.join(missing)}; pip install -e '.[export]'")
    path.parent.mkdir(parents=True, exist_ok=True)


def export_graph(
    predictor: OpenVocabularyPredictor, path: Path, *, vocabulary_as_input: bool = False
) -> None:
    """Write a detector's inference to a file, whole or not at all.

    The metadata are ``class_names`` (null if the vocabulary is an input), ``min_size`` and
    ``max_size`` (the shorter side is resized to the first unless the longer one would exceed the
    second), ``embed_dim``, ``nms_thresh``, ``max_detections``, and the version of ``hierkd``, each
    as JSON.

    Args:
        predictor: Of a detector on the CPU, with the vocabulary that the graph will have.
        path: Ends in ".onnx" or ".pt2".
        vocabulary_as_input: The class embeddings are a second input of the graph instead.

    Raises:
        ValueError: The detector cannot be exported like that.
        OSError: The file cannot be written.
    """
    settings = predictor.model.inference_settings
    content = {
        "class_names": None if vocabulary_as_input else list(predictor.vocabulary),
        "min_size": predictor.resize.short_edge_length[0],
        "max_size": predictor.resize.max_size,
        "embed_dim": predictor.model.text_classifier.embed_dim,
        "nms_thresh": settings.nms_thresh,
        "max_detections": settings.max_detections,
        "hierkd": distributions.version("hierkd"),
    }
    metadata = {name: json.dumps(value) for name, value in content.items()}
    graph = ExportableDetector(
        predictor.model,
        image_format=predictor.image_format,
        vocabulary_as_input=vocabulary_as_input,
        with_nms_operator=path.suffix == ".onnx",
    )
    with _quiet(), replacing(path) as making:
        program = _trace(graph.eval())
        if path.suffix == ".onnx":
            making.write_bytes(_onnx_bytes(program, metadata))
        else:
            buffer = io.BytesIO()
            extra = {METADATA_FILE: json.dumps(metadata)}
            torch.export.save(program, buffer, extra_files=extra)
            making.write_bytes(buffer.getvalue())


def _trace(graph: ExportableDetector) -> ExportedProgram:
    """Record inference as a graph for pictures of any size."""
    # Sides of an example that are no multiples, and so large that no level is a single point: a
    # tracer takes a size of one for a constant.
    coarsest = max(graph.backbone.size_divisibility, *graph.anchor_generator.strides)
    sides = {0: Dim("height", min=coarsest + 1), 1: Dim("width", min=coarsest + 1)}
    examples = [torch.zeros(2 * coarsest + 5, 3 * coarsest + 9, 3, dtype=torch.uint8)]
    shapes: dict[str, Any] = {"image": sides}
    if graph.vocabulary_as_input:
        examples.append(torch.randn(7, graph.text_classifier.embed_dim))
        shapes["text_embeddings"] = {0: Dim("num_classes", min=1)}
    with torch.no_grad():
        return torch.export.export(
            graph,
            tuple(examples),
            dynamic_shapes=shapes,
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )


def _onnx_bytes(program: ExportedProgram, metadata: dict[str, str]) -> bytes:
    """Translate to ONNX."""
    import onnx

    user_input = torch.export.graph_signature.InputKind.USER_INPUT
    specs = program.graph_signature.input_specs
    translated: Any = torch.onnx.export(
        program,
        (),
        dynamo=True,
        verbose=False,
        opset_version=OPSET,
        input_names=[spec.arg.name for spec in specs if spec.kind == user_input],
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


def load_graph(path: Path) -> Graph:
    """Load an exported file to run it on the CPU.

    Returns:
        A function of a picture (H, W, 3) uint8, RGB, resized, and, where the vocabulary is an
        input, of class embeddings (K, D) float32.
    """
    if path.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        names = [each.name for each in session.get_inputs()]
        return lambda *inputs: Detections(
            *session.run(list(OUTPUTS), dict(zip(names, inputs, strict=True)))
        )
    module = torch.export.load(path).module()

    def run(*inputs: NDArray[Any]) -> Detections:
        with torch.no_grad():
            return Detections(*(each.numpy() for each in module(*map(torch.from_numpy, inputs))))

    return run


def same_detections(
    predictor: OpenVocabularyPredictor,
    graph: Graph,
    pictures: Iterable[NDArray[np.uint8]],
    *,
    vocabulary_as_input: bool = False,
) -> bool:
    """Run a graph beside the detector that it was made of, and log how well they agree.

    Args:
        predictor: With the vocabulary of the graph.
        graph: Of :func:`load_graph`.
        pictures: (H, W, 3), BGR.
        vocabulary_as_input: Give the graph the predictor's class embeddings.

    Returns:
        Whether each detection of the one is one of the other, one in 1000 aside: of two boxes whose
        scores differ by rounding only, chance says which suppresses the other.
    """
    texts = [predictor.model.text_classifier.text_embeddings.numpy()] if vocabulary_as_input else []
    number = expected = found = agreeing = 0
    for picture in pictures:
        prepared = predictor.prepare(picture)["image"].permute(1, 2, 0).numpy()
        rgb = prepared if predictor.image_format == "RGB" else prepared[:, :, ::-1]
        given = graph(np.ascontiguousarray(rgb), *texts)
        scale = np.divide(picture.shape[1::-1], prepared.shape[1::-1]).astype(np.float32)
        given = given._replace(boxes=given.boxes * np.tile(scale, 2))
        wanted = predictor(picture)
        fields = (wanted.pred_boxes.tensor, wanted.scores, wanted.pred_classes)
        number, found = number + 1, found + len(given.scores)
        expected += len(wanted)
        agreeing += count_agreeing(Detections(*(each.numpy() for each in fields)), given)
    logger.info(
        "%d pictures; detections: %d by PyTorch, %d by the exported graph, %d the same within %g "
        "pixels and %g in score",
        *(number, expected, found, agreeing, BOX_TOLERANCE, SCORE_TOLERANCE),
    )
    return expected == found and (expected - agreeing) * 1000 <= expected


def count_agreeing(expected: Detections, found: Detections) -> int:
    """Pair the detections in one picture, each with the nearest that is left, and count pairs."""
    free = np.ones(len(found.scores), dtype=bool)
    for box, score, label in zip(*expected, strict=True):
        boxes = np.abs(found.boxes - box).max(axis=1, initial=0)
        fits = free & (found.classes == label) & (boxes <= BOX_TOLERANCE)
        fits &= np.abs(found.scores - score) <= SCORE_TOLERANCE
        if fits.any():
            free[np.where(fits, boxes, np.inf).argmin()] = False
    return int((~free).sum())
