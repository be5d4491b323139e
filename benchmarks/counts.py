"""FLOPs and memory traffic of a training step, counted by operator on fake tensors.

FLOPs are PyTorch's own count (`torch.utils.flop_counter`): convolutions and matrix products, a multiply-add
as two. Bytes are each operator's minimum: every input tensor read once, every output or changed tensor
written once. A compiler that fuses operators moves less, and so does a cache that serves the next operator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.parts import INPUT, OPTIMIZER, part_of


@dataclass(frozen=True)
class Operation:
    """One operator's call; `part` is one of `benchmarks.parts.PARTS`."""

    name: str
    part: str
    flops: int
    bytes: int


def count_step(
    network: Callable[[], nn.Module],
    *,
    dtype: torch.dtype = torch.bfloat16,
    batch_size: int = 128,
    crop: int = 224,
    clip_norm: float = 0.0,
) -> list[Operation]:
    """The operators of a step: forward, backward, clipping, fused SGD with momentum.

    The input counts as the writing of the batch; reading the source images adds 1% to that.

    Args:
        network: returns a new model.
        dtype: of the batch and, under autocast, of the arithmetic.
        batch_size: images in the batch.
        crop: pixels per side.
        clip_norm: clips gradients if it is not 0.
    """
    with FakeTensorMode():
        model = network()
        images, labels = torch.empty(batch_size, 3, crop, crop, dtype=dtype), torch.zeros(batch_size).long()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, fused=True)
        for _ in range(2):  # the first step also creates the momentum
            counter = _Counter()
            with counter:
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                    loss = F.cross_entropy(model(images), labels)
                loss.backward()
                counter.within = "optimizer"
                if clip_norm:
                    nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
                optimizer.step()
            optimizer.zero_grad()
    return [Operation("batch", INPUT, 0, _bytes(images)), *counter.operations]


def totals(operations: Sequence[Operation]) -> dict[str, tuple[int, int]]:
    """FLOPs and bytes of each part."""
    parts: dict[str, tuple[int, int]] = {}
    for operation in operations:
        flops, moved = parts.get(operation.part, (0, 0))
        parts[operation.part] = flops + operation.flops, moved + operation.bytes
    return parts


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.within = ""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.name()
        if func.is_view or "empty" in name or name.startswith(("prim", "profiler")):
            return result  # accesses no element
        counted = flop_registry.get(func._overloadpacket)
        changed = [
            given
            for given, argument in zip(args, func._schema.arguments, strict=False)
            # _fused_sgd_ declares that it changes the gradients, but does so only with a loss scaler.
            if argument.alias_info and argument.alias_info.is_write and argument.name != "grads"
        ]
        written = {id(t): t for t in tree_leaves([result, changed]) if isinstance(t, Tensor)}
        moved = _bytes(*tree_leaves([args, kwargs])) + _bytes(*written.values())
        part = part_of([name.split(".")[0], self.within]) if name != "aten::_fused_sgd_" else OPTIMIZER
        flops = int(counted(*args, **kwargs, out_val=result)) if counted else 0
        self.operations.append(Operation(name, part, flops, moved))
        return result


def _bytes(*values: Any) -> int:
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))
