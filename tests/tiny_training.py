"""All that ``train_net.py`` needs to train in a second: a world, a random CLIP, a small detector.

The pictures lie where the miniature's would, under its categories, so that the miniature's config
and dataset names serve, in this process and in another.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from PIL import Image

import train_net
from clip_files import random_clip, write_state_dict
from hierkd.load_config import load_config
from hierkd.miniature.world import (
    MINIATURE_BASE,
    MINIATURE_CLASSES,
    MINIATURE_NOVEL,
    register_miniature,
)
from log_handlers import own_log_handlers

CONFIG = "configs/miniature/hierkd.yaml"
EMBED_DIM = 16  # of clip_files' "tiny_vit"
SIZE = 96
BASE, NOVEL = MINIATURE_BASE[:2], MINIATURE_NOVEL[:2]  # the names in use; all are in the files
COLOURS = dict(
    zip((*BASE, *NOVEL), ((200, 40, 40), (60, 60, 200), (230, 190, 20), (30, 150, 60)), strict=True)
)
# Per picture: class and XYXY box, about as large as the anchors of the finest level.
PICTURES = (
    ((BASE[0], (4, 4, 64, 64)),),
    ((BASE[1], (20, 24, 88, 88)), (NOVEL[0], (0, 0, 30, 30))),
    ((BASE[0], (30, 8, 94, 70)), (NOVEL[1], (0, 60, 34, 94))),
    ((BASE[1], (8, 30, 72, 94)),),
    ((BASE[0], (10, 12, 70, 76)), (BASE[1], (40, 40, 94, 94))),
    ((BASE[1], (16, 2, 84, 62)), (NOVEL[0], (2, 66, 40, 94))),
)


def write_world(root: Path) -> None:
    """Write ``root/miniature`` with the same pictures for training and for validation."""
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        folder = root / "miniature" / part
        folder.mkdir(parents=True)
        for number, objects in enumerate(PICTURES, start=1):
            pixels = rng.integers(100, 150, size=(SIZE, SIZE, 3), dtype=np.uint8)
            for name, (x0, y0, x1, y1) in objects:
                pixels[y0:y1, x0:x1] = COLOURS[name]
            Image.fromarray(pixels).save(folder / f"{number}.png")
    folder = root / "miniature" / "annotations"
    folder.mkdir()
    for name, vocabulary in {
        "train_base": MINIATURE_BASE,
        "val_base": MINIATURE_BASE,
        "val_novel": MINIATURE_NOVEL,
        "val_all": MINIATURE_CLASSES,
    }.items():
        (folder / f"{name}.json").write_text(json.dumps(coco_json(vocabulary)))


def coco_json(vocabulary: tuple[str, ...]) -> dict[str, Any]:
    """The annotations of the categories in ``vocabulary``, each picture with two captions."""
    ids = {name: MINIATURE_CLASSES.index(name) + 1 for name in vocabulary}
    images, annotations = [], []
    for number, objects in enumerate(PICTURES, start=1):
        names = " and ".join(name for name, _ in objects)
        images.append(
            {"id": number, "file_name": f"{number}.png", "height": SIZE, "width": SIZE}
            | {"captions": [f"a picture of {names}.", f"{names} on a grey background."]}
        )
        annotations += [
            {"id": 100 * number + i, "image_id": number, "category_id": ids[name], "iscrowd": 0}
            | {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0)}
            for i, (name, (x0, y0, x1, y1)) in enumerate(objects)
            if name in ids
        ]
    categories = [{"id": i, "name": name} for name, i in ids.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def write_clip(path: Path, **overrides: Any) -> Path:
    """Write a random CLIP with embeddings of ``EMBED_DIM``."""
    return write_state_dict(path, random_clip("tiny_vit", **overrides))


def command_line(output: Path, clip: Path, *extra: str) -> list[str]:
    """Arguments of ``train_net.py``: flags first, then KEY VALUE pairs, which win over ours."""
    flags = [each for each in extra if each.startswith("--")]
    pairs = list(extra[len(flags) :])
    small = {
        "OUTPUT_DIR": output,
        "MODEL.DEVICE": "cpu",
        "MODEL.WEIGHTS": "",
        "MODEL.TEACHER.WEIGHTS": clip,
        "MODEL.TEXT_CLASSIFIER.EMBED_DIM": EMBED_DIM,
        "MODEL.SLIM_RESNET.WIDTHS": [8, 12, 16, 20],
        "MODEL.FPN.OUT_CHANNELS": 16,
        "MODEL.ATSS.NUM_CONVS": 1,
        "INPUT.MIN_SIZE_TRAIN": (SIZE,),
        "INPUT.MIN_SIZE_TEST": SIZE,
        "DATASETS.TEST": ("miniature_ovd_val_novel", "miniature_ovd_val_all"),
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.MAX_ITER": 4,
        "SOLVER.WARMUP_ITERS": 1,
        "SOLVER.CHECKPOINT_PERIOD": 2,
    }
    ours = [str(each) for pair in small.items() for each in pair]
    return ["--config-file", CONFIG, *flags, *ours, *pairs]


def write_run(folder: Path, clip: Path, *pairs: str) -> Path:
    """A training's folder as its end leaves it, of a detector that learned nothing (seed 0)."""
    arguments = command_line(folder, clip, *pairs)
    cfg = load_config(CONFIG, arguments[2:])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(cfg.dump())
    torch.manual_seed(0)
    torch.save({"model": build_model(cfg).state_dict()}, folder / "model_final.pth")
    (folder / "last_checkpoint").write_text("model_final.pth")
    return folder


def call_main(arguments: list[str]) -> dict[str, Any] | None:
    """``train_net.main`` in this process; leaves no log handler behind."""
    with own_log_handlers():
        return train_net.main(train_net.get_parser().parse_args(arguments))


@contextlib.contextmanager
def prepared(root: Path) -> Iterator[Path]:
    """A world and a CLIP in ``root``, which the miniature's names, and a cache, mean meanwhile."""
    write_world(root)
    write_clip(root / "clip.pt")
    with pytest.MonkeyPatch.context() as patch, miniature_at(root):
        patch.setenv("HIERKD_CACHE", str(root / "cache"))
        patch.setenv("PYTHONHASHSEED", "0")  # detectron2 sets it; undone with the rest
        yield root


@contextlib.contextmanager
def miniature_at(root: Path) -> Iterator[None]:
    """Register the miniature's datasets for the world in ``root``; back to what they were after."""
    register_anew(str(root))
    try:
        yield
    finally:
        register_anew(None)


def register_anew(root: str | None) -> None:
    """Register the miniature's datasets for the world in ``root``; None: at their usual place."""
    for name in [each for each in DatasetCatalog.list() if each.startswith("miniature_ovd_")]:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    register_miniature(root)
