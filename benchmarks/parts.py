"""Where the time of a training step goes: every operator belongs to one part of it."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from benchmarks.hardware import DEVICE
from fastalex.training.profiling import is_kernel

CONVOLUTIONS, PRODUCTS, LRN = "convolutions", "matrix products", "ReLU, LRN, pooling"
INPUT, OPTIMIZER, OTHER = "input", "optimizer", "other"
PARTS = (CONVOLUTIONS, PRODUCTS, LRN, INPUT, OPTIMIZER, OTHER)

# Whatever happens within one of these belongs to it.
_RANGES = {
    LRN: re.compile(r"^fastalex::(lrn|lrn_max_pool)(_backward)?$"),  # within a conv_block, too
    CONVOLUTIONS: re.compile(r"winograd_conv|folded_conv|conv_block"),  # with the products they are made of
    INPUT: re.compile(r"^input$|^enumerate\(DataLoader\)|^_(enlarge|shrink)_kernel$"),
    OPTIMIZER: re.compile(r"^optimizer$|^Optimizer\.|multi_tensor|sgd", re.IGNORECASE),
}
# The optimizer multiplies out gradients that come as factors: elsewhere that is a layer's backward pass.
_OPTIMIZERS_PRODUCT = re.compile(r"^aten::(add)?mm$")
# Operators and kernels, tried in this order on the innermost name first.
_OPERATORS = {
    OTHER: re.compile(r"^aten::_?to(_copy)?$|dropout|entropy|nll|softmax", re.IGNORECASE),
    CONVOLUTIONS: re.compile(r"conv|cudnn|fprop|dgrad|wgrad", re.IGNORECASE),
    PRODUCTS: re.compile(r"addmm|\bmm|matmul|linear|MmBackward|gemm|gemv|nvjet", re.IGNORECASE),
    LRN: re.compile(
        r"relu|threshold|clamp_min|lrn|pool|^_(plain_)?(forward|backward|ratio)_kernel$", re.IGNORECASE
    ),
}
# Inductor names an elementwise kernel or a reduction for all that it has fused: a convolution or product
# among that has a kernel of its own, and lends this one its name.
_FUSED = re.compile(r"^triton_(poi|red|per)_")
_LAST_IN_FUSED = (CONVOLUTIONS, PRODUCTS)
# nn.LocalResponseNorm is made of these, and nothing else of the step's weight is.
_ELEMENTWISE = re.compile(r"^(aten::)?(mul|div|pow|add|neg|constant_pad)|(Mul|Div|Pow|Add|Pad\w*)Backward")

# Calls of the CUDA library, and what its own tracing costs.
_NO_OPERATOR = re.compile(r"^cu(da)?[A-Z]|Buffer (Request|Flush|Full)$|^(Lazy Function|Runtime Triggered) ")


def part_of(names: Sequence[str]) -> str:
    """The part that an operator belongs to.

    Args:
        names: its own and those of the operators and ranges around it, innermost first.
    """
    for part, pattern in _RANGES.items():
        if any(pattern.search(name) for name in names):
            return PRODUCTS if part == OPTIMIZER and _OPTIMIZERS_PRODUCT.search(names[0]) else part
    for name in names:
        parts = list(_OPERATORS)
        if _FUSED.search(name):
            parts.sort(key=_LAST_IN_FUSED.__contains__)
        for part in parts:
            if _OPERATORS[part].search(name):
                return part
    return LRN if any(_ELEMENTWISE.search(name) for name in names) else OTHER


def profile_step(step: Callable[[], object], steps: int = 1) -> dict[str, float]:
    """Run training steps under torch.profiler; seconds a step by part.

    On the CPU an operator's own time, on a GPU that of the kernels. What none accounts for, up to the time on
    the clock, is "other": Python, on a GPU also waiting.

    Args:
        step: takes them all.
        steps: how many those are.
    """
    cuda = DEVICE == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler:
        began = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize()
        wall = time.perf_counter() - began
    seconds = seconds_by_part(profiler.events(), cuda)
    seconds[OTHER] = max(0.0, wall - sum(seconds[part] for part in PARTS if part != OTHER))
    return {part: spent / steps for part, spent in seconds.items()}


def seconds_by_part(events: Sequence[FunctionEvent], cuda: bool) -> dict[str, float]:
    """The time of the operators, or on a GPU of the kernels, each once.

    A kernel belongs where the operator does that launched it; without one, as in a CUDA graph, where its own
    name says.

    Args:
        events: a profiler's.
        cuda: whether they are of a GPU.
    """
    seconds = dict.fromkeys(PARTS, 0.0)
    if not cuda:
        for event in events:
            seconds[part_of(list(_ancestors(event)))] += event.self_cpu_time_total / 1e6
        return seconds
    # The profiler lists an operator's kernels by name and time alone: too few where one operator is all that
    # another does, and too many where the CUDA library's numbers for its calls are operators' numbers, too.
    left = Counter((event.name, event.time_range.elapsed_us()) for event in events if is_kernel(event))
    for event in events:
        if event.device_type != DeviceType.CPU or _NO_OPERATOR.search(event.name):
            continue
        for kernel in event.kernels:
            if left[kernel.name, kernel.duration]:
                left[kernel.name, kernel.duration] -= 1
                seconds[part_of([kernel.name, *_ancestors(event)])] += kernel.duration / 1e6
    for (name, duration), count in left.items():
        seconds[part_of([name])] += count * duration / 1e6
    return seconds


def _ancestors(event: FunctionEvent | None) -> Iterator[str]:
    """The names of an event and of those around it."""
    while event is not None:
        yield event.name.removeprefix("autograd::engine::evaluate_function: ")
        event = event.cpu_parent
