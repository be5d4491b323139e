"""The parts of a training step: each operator's time belongs to one of them."""

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

# Whatever runs within an operator or range of one of these names belongs to that part.
_RANGES = {
    LRN: re.compile(r"^fastalex::(lrn|lrn_max_pool)(_bias)?(_backward)?$"),  # also within a conv_block
    CONVOLUTIONS: re.compile(r"winograd_conv|folded_conv|conv_block"),  # including the matrix products within
    INPUT: re.compile(r"^input$|^enumerate\(DataLoader\)|^_(enlarge|shrink)_kernel$"),
    OPTIMIZER: re.compile(r"^optimizer$|^Optimizer\.|multi_tensor|sgd", re.IGNORECASE),
}
# The optimizer multiplies out factored gradients; without factors a layer's backward pass does it.
_OPTIMIZERS_PRODUCT = re.compile(r"^aten::(add)?mm$")
# Names of operators and kernels, tried in this order, on the innermost name first.
_OPERATORS = {
    OTHER: re.compile(r"^aten::_?to(_copy)?$|dropout|entropy|nll|softmax", re.IGNORECASE),
    CONVOLUTIONS: re.compile(r"conv|cudnn|fprop|dgrad|wgrad", re.IGNORECASE),
    PRODUCTS: re.compile(r"addmm|\bmm|matmul|linear|MmBackward|gemm|gemv|nvjet", re.IGNORECASE),
    LRN: re.compile(
        r"relu|threshold|clamp_min|lrn|pool|^_(plain_)?(forward|backward|ratio)_kernel$", re.IGNORECASE
    ),
}
# Inductor names a fused elementwise kernel or reduction after all operators of the fusion, although a
# convolution or product among them has a kernel of its own.
_FUSED = re.compile(r"^triton_(poi|red|per)_")
_LAST_IN_FUSED = (CONVOLUTIONS, PRODUCTS)
# nn.LocalResponseNorm consists of these, and no other expensive part of the step does.
_ELEMENTWISE = re.compile(r"^(aten::)?(mul|div|pow|add|neg|constant_pad)|(Mul|Div|Pow|Add|Pad\w*)Backward")

# Calls of the CUDA library, and the overhead of its tracing.
_NO_OPERATOR = re.compile(r"^cu(da)?[A-Z]|Buffer (Request|Flush|Full)$|^(Lazy Function|Runtime Triggered) ")


def part_of(names: Sequence[str]) -> str:
    """The part that an operator belongs to.

    Args:
        names: of the operator and of the operators and ranges around it, innermost first.
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
    """Run training steps under torch.profiler; return seconds per step by part.

    On the CPU these are the operators' own times, on a GPU those of the kernels. The rest of the wall time is
    "other": Python, on a GPU also waiting.

    Args:
        step: runs all the steps.
        steps: their number.
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
    """Seconds of the operators, or on a GPU of the kernels, by part; each counts once.

    A kernel belongs to the part of the operator that launched it; without an operator, as in a CUDA graph, to
    the part that its own name implies.

    Args:
        events: a profiler's events.
        cuda: whether they include a GPU's.
    """
    seconds = dict.fromkeys(PARTS, 0.0)
    if not cuda:
        for event in events:
            seconds[part_of(list(_ancestors(event)))] += event.self_cpu_time_total / 1e6
        return seconds
    # The profiler's lists of an operator's kernels, by name and duration, are unreliable: kernels are missing
    # where an operator only calls another of the same name, and repeated where a call of the CUDA library has
    # the id of an operator.
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
    """The names of an event and of the events around it, innermost first."""
    while event is not None:
        yield event.name.removeprefix("autograd::engine::evaluate_function: ")
        event = event.cpu_parent
