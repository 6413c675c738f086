"""Stopping at the first number that is not finite, with all that is needed to see it again.

A :class:`NonFiniteGuard` looks at the losses and the gradients of every step before the optimizer
does. When one is infinite or NaN, on any process, all processes stop with the iteration, the
losses and the images; the weights from before the step lie in a file that is both a checkpoint and
a dump for ``tools/replay.py``. Under a gradient scaler infinite gradients are no fault: the scaler
skips the step. The guard counts those, and stops when nothing but them comes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from fvcore.nn.precise_bn import get_bn_modules
from torch import Tensor, nn

from hierkd.files import replacing

__all__ = ["NonFiniteError", "NonFiniteGuard", "pack_batch", "unpack_batch"]

logger = logging.getLogger(__name__)

# Steps that the scaler may skip one after the other: from its start at 65536 the scale has then
# fallen to 0.002, and no finite gradient overflows half precision any more. [ours]
_MAX_CONSECUTIVE_SKIPS = 25
_MAX_NAMED = 5  # gradients that a message names before it only counts them


class NonFiniteError(FloatingPointError):
    """A loss or a gradient is infinite or NaN; the optimizer has not seen it."""


class NonFiniteGuard(HookBase):  # type: ignore[misc]  # detectron2 is untyped
    """Checks each step between backward and optimizer.

    A hook of the inner trainer, which alone has a place there. It costs one reduction over the
    gradients and, with several processes, one number sent round. It waits for the device where
    detectron2 is about to wait for it anyway, to read the losses.
    """

    def __init__(
        self,
        model: nn.Module,
        folder: Path,
        *,
        config: str = "",
        state: Callable[[], dict[str, Any]] = dict,
    ) -> None:
        """Watch a model.

        Args:
            model: as trained, that is, wrapped for several processes.
            folder: for dumps; made when there is one.
            config: of the run, as YAML, for the dump.
            state: gives the trainer's state (optimizer, schedule) for the dump.
        """
        self._model, self._folder, self._config, self._state = model, folder, config, state
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._batch: Sequence[Mapping[str, Any]] = ()
        self._losses: dict[str, Tensor] = {}
        self._rng: dict[str, Tensor] = {}
        self._statistics: list[tuple[Tensor, Tensor]] | None = None  # buffer and its copy
        self._scale = 0.0
        self._skipped = self._consecutive = 0
        model.register_forward_pre_hook(self._before_forward)
        model.register_forward_hook(self._after_forward)

    # ------------------------------------------------------------------------------- what is kept

    def _before_forward(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        """Keep what a step starts from and changes before the check: random state, BN's means."""
        if not model.training or not args:
            return
        self._batch = args[0]
        self._rng = {"cpu": torch.get_rng_state()}
        device = self._parameters[0].device
        if device.type == "cuda":
            self._rng["cuda"] = torch.cuda.get_rng_state(device)
        if self._statistics is None:
            buffers = [b for layer in get_bn_modules(model) for b in layer.buffers()]
            self._statistics = [(buffer, buffer.clone()) for buffer in buffers]
        for buffer, copy in self._statistics:
            copy.copy_(buffer)

    def _after_forward(self, model: nn.Module, _: tuple[Any, ...], losses: Any) -> None:
        if model.training and isinstance(losses, dict):
            self._losses = {name: loss.detach() for name, loss in losses.items()}

    # ---------------------------------------------------------------------------------- the check

    def after_backward(self) -> None:
        """Check this step.

        Raises:
            NonFiniteError: on all processes, if a number of one of them is not finite.
        """
        if not self._losses:
            return
        scaler = getattr(self.trainer, "grad_scaler", None)
        values = torch.stack([loss.float() for loss in self._losses.values()])
        if scaler is None:
            gradients = [p.grad for p in self._parameters if p.grad is not None]
            norms = [norm.float() for norm in torch._foreach_norm(gradients)]
            values = torch.cat([values, torch.stack(norms).sum()[None]])
        fault = (~values.isfinite()).any().float()
        if comm.get_world_size() > 1:
            torch.distributed.all_reduce(fault, torch.distributed.ReduceOp.MAX)
        if fault.item() > 0:
            self._stop(with_gradients=scaler is None)
        if scaler is not None:
            self._watch(scaler.get_scale())

    def _watch(self, scale: float) -> None:
        """Count the steps that the scaler skipped: it lowers the scale at each of them."""
        if scale >= self._scale:
            self._consecutive = 0
        else:
            self._skipped += 1
            self._consecutive += 1
            logger.warning(
                "AMP overflow: the gradients of iteration %d did not fit half precision, the step "
                "was skipped, the scale is now %g (%d skipped so far)",
                *(self.trainer.iter - 1, scale, self._skipped),
            )
        self._scale = scale
        get_event_storage().put_scalar("amp_skipped_steps", self._skipped)
        if self._consecutive >= _MAX_CONSECUTIVE_SKIPS:
            raise NonFiniteError(
                f"{self._consecutive} steps in a row were skipped for infinite gradients, up to "
                f"iteration {self.trainer.iter - 1}, although the scale fell to {scale:g}: this is "
                f"no overflow of half precision. The losses are finite; gradients that are not: "
                f"{_some(self._bad_gradients())}. Train with SOLVER.AMP.ENABLED False to find "
                "the step"
            )

    def _stop(self, *, with_gradients: bool) -> None:
        losses = {name: loss.item() for name, loss in self._losses.items()}
        report = {
            "rank": comm.get_rank(),
            "losses": {k: v for k, v in losses.items() if not _is_finite(v)},
            "gradients": self._bad_gradients() if with_gradients else [],
            "images": [str(x.get("file_name", x.get("image_id", "?"))) for x in self._batch],
        }
        reports = comm.all_gather(report)
        if not any(each["losses"] or each["gradients"] for each in reports):
            return  # every gradient is finite, only the norm of one is beyond float32
        by_loss = any(each["losses"] for each in reports)
        at_fault = [each for each in reports if each["losses"] or not by_loss]
        for buffer, copy in self._statistics or ():
            buffer.copy_(copy)
        if report["rank"] in [each["rank"] for each in at_fault]:
            self._write_dump(self._path(report["rank"]), losses, report)
        comm.synchronize()  # all dumps are written before the first process ends
        raise NonFiniteError(self._message(at_fault))

    def _message(self, at_fault: Sequence[dict[str, Any]]) -> str:
        found = []
        for each in at_fault:
            if each["losses"]:
                what = ", ".join(f"{name} is {value}" for name, value in each["losses"].items())
            else:
                what = f"the losses are finite, gradients are not: {_some(each['gradients'])}"
            where = f"process {each['rank']}: " if comm.get_world_size() > 1 else ""
            path = self._path(each["rank"])
            found.append(
                f"{where}{what}; images {', '.join(each['images'])}; see it again with "
                f"`python tools/replay.py {path}`"
            )
        return (
            f"iteration {self.trainer.iter}: " + " | ".join(found) + ". The optimizer has not "
            "stepped: that file is a checkpoint from before the iteration as well"
        )

    def _bad_gradients(self) -> list[str]:
        return [
            name
            for name, p in _unwrapped(self._model).named_parameters()
            if p.grad is not None and not bool(p.grad.isfinite().all())
        ]

    def _path(self, rank: int) -> Path:
        suffix = f"_process{rank}" if comm.get_world_size() > 1 else ""
        return self._folder / f"iteration_{self.trainer.iter:07d}{suffix}.pth"

    def _write_dump(self, path: Path, losses: dict[str, float], report: dict[str, Any]) -> None:
        model = _unwrapped(self._model)
        state = self._state()
        for part in (state, state.get("_trainer", {})):
            if "iteration" in part:
                part["iteration"] = self.trainer.iter - 1  # the last one that was completed
        names = tuple(getattr(model, "vocabulary_names", ()))
        dump = {
            "model": model.state_dict(),
            "trainer": state,
            "iteration": self.trainer.iter - 1,
            "non_finite": {
                "losses": losses,
                "gradients": report["gradients"],
                "images": report["images"],
                "batch": pack_batch(self._batch),
                "rng": self._rng,
                "config": self._config,
                "vocabulary": names,
                "text_embeddings": model.text_classifier.text_embeddings if names else None,
                "half_precision": hasattr(self.trainer, "grad_scaler"),
                "world_size": comm.get_world_size(),
            },
        }
        with replacing(path) as temporary:
            torch.save(dump, temporary)


def pack_batch(batch: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Turn dataset dicts into tensors and plain values, which load without unpickling code."""
    return [{key: _pack(value) for key, value in sample.items()} for sample in batch]


def unpack_batch(packed: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Undo :func:`pack_batch`."""
    return [{key: _unpack(value) for key, value in sample.items()} for sample in packed]


def _pack(value: Any) -> Any:
    if isinstance(value, Instances):
        fields = {name: _pack(field) for name, field in value.get_fields().items()}
        return {"image_size": tuple(value.image_size), "fields": fields}
    if isinstance(value, Boxes):
        return {"boxes": value.tensor}
    if value is None or isinstance(value, Tensor | bool | int | float | str):
        return value
    return str(value)


def _unpack(value: Any) -> Any:
    if isinstance(value, dict) and value.keys() == {"image_size", "fields"}:
        fields = {name: _unpack(field) for name, field in value["fields"].items()}
        return Instances(value["image_size"], **fields)
    if isinstance(value, dict) and value.keys() == {"boxes"}:
        return Boxes(value["boxes"])
    return value


def _unwrapped(model: nn.Module) -> Any:
    return model.module if hasattr(model, "module") else model


def _is_finite(value: float) -> bool:
    return abs(value) < float("inf")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more if names else "none"
