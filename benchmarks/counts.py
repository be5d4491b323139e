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
from fastalex.config import Graph, Optimizer, TrainConfig
from fastalex.distributed.strategies import clip_gradients
from fastalex.models.dropout import Dropout
from fastalex.runtime import Runtime
from fastalex.training.optim import create_optimizer
from fastalex.training.taps import Taps


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
    factored: bool = False,
    optimizer: Optimizer = Optimizer.sgd,
) -> list[Operation]:
    """The operators of a step: forward, backward, clipping, update.

    The input counts as the writing of the batch; reading the source images adds 1% to that.

    Args:
        network: returns a new model.
        dtype: of the batch and, under autocast, of the arithmetic.
        batch_size: images in the batch.
        crop: pixels per side.
        clip_norm: clips gradients if it is not 0.
        factored: leaves gradients as factors in the layers that can, as fastalex does (`training/taps.py`).
        optimizer: fused SGD with momentum, or Muon for the convolutions' weights.
    """
    with FakeTensorMode():
        model = network()
        for module in model.modules():
            if isinstance(module, Dropout):
                # As on a GPU: these tensors count as the CPU's.
                module.__class__ = nn.Dropout  # type: ignore[assignment]
        images, labels = torch.empty(batch_size, 3, crop, crop, dtype=dtype), torch.zeros(batch_size).long()
        update = create_optimizer(model, TrainConfig(optimizer=optimizer), dtype)
        runtime = Runtime(
            device=torch.device("cpu"),
            dtype=dtype,
            memory_format=torch.contiguous_format,
            compile=False,
            graph=Graph.off,
            winograd=False,
            fused_bias=False,
            factored=factored,
            threads=1,
            hardware="",
        )
        with torch.device("meta"):
            template = network()
        taps = Taps(model, template, runtime, copies=True) if factored else None
        for _ in range(2):  # the first step also makes copies of weights
            given = taps.of(images.shape) if taps else []
            counter = _Counter()
            with counter:
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                    logits, inputs = model(images, given) if taps else (model(images), [])
                    loss = F.cross_entropy(logits, labels)
                loss.backward()
                if taps:
                    taps.collect(given, inputs)
                counter.within = "optimizer"
                if clip_norm:
                    clip_gradients(model, clip_norm)
                update.step()
            update.zero_grad()
    return [Operation("batch", INPUT, 0, _bytes(images)), *counter.operations]


def totals(operations: Sequence[Operation]) -> dict[str, tuple[int, int]]:
    """FLOPs and bytes of each part."""
    parts: dict[str, tuple[int, int]] = {}
    for operation in operations:
        flops, moved = parts.get(operation.part, (0, 0))
        parts[operation.part] = flops + operation.flops, moved + operation.bytes
    return parts


# An argument that an operator changes without reading it
_ONLY_WRITTEN = {"fastalex::factored_sgd": "copy"}


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
        is_view = func.is_view or name.startswith("aten::_unsafe_view")
        if is_view or "empty" in name or name.startswith(("prim", "profiler")):
            return result  # accesses no element
        counted = flop_registry.get(func._overloadpacket)
        unread = _ONLY_WRITTEN.get(name)
        read = [
            given
            for given, argument in zip(args, func._schema.arguments, strict=False)
            if argument.name != unread
        ]
        changed = [
            given
            for given, argument in zip(args, func._schema.arguments, strict=False)
            # _fused_sgd_ declares that it changes the gradients, but does so only with a loss scaler.
            if argument.alias_info and argument.alias_info.is_write and argument.name != "grads"
        ]
        written = {id(t): t for t in tree_leaves([result, changed]) if isinstance(t, Tensor)}
        moved = _bytes(*tree_leaves([read, kwargs])) + _bytes(*written.values())
        part = part_of([name.split(".")[0], self.within]) if name != "aten::_fused_sgd_" else OPTIMIZER
        flops = int(counted(*args, **kwargs, out_val=result)) if counted else 0
        if name == "fastalex::factored_sgd":  # a product, which PyTorch does not know of
            weight, output = args[0], args[3]
            flops = 2 * len(output) * weight.numel()
        self.operations.append(Operation(name, part, flops, moved))
        return result


def _bytes(*values: Any) -> int:
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))
