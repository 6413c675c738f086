"""The optimizer: detectron2's, plus AdamW and clipping of the whole gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from detectron2.solver import build_optimizer as build_detectron2_optimizer
from detectron2.solver import get_default_optimizer_params
from torch import Tensor, nn

__all__ = ["FULL_MODEL_CLIP", "build_optimizer", "check_optimizer_state"]

FULL_MODEL_CLIP = "full_model"


def build_optimizer(cfg: Any, model: nn.Module) -> torch.optim.Optimizer:
    """Build the optimizer of ``cfg.SOLVER``.

    ``CLIP_GRADIENTS.CLIP_TYPE = "full_model"`` clips the norm of all gradients together, as the
    release does (norm 10); detectron2's own clip types look at each parameter by itself. With AMP
    the gradients are already unscaled when they are clipped.

    Raises:
        ValueError: for an unknown ``SOLVER.OPTIMIZER``.
    """
    clip = cfg.SOLVER.CLIP_GRADIENTS
    clip_full_model = clip.ENABLED and clip.CLIP_TYPE == FULL_MODEL_CLIP
    if cfg.SOLVER.OPTIMIZER == "SGD":
        sgd_cfg = cfg.clone()
        sgd_cfg.defrost()
        sgd_cfg.SOLVER.CLIP_GRADIENTS.ENABLED = clip.ENABLED and not clip_full_model
        optimizer: torch.optim.Optimizer = build_detectron2_optimizer(sgd_cfg, model)
    elif cfg.SOLVER.OPTIMIZER == "ADAMW":
        if clip.ENABLED and not clip_full_model:
            raise ValueError(
                f"SOLVER.OPTIMIZER ADAMW clips with CLIP_TYPE {FULL_MODEL_CLIP!r} only, "
                f"got {clip.CLIP_TYPE!r}"
            )
        parameters = get_default_optimizer_params(
            model,
            weight_decay_norm=cfg.SOLVER.WEIGHT_DECAY_NORM,
            bias_lr_factor=cfg.SOLVER.BIAS_LR_FACTOR,
            weight_decay_bias=cfg.SOLVER.WEIGHT_DECAY_BIAS,
            base_lr=cfg.SOLVER.BASE_LR,
        )
        optimizer = torch.optim.AdamW(
            parameters, lr=cfg.SOLVER.BASE_LR, weight_decay=cfg.SOLVER.WEIGHT_DECAY
        )
    else:
        raise ValueError(f"SOLVER.OPTIMIZER must be SGD or ADAMW, got {cfg.SOLVER.OPTIMIZER!r}")

    if clip_full_model:

        def clip_gradients(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, clip.CLIP_VALUE, clip.NORM_TYPE)

        optimizer.register_step_pre_hook(clip_gradients)
    return optimizer


def check_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Refuse to go on with the state of another optimizer, or of other parameters.

    torch notices some of it, in words of its own, and some only in the first step.

    Raises:
        ValueError: they differ; says in what, and which keys decide it.
    """
    problem = ""
    ours, theirs = optimizer.state_dict()["param_groups"], state["param_groups"]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if ("momentum" in ours[0]) != ("momentum" in theirs[0]):  # which SGD alone has
        problem = f"its optimizer is no {type(optimizer).__name__}"
    elif [each["params"] for each in ours] != [each["params"] for each in theirs]:
        found = sum(len(group["params"]) for group in theirs)
        problem = f"it has {found} trained parameters, this run {len(parameters)}"
    else:
        for index, moments in state["state"].items():
            expected = tuple(parameters[index].shape)
            shapes = [tuple(v.shape) for v in moments.values() if isinstance(v, Tensor) and v.dim()]
            if not problem and any(shape != expected for shape in shapes):
                problem = f"parameter {index} has shape {shapes[0]}, in this run {expected}"
    if problem:
        raise ValueError(
            f"--resume: the checkpoint is of another training: {problem}. Resume with its "
            "config.yaml (SOLVER.OPTIMIZER and all of MODEL as they were), or start anew from its "
            "weights: without --resume, with MODEL.WEIGHTS and another OUTPUT_DIR"
        )
