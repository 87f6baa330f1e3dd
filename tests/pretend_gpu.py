"""A pretend GPU: tensors on a device `gpu` that keep their numbers in the CPU's memory and refuse to meet the CPU's.

What a real GPU refuses, it refuses: operations on tensors of both devices (a scalar tensor may come along, and a GPU
tensor may be indexed by a CPU one), and `numpy()`. So a forgotten `.to(device)` is found on a machine that has none. It
registers a device with torch: use it in a process of its own.
"""

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("gpu")  # type: ignore[no-untyped-call]

GPU = torch.device("gpu:0")
ATEN = torch.ops.aten
MAY_MIX = {ATEN.copy_.default, ATEN._to_copy.default}
INDEXING = {
    ATEN.index.Tensor, ATEN.index_put_.default, ATEN.index_put.default, ATEN._unsafe_index.Tensor,
    ATEN._index_put_impl_.default,
}  # fmt: skip


class GpuTensor(Tensor):
    """Looks as if it lay on the GPU; `held` is where its numbers are."""

    held: Tensor

    @staticmethod
    def __new__(cls: type[Self], held: Tensor) -> Self:
        """Of the same shape, strides and type."""
        made: Self = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=GPU,
            requires_grad=False,
        )
        made.held = held
        return made

    def tolist(self) -> Any:
        """A copy to the CPU is part of it on a real GPU too."""
        return self.held.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        """As CUDA tensors say."""
        raise TypeError("can't convert a gpu tensor to numpy: use Tensor.cpu() first")

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, _types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _run(function, args, kwargs or {})

    __torch_function__ = torch._C._disabled_torch_function_impl


class Watching(TorchDispatchMode):
    """Within: whatever is made on the GPU, or touches what is there, is pretended."""

    def __enter__(self) -> Self:
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()  # type: ignore[no-any-return,no-untyped-call]

    def __torch_dispatch__(
        self, function: Any, _types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        is_ours = any(isinstance(each, GpuTensor) for each in tree_flatten((args, kwargs))[0])
        if is_ours or _is_gpu(kwargs.get("device")):
            return _run(function, args, kwargs)
        return function(*args, **kwargs)


def to_gpu(model: nn.Module) -> None:
    """What `model.to("cuda")` does; tied weights stay tied."""
    moved: dict[int, Tensor] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in list(table.items()):
                if tensor is None:
                    continue
                if id(tensor) not in moved:
                    there = GpuTensor(tensor.detach().clone())
                    is_parameter = table is module._parameters
                    moved[id(tensor)] = nn.Parameter(there, requires_grad=False) if is_parameter else there
                table[name] = moved[id(tensor)]  # type: ignore[assignment]


def _is_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "gpu"


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)]
    ours = [each for each in tensors if isinstance(each, GpuTensor)]
    _refuse_mixing(function, args, ours, [each for each in tensors if not isinstance(each, GpuTensor)])
    known: dict[int, GpuTensor] = {}

    def unwrapped(value: Any) -> Any:
        if isinstance(value, GpuTensor):
            known[id(value.held)] = value
            return value.held
        return torch.device("cpu") if isinstance(value, torch.device) and value.type == "gpu" else value

    plain, named = tree_map(unwrapped, (args, kwargs))
    found = function(*plain, **named)
    device = kwargs.get("device")
    is_back = function is ATEN._to_copy.default and device is not None and not _is_gpu(device)
    if function is ATEN.copy_.default:
        return args[0]
    if is_back or function is ATEN._local_scalar_dense.default or not (ours or _is_gpu(device)):
        return found

    def wrapped(value: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(value, GpuTensor):
            return value
        return known[id(value)] if id(value) in known else GpuTensor(value)

    return tree_map(wrapped, found)


def _refuse_mixing(function: Any, args: Any, ours: list[Tensor], others: list[Tensor]) -> None:
    if not ours or function in MAY_MIX:
        return
    bad = [each for each in others if each.dim() > 0]
    if function in INDEXING:
        values = args[2] if len(args) > 2 else None
        is_value = isinstance(values, Tensor) and not isinstance(values, GpuTensor) and values.dim() > 0
        bad = ([values] if is_value else []) if isinstance(args[0], GpuTensor) else others
    if bad:
        raise RuntimeError(
            f"{function} got tensors of the gpu and of the cpu: {[tuple(t.shape) for t in bad]}"
        )
