"""A detector as a file that runs without detectron2, and without PyTorch: ONNX, or a ``.pt2``.

Both hold one graph from a resized picture to its detections, of any size of picture or of one, with
the class names and all that a consumer needs to know as metadata. ONNX is written with ``onnx`` and
``onnxscript`` and run with ``onnxruntime`` (``pip install -e '.[export]'``), its convolutions in
8-bit integers if wanted; the ``.pt2`` of :func:`torch.export.save` needs nothing more, and
torchvision where it is loaded.
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
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes, Instances
from numpy.typing import NDArray
from torch.export import Dim, ExportedProgram

from hierkd.files import replacing
from hierkd.inference.exportable import ExportableDetector
from hierkd.inference.predictor import OpenVocabularyPredictor

__all__ = [
    "GraphDetections",
    "as_model",
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
# Detections from which score on a graph shares with PyTorch, all but which part of them, within how
# many pixels of the picture, and within how much of score. [ours]
FLOAT = (0.0, 1e-3, 0.5, 1e-3)
INT8 = (0.3, 0.1, 5.0, 0.1)  # demo.py shows those over 0.3


class GraphDetections(NamedTuple):
    """What a graph finds in one picture, best first."""

    boxes: NDArray[np.float32]  # (n, 4) XYXY, pixels
    scores: NDArray[np.float32]  # (n,)
    classes: NDArray[np.int64]  # (n,)


Graph = Callable[..., GraphDetections]
Inputs = Iterable[list[NDArray[Any]]]
Model = Callable[[list[dict[str, Any]]], list[dict[str, Instances]]]


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
    predictor: OpenVocabularyPredictor,
    path: Path,
    *,
    vocabulary_as_input: bool = False,
    calibration: Iterable[NDArray[np.uint8]] | None = None,
) -> None:
    """Write a detector's inference to a file, whole or not at all.

    The graph is for pictures of one size if ``predictor.resize`` is detectron2's ``Resize``.

    The metadata are ``class_names`` (null if the vocabulary is an input), ``min_size`` and
    ``max_size`` (the shorter side is resized to the first unless the longer one would exceed the
    second), ``embed_dim``, ``nms_thresh``, ``max_detections``, and the version of ``hierkd``, each
    as JSON.

    Args:
        predictor: Of a detector on the CPU, with the vocabulary that the graph will have.
        path: Ends in ".onnx" or ".pt2".
        vocabulary_as_input: The class embeddings are a second input of the graph instead.
        calibration: Pictures (H, W, 3), BGR, whose activations tell the ranges of 8-bit integers
            for the convolutions of a ".onnx"; None keeps float32.

    Raises:
        ValueError: The detector cannot be exported like that.
        OSError: The file cannot be written.
    """
    settings = predictor.model.inference_settings
    resize = predictor.resize
    fixed_size = getattr(resize, "shape", None)
    sides = fixed_size or (resize.short_edge_length[0], resize.max_size)
    content = {
        "class_names": None if vocabulary_as_input else list(predictor.vocabulary),
        "min_size": min(sides),
        "max_size": max(sides),
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
        program = _trace(graph.eval(), fixed_size)
        if path.suffix == ".onnx":
            seen = map(predictor.prepare, calibration or ())
            inputs = (_inputs(predictor, each, vocabulary_as_input) for each in seen)
            given = None if calibration is None else inputs
            making.write_bytes(_onnx_bytes(program, metadata, given))
        else:
            buffer = io.BytesIO()
            extra = {METADATA_FILE: json.dumps(metadata)}
            torch.export.save(program, buffer, extra_files=extra)
            making.write_bytes(buffer.getvalue())


def _trace(graph: ExportableDetector, fixed_size: tuple[int, int] | None) -> ExportedProgram:
    """Record inference as a graph for pictures of any size, or of one (height, width)."""
    # Sides of an example that are no multiples, and so large that no level is a single point: a
    # tracer takes a size of one for a constant.
    coarsest = max(graph.backbone.size_divisibility, *graph.anchor_generator.strides)
    sides = {0: Dim("height", min=coarsest + 1), 1: Dim("width", min=coarsest + 1)}
    height, width = fixed_size or (2 * coarsest + 5, 3 * coarsest + 9)
    examples = [torch.zeros(height, width, 3, dtype=torch.uint8)]
    shapes: dict[str, Any] = {"image": None if fixed_size else sides}
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


def _onnx_bytes(
    program: ExportedProgram, metadata: dict[str, str], calibration: Inputs | None
) -> bytes:
    """Translate to ONNX, in 8-bit integers if inputs are there to calibrate them by."""
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
    if calibration is not None:
        model = _quantized(model, calibration)
        del model.metadata_props[:]  # the quantizer's
    for name, value in metadata.items():
        model.metadata_props.add(key=name, value=value)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def _quantized(model: Any, inputs: Inputs) -> Any:
    """Let the convolutions of an ONNX graph compute in 8-bit integers, by ranges that inputs show.

    Weights have a scale per channel, and 7 bits: sums of 8 saturate on processors without VNNI.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    names = [each.name for each in model.graph.input]
    read = (dict(zip(names, given, strict=True)) for given in inputs)
    with TemporaryDirectory() as folder:
        plain, folded, quantized = (Path(folder, f"{step}.onnx") for step in range(3))
        onnx.save(model, plain)
        quant_pre_process(plain, folded, skip_symbolic_shape=True)  # normalisation into weights
        quantize_static(
            folded,
            quantized,
            SimpleNamespace(get_next=lambda: next(read, None)),
            op_types_to_quantize=["Conv"],
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return onnx.load(quantized)


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
    names.pop("", None)  # sizes that are fixed
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
    """Load an exported file to run it on the CPU, on as many threads as PyTorch.

    Returns:
        A function of a picture (H, W, 3) uint8, RGB, resized, and, where the vocabulary is an
        input, of class embeddings (K, D) float32.
    """
    if path.suffix == ".onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        providers = ["CPUExecutionProvider"]
        session = onnxruntime.InferenceSession(str(path), options, providers=providers)
        names = [each.name for each in session.get_inputs()]
        return lambda *inputs: GraphDetections(
            *session.run(list(OUTPUTS), dict(zip(names, inputs, strict=True)))
        )
    module = torch.export.load(path).module()

    def run(*inputs: NDArray[Any]) -> GraphDetections:
        with torch.no_grad():
            return GraphDetections(
                *(each.numpy() for each in module(*map(torch.from_numpy, inputs)))
            )

    return run


def as_model(
    predictor: OpenVocabularyPredictor, graph: Graph, *, vocabulary_as_input: bool = False
) -> Model:
    """Let a graph of :func:`load_graph` stand in for the ``predictor.model`` it was made of."""

    def detect(given: dict[str, Any]) -> dict[str, Instances]:
        found = graph(*_inputs(predictor, given, vocabulary_as_input))
        boxes, scores, classes = map(torch.from_numpy, found)
        instances = Instances(tuple(given["image"].shape[1:]), pred_boxes=Boxes(boxes))
        instances.scores, instances.pred_classes = scores, classes
        return {"instances": detector_postprocess(instances, given["height"], given["width"])}

    return lambda batched_inputs: list(map(detect, batched_inputs))


def _inputs(
    predictor: OpenVocabularyPredictor, prepared: dict[str, Any], vocabulary_as_input: bool
) -> list[NDArray[Any]]:
    """What a graph takes for a picture that ``predictor`` prepared."""
    image = prepared["image"].permute(1, 2, 0).numpy()
    rgb = image if predictor.image_format == "RGB" else image[:, :, ::-1]
    texts = [predictor.model.text_classifier.text_embeddings.numpy()] if vocabulary_as_input else []
    return [np.ascontiguousarray(rgb), *texts]


def same_detections(
    predictor: OpenVocabularyPredictor,
    exported: Model,
    pictures: Iterable[NDArray[np.uint8]],
    *,
    int8: bool = False,
) -> bool:
    """Run a graph beside the detector that it was made of, and log how well they agree.

    Args:
        predictor: With the vocabulary of the graph.
        exported: Of :func:`as_model`.
        pictures: (H, W, 3), BGR.
        int8: Compare as roughly as 8-bit integers compute.

    Returns:
        Whether each detection of the one is one of the other, but for a share: of two boxes whose
        scores differ by rounding only, chance says which suppresses the other.
    """
    least, share, *tolerances = INT8 if int8 else FLOAT
    number = expected = found = agreeing = 0
    for picture in pictures:
        (output,) = exported([predictor.prepare(picture)])
        both = [predictor(picture), output["instances"]]
        shown = [each[each.scores >= least] for each in both]
        wanted, given = (
            GraphDetections(x.pred_boxes.tensor.numpy(), x.scores.numpy(), x.pred_classes.numpy())
            for x in shown
        )
        number, expected = number + 1, expected + len(wanted.scores)
        found += len(given.scores)
        agreeing += count_agreeing(wanted, given, *tolerances)
    logger.info(
        "%d pictures; detections of score %g or more: %d by PyTorch, %d by the exported graph, %d "
        "the same within %g pixels and %g in score",
        *(number, least, expected, found, agreeing, *tolerances),
    )
    return expected + found - 2 * agreeing <= share * (expected + found)


def count_agreeing(
    expected: GraphDetections,
    found: GraphDetections,
    box_tolerance: float = 0.5,
    score_tolerance: float = 1e-3,
) -> int:
    """Pair the detections in one picture, each with the nearest that is left, and count pairs."""
    free = np.ones(len(found.scores), dtype=bool)
    for box, score, label in zip(*expected, strict=True):
        boxes = np.abs(found.boxes - box).max(axis=1, initial=0)
        fits = free & (found.classes == label) & (boxes <= box_tolerance)
        fits &= np.abs(found.scores - score) <= score_tolerance
        if fits.any():
            free[np.where(fits, boxes, np.inf).argmin()] = False
    return int((~free).sum())
