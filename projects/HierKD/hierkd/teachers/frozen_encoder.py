"""Make a frozen image encoder faster without changing what it computes, except for rounding."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

__all__ = ["fold_batch_norms", "make_batch"]


def fold_batch_norms(module: nn.Module) -> int:
    """Fold each batch normalisation into the convolution before it, in place.

    In evaluation mode a batch normalisation is an affine function per channel, which the weights
    and a bias of the convolution express: one pass over the activations less.  Pairs are found as
    CLIP's ResNets have them: children ``conv1``, ``bn1``, and neighbours in an ``nn.Sequential``.

    Args:
        module: in evaluation mode, with the running statistics that are to stay.

    Returns:
        Number of batch normalisations folded; 0 for a vision transformer.

    Raises:
        ValueError: `module` is in training mode.
    """
    if module.training:
        raise ValueError("batch normalisations are folded in evaluation mode only")
    folded = 0
    for part in list(module.modules()):
        children = dict(part.named_children())
        names = list(children)
        if isinstance(part, nn.Sequential):
            pairs = list(pairwise(names))
        else:
            pairs = [(name, f"bn{name[4:]}") for name in names if name.startswith("conv")]
        for conv_name, norm_name in pairs:
            conv, norm = children[conv_name], children.get(norm_name)
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(part, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(part, norm_name, nn.Identity())
                folded += 1
    return folded


def make_batch(crops: Tensor, dtype: torch.dtype, multiple: int) -> Tensor:
    """Give crops the encoder's precision, channels-last memory order, and a full last batch.

    With few different batch sizes, kernels are chosen and memory is laid out once for each.

    Args:
        crops: (P, 3, S, S).
        dtype: of the encoder's convolutions.
        multiple: the number of rows becomes the next multiple of it, by rows of zeros.

    Returns:
        (P', 3, S, S), P <= P' < P + multiple, the crops first; one copy, or `crops` itself.
    """
    rows = -(-len(crops) // multiple) * multiple
    if rows == len(crops):
        return crops.to(dtype=dtype, memory_format=torch.channels_last)
    batch = torch.empty(
        (rows, *crops.shape[1:]),
        dtype=dtype,
        device=crops.device,
        memory_format=torch.channels_last,
    )
    batch[: len(crops)] = crops
    batch[len(crops) :] = 0
    return batch
