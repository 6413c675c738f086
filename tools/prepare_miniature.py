#!/usr/bin/env python
"""Make the miniature: the rendered world, its tiny CLIP and the backbone's warm start.

    python tools/prepare_miniature.py

Everything goes to ``$DETECTRON2_DATASETS/miniature``; what is there and up to date is kept.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hierkd.command import run_command

if TYPE_CHECKING:
    from hierkd.miniature.clip import TinyCLIPSpec
    from hierkd.miniature.world import MiniatureSpec

logger = logging.getLogger("hierkd.prepare_miniature")

CONFIG = "configs/miniature/hierkd.yaml"


def make_once(path: Path, recipe: dict[str, Any], train: Callable[[], dict[str, float]]) -> None:
    """Train a file unless it is there and its stamp says that it was made by this recipe."""
    from hierkd.files import write_json_atomically

    stamp = path.with_suffix(".json")
    recipe = json.loads(json.dumps(recipe))
    if path.is_file() and stamp.is_file() and json.loads(stamp.read_text())["recipe"] == recipe:
        logger.info("%s is up to date", path)
        return
    stamp.unlink(missing_ok=True)  # it speaks of the old file
    write_json_atomically(stamp, {"recipe": recipe, "figures": train()})


def make_teacher(path: Path, spec: TinyCLIPSpec, world: MiniatureSpec) -> None:
    """Train the tiny CLIP unless it is there."""
    from hierkd.miniature.clip import train_tiny_clip

    recipe = {"clip": asdict(spec), "world": asdict(world)}
    make_once(path, recipe, lambda: train_tiny_clip(path, spec, world))


def make_warm_start(path: Path, world: MiniatureSpec, config_file: str) -> None:
    """Train the backbone's warm start unless it is there."""
    import torch
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.backbone import build_backbone

    from hierkd.load_config import load_config
    from hierkd.miniature.warm_start import train_warm_start

    cfg = load_config(config_file)
    keys = (cfg.MODEL.BACKBONE, cfg.MODEL.SLIM_RESNET, cfg.MODEL.RESNETS.NORM, cfg.MODEL.FPN)
    pixels = (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)

    def train() -> dict[str, float]:
        torch.manual_seed(world.seed)  # of the backbone's initial weights
        backbone = build_backbone(cfg, ShapeSpec(channels=3)).bottom_up
        mean, std = pixels
        return train_warm_start(
            backbone, path, cfg.DATASETS.TRAIN[0], pixel_mean=mean, pixel_std=std
        )

    recipe = {"backbone": [str(key) for key in (*keys, *pixels)], "world": asdict(world)}
    make_once(path, recipe, train)


def prepare(
    world: MiniatureSpec, config_file: str = CONFIG, world_only: bool = False
) -> dict[str, float]:
    """Make whatever is missing; return the seconds of each stage."""
    from hierkd.miniature.clip import TinyCLIPSpec
    from hierkd.miniature.world import ensure_miniature, miniature_root

    root = miniature_root()
    stages = {"world": lambda: ensure_miniature(root, world)}
    if not world_only:
        stages["teacher"] = lambda: make_teacher(root / "teacher.pt", TinyCLIPSpec(), world)
        stages["warm start"] = lambda: make_warm_start(root / "backbone.pth", world, config_file)
    seconds = {}
    for name, stage in stages.items():
        started = time.monotonic()
        stage()
        seconds[name] = round(time.monotonic() - started, 1)
    return seconds


def main() -> None:
    """Run the stages and say how long they took."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of the world")
    parser.add_argument("--config-file", default=CONFIG, help="whose backbone is warmed up")
    parser.add_argument(
        "--named-probability",
        type=float,
        help="that a caption of the pictures names a class they hold; the pictures stay the same",
    )
    parser.add_argument(
        "--world-only", action="store_true", help="make no teacher and no warm start"
    )
    args = parser.parse_args()
    named = {} if args.named_probability is None else {"named_probability": args.named_probability}
    if not all(0 <= value <= 1 for value in named.values()):
        parser.error(f"--named-probability must be in [0, 1], got {args.named_probability}")
    from detectron2.utils.logger import setup_logger

    from hierkd.miniature.world import MiniatureSpec, miniature_root

    setup_logger(name="hierkd", abbrev_name="hierkd")
    seconds = prepare(MiniatureSpec(seed=args.seed, **named), args.config_file, args.world_only)
    print(f"{miniature_root()} is ready; seconds: {seconds}")


if __name__ == "__main__":
    run_command(main)
