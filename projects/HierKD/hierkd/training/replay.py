"""Seeing a loss that was not finite again, from the dump that the training left."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from hierkd.load_config import load_config
from hierkd.training.non_finite import unpack_batch

__all__ = ["Replay", "read_dump", "replay"]


@dataclass(frozen=True)
class Replay:
    """A step that was done again.

    Attributes:
        losses: of the whole batch.
        losses_of_images: of each image by itself; with batch normalisation, and for losses that
            compare images, not a share of those of the batch.
        gradients: names of the parameters whose gradient for the whole batch is not finite.
    """

    losses: Mapping[str, float]
    losses_of_images: Sequence[Mapping[str, float]]
    gradients: Sequence[str]

    @property
    def is_finite(self) -> bool:
        """Whether nothing was found."""
        return not self.gradients and all(map(math.isfinite, self.losses.values()))


def read_dump(path: Path) -> dict[str, Any]:
    """Read a dump; nothing in it is executed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no dump of a non-finite step.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}")
    try:
        dump = torch.load(path, map_location="cpu", weights_only=True)
    # what broken and foreign files raise has no common class
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a dump: {error}") from error
    if not isinstance(dump, dict) or "non_finite" not in dump:
        raise ValueError(f"{path} is no dump of a step that was not finite: it has none of its own")
    return dump


def replay(dump: Mapping[str, Any], overrides: Sequence[str] = ()) -> Replay:
    """Do the step again.

    Args:
        dump: from :func:`read_dump`.
        overrides: KEY VALUE pairs for the config, such as ``MODEL.DEVICE cpu``.
    """
    found = dump["non_finite"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(found["config"], encoding="utf-8")
        cfg = load_config(str(file), ["MODEL.WEIGHTS", "", *overrides])
    model: Any = build_model(cfg)
    if found["vocabulary"]:
        model.set_vocabulary(found["vocabulary"], found["text_embeddings"])
    batch = unpack_batch(found["batch"])
    half = found["half_precision"] and model.device.type == "cuda"

    def losses_of(samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        model.load_state_dict(dump["model"])  # batch normalisation moves its means
        model.train()
        torch.set_rng_state(found["rng"]["cpu"])
        if "cuda" in found["rng"] and model.device.type == "cuda":
            torch.cuda.set_rng_state(found["rng"]["cuda"], model.device)
        autocast = torch.autocast("cuda", dtype=torch.float16) if half else nullcontext()
        with EventStorage(), autocast:
            losses: dict[str, torch.Tensor] = model(samples)
        return losses

    whole = losses_of(batch)
    sum(whole.values(), torch.zeros((), device=model.device)).backward()
    gradients = [
        name
        for name, p in model.named_parameters()
        if p.grad is not None and not bool(p.grad.isfinite().all())
    ]
    with torch.no_grad():
        single = [losses_of([sample]) for sample in batch]
    return Replay(_numbers(whole), [_numbers(each) for each in single], gradients)


def _numbers(losses: Mapping[str, torch.Tensor]) -> dict[str, float]:
    return {name: loss.item() for name, loss in losses.items()}
