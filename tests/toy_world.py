"""A dataset of a few pictures with coloured rectangles, registered as an open-vocabulary one."""

import itertools
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fake_teacher import FakeTeacher
from hierkd.data.coco import register_ovd_dataset

VOCABULARY = ("elk", "bee", "ant", "dog", "cow")  # in id order, which is not the alphabet's
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


class ColourTeacher(FakeTeacher):
    """Names a region by the colour at its centre; classes are unit vectors of ``embed_dim``.

    Args:
        embed_dim: At least the number of classes.
        confuse: Class to the class that it is taken for.
        sure: Class to the length of its regions' embeddings, 1 for the others.
        image_format: Of the images that it is shown, "RGB" or "BGR".
    """

    logit_scale = 100.0

    def __init__(self, embed_dim, *, confuse=(), sure=(), image_format="RGB"):
        super().__init__(embed_dim)
        self.confuse, self.sure = dict(confuse), dict(sure)
        self.image_format = image_format

    def encode_classes(self, names):
        return torch.eye(self.embed_dim)[[VOCABULARY.index(name) for name in names]]

    def encode_regions(self, images, boxes, crop_scale):
        super().encode_regions(images, boxes, crop_scale)
        rows = [torch.zeros(0, self.embed_dim)]
        for image, image_boxes in zip(images, boxes, strict=True):
            rgb = image if self.image_format == "RGB" else image.flip(0)
            for x0, y0, x1, y1 in image_boxes.tolist():
                colour = tuple(rgb[:, int(y0 + y1) // 2, int(x0 + x1) // 2].tolist())
                name = next(n for n, each in COLOURS.items() if each == colour)
                name = self.confuse.get(name, name)
                rows.append(self.sure.get(name, 1.0) * self.encode_classes([name]))
        return torch.cat(rows)
