"""A dataset of a few pictures with coloured rectangles, registered as an open-vocabulary one."""

import itertools
import json
from pathlib import Path

import numpy as np
from PIL import Image

from hierkd.data.coco import register_ovd_dataset

VOCABULARY = ("ant", "bee", "cow", "dog", "elk")  # in id order
BASE, NOVEL = ("ant", "cow", "elk"), ("bee", "dog")
COLOURS = {
    "ant": (200, 40, 40),
    "bee": (230, 190, 20),
    "cow": (60, 60, 200),
    "dog": (30, 150, 60),
    "elk": (150, 60, 160),
}
SIZE = 128
_SERIAL = itertools.count()

# Per picture: class and XYXY box. The first has no novel object, the last no object at all.
PICTURES = (
    (("ant", (10, 10, 50, 50)),),
    (("bee", (60, 20, 110, 90)), ("ant", (5, 5, 40, 45))),
    (("dog", (20, 60, 70, 120)),),
    (("dog", (70, 70, 120, 120)), ("bee", (8, 8, 58, 48)), ("elk", (70, 5, 120, 50))),
    (("cow", (30, 30, 90, 90)), ("bee", (92, 92, 124, 124))),
    (),
)


def register_toy_world(folder: Path) -> str:
    """Draw the pictures into ``folder`` and return the new dataset's name."""
    root = folder / "images"
    root.mkdir(parents=True)
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for image_id, objects in enumerate(PICTURES, start=1):
        pixels = rng.integers(100, 150, size=(SIZE, SIZE, 3), dtype=np.uint8)
        for name, (x0, y0, x1, y1) in objects:
            pixels[y0:y1, x0:x1] = COLOURS[name]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": 10 * (VOCABULARY.index(name) + 1),
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                    "iscrowd": 0,
                }
            )
        Image.fromarray(pixels).save(root / f"{image_id}.png")
        images.append(
            {"id": image_id, "file_name": f"{image_id}.png", "height": SIZE, "width": SIZE}
        )
    json_file = folder / "annotations.json"
    categories = [{"id": 10 * (k + 1), "name": name} for k, name in enumerate(VOCABULARY)]
    json_file.write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    name = f"toy_world_{next(_SERIAL)}"
    register_ovd_dataset(
        name,
        json_file=str(json_file),
        image_root=str(root),
        vocabulary=VOCABULARY,
        base_classes=BASE,
        novel_classes=NOVEL,
    )
    return name
