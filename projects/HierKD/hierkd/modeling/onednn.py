"""Matrix products by oneDNN in inference on a CPU.

PyTorch computes convolutions on a CPU with oneDNN, but matrix products in float32 with its BLAS. In
PyTorch's own builds that is MKL, which is made for Intel's processors: on two cores of an AMD EPYC
oneDNN takes half of its time. The products have no derivative here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["linear", "use_onednn"]

# Layers with fewer weights are left as they are: nothing is won. [ours]
_FEW_WEIGHTS = 2**18


def _find_linear() -> Callable[..., Tensor] | None:
    """What ``torch.compile`` makes of a linear layer on a CPU; None if this PyTorch has none."""
    if not torch.backends.mkldnn.is_available():
        return None
    try:
        return torch.ops.mkldnn._linear_pointwise
    except (AttributeError, RuntimeError):
        return None


_linear_pointwise = _find_linear()


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` by oneDNN where that is possible: float32, on a CPU, without derivatives.

    Args:
        inputs: (..., I).
        weight: (O, I).
        bias: (O,).

    Returns:
        (..., O).
    """
    if (
        _linear_pointwise is None
        or weight.device.type != "cpu"
        or not inputs.dtype == weight.dtype == torch.float32
        or torch.is_grad_enabled()
    ):
        return F.linear(inputs, weight, bias)
    rows = inputs.reshape(-1, weight.shape[1])
    outputs = _linear_pointwise(rows, weight, bias, "none", [], "")
    return outputs.view(*inputs.shape[:-1], len(weight))


def use_onednn(module: nn.Module) -> int:
    """Let the linear and attention layers of a frozen model compute with :func:`linear`, in place.

    Args:
        module: in evaluation mode; it keeps its parameters.

    Returns:
        Number of layers changed: those of some size; 0 where PyTorch lacks oneDNN.

    Raises:
        ValueError: ``module`` is in training mode.
    """
    if module.training:
        raise ValueError("oneDNN has no derivatives: it is for evaluation mode only")
    changed = 0
    if _linear_pointwise is None:
        return changed
    for part in list(module.modules()):
        for name, child in list(part.named_children()):
            if type(child) is nn.Linear and child.weight.numel() >= _FEW_WEIGHTS:
                setattr(part, name, _Linear(child))
            elif type(child) is nn.MultiheadAttention and _is_plain(child):
                setattr(part, name, _SelfAttention(child))
            else:
                continue
            changed += 1
    return changed


class _Linear(nn.Module):
    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, inputs: Tensor) -> Tensor:
        return linear(inputs, self.weight, self.bias)


def _is_plain(attention: nn.MultiheadAttention) -> bool:
    """Whether it is one that :class:`_SelfAttention` can stand for."""
    weight = attention.in_proj_weight
    return (
        weight is not None
        and weight.numel() >= _FEW_WEIGHTS
        and attention.bias_k is None
        and not attention.add_zero_attn
    )


class _SelfAttention(nn.Module):
    """An ``nn.MultiheadAttention`` whose queries, keys and values are of the same tokens."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        **others: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention``, to which anything unusual goes."""
        attention = self.attention
        usual = query is key is value and query.dim() == 3 and not need_weights and not others
        if not usual or (attn_mask is not None and attn_mask.dim() != 2):
            return attention(  # type: ignore[no-any-return]
                query, key, value, need_weights=need_weights, attn_mask=attn_mask, **others
            )
        tokens = query if attention.batch_first else query.transpose(0, 1)  # (N, L, D)
        number, length, width = tokens.shape
        heads = attention.num_heads
        projected = linear(tokens, attention.in_proj_weight, attention.in_proj_bias)
        split = projected.view(number, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = ~attn_mask  # True: kept out there, taken in here
        mixed = F.scaled_dot_product_attention(split[0], split[1], split[2], attn_mask=attn_mask)
        mixed = mixed.transpose(1, 2).reshape(number, length, width)
        outputs = linear(mixed, attention.out_proj.weight, attention.out_proj.bias)
        return (outputs if attention.batch_first else outputs.transpose(0, 1)), None
