#!/usr/bin/env python
"""Detect with an exported .onnx: numpy, Pillow, onnxruntime and safetensors.

    python tools/onnx_consumer.py detector.onnx street.jpg
    python tools/onnx_consumer.py any_classes.onnx street.jpg --embeddings my_classes.safetensors

Prints class, score and box (x0, y0, x1, y1 in pixels) of each detection over --threshold.
"""

import argparse
import json

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("model")
parser.add_argument("picture")
parser.add_argument("--embeddings", help=".safetensors of datasets/extract_text_embeddings.py")
parser.add_argument("--threshold", type=float, default=0.3)
args = parser.parse_args()

import numpy as np  # noqa: E402  (after the command line, which answers at once)
import onnxruntime  # noqa: E402
from PIL import Image, ImageOps  # noqa: E402
from safetensors import safe_open  # noqa: E402

session = onnxruntime.InferenceSession(args.model, providers=["CPUExecutionProvider"])
asks = "text_embeddings" in [each.name for each in session.get_inputs()]
if asks != bool(args.embeddings):
    need = "asks for classes: give" if asks else "has classes of its own: leave out"
    parser.error(f"{args.model} {need} --embeddings")
about = {k: json.loads(v) for k, v in session.get_modelmeta().custom_metadata_map.items()}
opened = Image.open(args.picture)
if opened.mode[0] in "IF" or opened.format == "EPS":  # Pillow would cut off at 255
    parser.error(f"{args.picture} has more than 8 bits a channel, or is an EPS document")
picture = ImageOps.exif_transpose(opened).convert("RGB")
sides = session.get_inputs()[0].shape[1::-1]  # width and height: numbers only of a fixed size
if isinstance(sides[0], str):
    factor = about["min_size"] / min(picture.size)
    factor = min(factor, about["max_size"] / max(picture.size))
    sides = [max(1, int(side * factor + 0.5)) for side in picture.size]
resized = picture.resize(sides, Image.BILINEAR)
inputs, names = {"image": np.asarray(resized)}, about["class_names"]
if args.embeddings:
    with safe_open(args.embeddings, framework="numpy") as stored:
        names = json.loads(stored.metadata()["names"])
        inputs["text_embeddings"] = stored.get_tensor("embeddings")
boxes, scores, classes = session.run(["boxes", "scores", "classes"], inputs)
boxes *= np.tile(np.divide(picture.size, resized.size), 2).astype(np.float32)
for box, score, label in zip(boxes, scores, classes, strict=True):
    if score >= args.threshold:
        print(f"{names[label]:20} {score:.4f}", *(f"{side:8.2f}" for side in box))
