"""Where the time of a training step goes: every operator belongs to one part of it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

CONVOLUTIONS, PRODUCTS, LRN = "convolutions", "matrix products", "ReLU, LRN, pooling"
INPUT, OPTIMIZER, OTHER = "input", "optimizer", "other"
PARTS = (CONVOLUTIONS, PRODUCTS, LRN, INPUT, OPTIMIZER, OTHER)

# Whatever happens within one of these belongs to it.
_RANGES = {
    LRN: re.compile(r"^fastalex::(lrn|lrn_max_pool)(_backward)?$"),  # within a conv_block, too
    CONVOLUTIONS: re.compile(r"winograd_conv|folded_conv|conv_block"),  # with the products they are made of
    INPUT: re.compile(r"^input$|^enumerate\(DataLoader\)"),
    OPTIMIZER: re.compile(r"^optimizer$|^Optimizer\.|multi_tensor|sgd", re.IGNORECASE),
}
# The optimizer multiplies out gradients that come as factors: elsewhere that is a layer's backward pass.
_OPTIMIZERS_PRODUCT = re.compile(r"^aten::(add)?mm$")
# Operators and kernels, tried in this order on the innermost name first.
_OPERATORS = {
    OTHER: re.compile(r"^aten::_?to(_copy)?$|dropout|entropy|nll|softmax", re.IGNORECASE),
    CONVOLUTIONS: re.compile(r"conv|fprop|dgrad|wgrad", re.IGNORECASE),
    PRODUCTS: re.compile(r"addmm|\bmm|matmul|linear|MmBackward|gemm|nvjet", re.IGNORECASE),
    LRN: re.compile(r"relu|threshold|clamp_min|lrn|pool", re.IGNORECASE),
}
# nn.LocalResponseNorm is made of these, and nothing else of the step's weight is.
_ELEMENTWISE = re.compile(r"^(aten::)?(mul|div|pow|add|neg|constant_pad)|(Mul|Div|Pow|Add|Pad\w*)Backward")


def part_of(names: Sequence[str]) -> str:
    """The part that an operator belongs to.

    Args:
        names: its own and those of the operators and ranges around it, innermost first.
    """
    for part, pattern in _RANGES.items():
        if any(pattern.search(name) for name in names):
            return PRODUCTS if part == OPTIMIZER and _OPTIMIZERS_PRODUCT.search(names[0]) else part
    for name in names:
        for part, pattern in _OPERATORS.items():
            if pattern.search(name):
                return part
    return LRN if any(_ELEMENTWISE.search(name) for name in names) else OTHER


def profile_step(step: Callable[[], object]) -> dict[str, float]:
    """Run a step under torch.profiler; seconds by part.

    On the CPU an operator's own time, on a GPU that of the kernels it launched. What no operator accounts
    for, up to the time on the clock, is "other": Python, on a GPU also waiting.
    """
    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler:
        began = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        wall = time.perf_counter() - began
    seconds = dict.fromkeys(PARTS, 0.0)
    for event in profiler.events():
        around = list(_ancestors(event))
        if cuda:
            for kernel in event.kernels:
                seconds[part_of([kernel.name, *around])] += kernel.duration / 1e6
        else:
            seconds[part_of(around)] += event.self_cpu_time_total / 1e6
    seconds[OTHER] = max(0.0, wall - sum(seconds[part] for part in PARTS if part != OTHER))
    return seconds


def _ancestors(event: FunctionEvent | None) -> Iterator[str]:
    """The names of an event and of those around it."""
    while event is not None:
        yield event.name.removeprefix("autograd::engine::evaluate_function: ")
        event = event.cpu_parent
