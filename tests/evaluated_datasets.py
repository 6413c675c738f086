"""Datasets for the evaluators: boxes written down in COCO's layout, and detections of them."""

import itertools
import json

import torch
from detectron2.data import MetadataCatalog
from detectron2.structures import Boxes, Instances

SIZE = 256
BASE, NOVEL = ("wolf", "dog"), ("umbrella", "cat")
# Neither in base-then-novel nor in alphabetical order, and with gaps in the ids.
IDS = {"wolf": 18, "cat": 17, "dog": 3, "umbrella": 28}
_SERIAL = itertools.count()


def register(folder, images, *, vocabulary=tuple(IDS), bare=False, **metadata):
    """Register ``images``, each a list of (class, XYXY box[, "crowd"]); returns the name.

    ``bare`` annotations have neither area nor iscrowd.
    """
    annotations = []
    for image_id, objects in enumerate(images, start=1):
        for name, (x0, y0, x1, y1), *crowd in objects:
            annotation = {"id": len(annotations) + 1, "image_id": image_id}
            annotation |= {"category_id": IDS[name], "bbox": [x0, y0, x1 - x0, y1 - y0]}
            if not bare:
                annotation |= {"area": (x1 - x0) * (y1 - y0), "iscrowd": int(bool(crowd))}
            annotations.append(annotation)
    named = {*vocabulary, *(each[0] for objects in images for each in objects)}
    content = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "height": SIZE, "width": SIZE}
            for i in range(1, len(images) + 1)
        ],
        "annotations": annotations,
        "categories": [{"id": IDS[n], "name": n} for n in sorted(named, key=IDS.get)],
    }
    name = f"evaluated_{next(_SERIAL)}"
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content))
    settings = {"thing_classes": vocabulary, "base_classes": BASE, "novel_classes": NOVEL}
    settings = {key: list(value) for key, value in {**settings, **metadata}.items()}
    MetadataCatalog.get(name).set(json_file=str(path), **settings)
    return name


def detections(found, vocabulary=tuple(IDS)):
    """Detectron2's output for an image: ``found`` is (class, XYXY box, score), ...; or indices."""
    instances = Instances((SIZE, SIZE))
    boxes = torch.tensor([box for _, box, _ in found], dtype=torch.float32)
    instances.pred_boxes = Boxes(boxes.reshape(-1, 4))
    instances.scores = torch.tensor([float(score) for *_, score in found])
    classes = [c if isinstance(c, int) else list(vocabulary).index(c) for c, *_ in found]
    instances.pred_classes = torch.tensor(classes, dtype=torch.int64)
    return {"instances": instances}


def proposals(found):
    """Detectron2's output for an image: ``found`` is (XYXY box, logit), ..."""
    instances = Instances((SIZE, SIZE))
    boxes = torch.tensor([box for box, _ in found], dtype=torch.float32)
    instances.proposal_boxes = Boxes(boxes.reshape(-1, 4))
    instances.objectness_logits = torch.tensor([float(logit) for _, logit in found])
    return {"proposals": instances}


def evaluate(evaluator, outputs):
    """Figures of ``outputs``, one an image from 1 on."""
    evaluator.reset()
    for image_id, output in enumerate(outputs, start=1):
        evaluator.process([{"image_id": image_id}], [output])
    (figures,) = evaluator.evaluate().values()
    return figures
