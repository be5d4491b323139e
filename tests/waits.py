"""Detection, without a GPU, of operations for which the host would wait for a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastalex.config import Graph
from fastalex.runtime import Runtime

GPU = torch.device("meta")  # stands for the GPU: its tensors have no values to read

_aten = torch.ops.aten
_READS = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal"}


class Waits(TorchDispatchMode):
    """Context that records each operation for which the host would wait for the GPU.

    These are: reading a tensor's values, creating a tensor on the GPU from a list, and copying between
    devices without ``non_blocking``. Whether a non-blocking copy comes from pinned memory, as it must, is not
    checked.

    Attributes:
        found: the names of the operations, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._calls = _Calls(self.found)

    def __enter__(self) -> Waits:
        self._calls.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._calls.__exit__(*exception)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _aten._fused_sgd_.default and args[0][0].device == GPU:
            return None  # not implemented on meta; does not wait
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        name = func._schema.name.removeprefix("aten::")
        if name in _READS and tensors[0].device == GPU:
            self.found.append(name)
            return _placeholder(name, tensors[0])
        if name == "_to_copy":
            self._copied(name, tensors[0].device, kwargs.get("device"), kwargs.get("non_blocking", False))
        elif name == "copy_":
            blocking = args[2:3] or (kwargs.get("non_blocking", False),)
            self._copied(name, tensors[1].device, tensors[0].device, *blocking)
        elif name == "index" and any(tensor.dtype == torch.bool for tensor in tensors[1:]):
            self.found.append("index by a mask")
            return tensors[0].new_zeros(0)
        if name == "_to_copy" and tensors[0].device == GPU and kwargs.get("device", GPU) != GPU:
            return torch.zeros(tensors[0].shape, dtype=kwargs.get("dtype") or tensors[0].dtype)
        return func(*args, **kwargs)

    def _copied(
        self, name: str, source: torch.device, target: torch.device | None, non_blocking: bool
    ) -> None:
        if target is not None and target != source and not non_blocking:
            self.found.append(f"{name} from {source} to {target}")


class _Calls(TorchFunctionMode):
    """Records tensors created on the GPU from numbers on the host, for which no operator is dispatched."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        here = kwargs.get("device") is not None and torch.device(kwargs["device"]) == GPU
        if func in (torch.tensor, torch.as_tensor) and here and not isinstance(args[0], Tensor):
            self._found.append(f"{func.__name__} on {GPU}")
        return func(*args, **kwargs)


def _placeholder(name: str, tensor: Tensor) -> Any:
    if name in ("nonzero", "masked_select"):
        return torch.zeros(0, dtype=torch.int64, device=tensor.device)
    if name in ("is_nonzero", "equal") or tensor.dtype == torch.bool:
        return False
    return 0.0 if tensor.is_floating_point() else 0


@dataclass(frozen=True)
class GpuRuntime(Runtime):
    """A runtime on the meta device, which has no autocast."""

    def autocast(self) -> AbstractContextManager:
        return nullcontext()


def gpu() -> GpuRuntime:
    return GpuRuntime(
        GPU, torch.float32, torch.channels_last, False, Graph.network, False, False, False, 1, "none"
    )


@contextmanager
def no_waits_allowed() -> Iterator[None]:
    """Context in which a CUDA operation that the host waits for raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
