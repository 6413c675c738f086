"""A CUDA device that is none: its tensors say ``cuda:0`` and are computed on the CPU.

What a GPU would refuse, an operator on tensors of two devices, is an error here too. Whenever the
host would wait for a GPU, the line of this project that makes it wait is noted.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torchvision  # noqa: F401  (registers its operators)
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_iter, tree_map_only

ROOT = Path(__file__).resolve().parents[1]
aten = torch.ops.aten
# The host needs their result, or its size.
WAITING = {
    *(aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default),
    *(aten.unique_dim.default, aten._unique2.default, aten.unique_consecutive.default),
    *(aten.bincount.default, aten.equal.default, torch.ops.torchvision.nms.default),
}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}
MAKING = {torch.tensor, torch.as_tensor, Tensor.new_tensor}


class PretendedTensor(Tensor):
    """A tensor of the pretended device; ``inner`` is on the CPU."""

    inner: Tensor

    @staticmethod
    @torch.inference_mode(False)  # views of tensors from outside of it are none of its own
    def __new__(cls, inner: Tensor) -> "PretendedTensor":
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device="cuda:0",
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} outside of `pretended_device`")


class _Dispatch(TorchDispatchMode):
    """Computes everything, on the CPU."""

    def __init__(self, waits: Counter[str]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():  # where nobody else takes composites apart
            with self:
                if (found := func.decompose(*args, **kwargs)) is not NotImplemented:
                    return found
        tensors = [each for each in tree_iter((args, kwargs)) if isinstance(each, Tensor)]
        ours = [isinstance(each, PretendedTensor) for each in tensors]
        target = kwargs.get("device")
        on_device = any(ours) if target is None else torch.device(target).type == "cuda"
        moves = func in (aten._to_copy.default, aten.copy_.default)
        if func is aten.copy_.default:
            on_device = ours[0]
        if moves:
            waits = ours[-1] and not on_device
        else:
            waits = any(ours) and self._waits(func, args, kwargs)
            if any(ours):
                indices = args[1] if func in INDEXING else ()
                self._check(func, [x for x in tensors if not any(x is each for each in indices)])
        if waits:
            self.waits[_place()] += 1
        inner_args, inner_kwargs = tree_map_only(PretendedTensor, lambda x: x.inner, (args, kwargs))
        if target is not None:
            inner_kwargs["device"] = torch.device("cpu")
        found = func(*inner_args, **inner_kwargs)
        if not on_device:
            return found
        found = tree_map_only(Tensor, PretendedTensor, found)
        return return_and_correct_aliasing(func, args, kwargs, found) if any(ours) else found

    @staticmethod
    def _waits(func: Any, args: Any, kwargs: Any) -> bool:
        if func in INDEXING:
            return any(isinstance(x, PretendedTensor) and x.dtype == torch.bool for x in args[1])
        if func is aten.repeat_interleave.Tensor:
            return kwargs.get("output_size") is None
        return func in WAITING

    @staticmethod
    def _check(func: Any, tensors: list[Tensor]) -> None:
        for each in tensors:
            if not isinstance(each, PretendedTensor) and each.dim() > 0:
                raise RuntimeError(f"{func}: tensors on cuda:0 and on {each.device}, {_place()}")


class _Functions(TorchFunctionMode):
    """Makes tensors of numbers on the CPU and moves them: PyTorch does that below dispatch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.tolist:  # which subclasses lack
            return func(args[0].cpu())
        if func not in MAKING:
            return func(*args, **kwargs)
        device = kwargs.pop("device", None)
        if func is Tensor.new_tensor:
            like, *args = args
            kwargs.setdefault("dtype", like.dtype)
            device = device or like.device
        if args and isinstance(args[0], Tensor):
            return args[0].detach().to(device, kwargs.get("dtype"))
        made = torch._C._VariableFunctions.tensor(*args, **kwargs)
        return made if device is None else made.to(device)


def to_pretended_device(model: nn.Module) -> nn.Module:
    """Move parameters and buffers in place."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                moved = PretendedTensor(parameter.detach())
                module._parameters[name] = nn.Parameter(moved, parameter.requires_grad)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = PretendedTensor(buffer)
    return model


@contextmanager
def pretended_device() -> Iterator[Counter[str]]:
    """Inside, "cuda" is a device. Gives how often the host waits for it, by place."""
    waits: Counter[str] = Counter()
    torch._C._ensureCUDADeviceGuardSet()
    with ExitStack() as stack:
        stack.enter_context(mock.patch("torch.cuda._lazy_init"))
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(_Dispatch(waits))
        stack.enter_context(_Functions())
        yield waits


def _place() -> str:
    """File and line of the package that the innermost frame belongs to, else "elsewhere"."""
    frame = sys._getframe(2)
    while frame and not frame.f_code.co_filename.startswith(str(ROOT / "projects")):
        frame = frame.f_back
    if frame is None:
        return "elsewhere"
    return f"{Path(frame.f_code.co_filename).relative_to(ROOT)}:{frame.f_lineno}"
