"""Which kernels ran on the GPU, how often, and what part of its time each took."""

from __future__ import annotations

from torch.autograd import DeviceType
from torch.profiler import profile

from fastalex.training.profiling import operators


def kernel_times(profiler: profile) -> list[tuple[str, float, float, float]]:
    """Name, calls a step, milliseconds a step and share of the GPU's time of every kernel, copy and fill.

    Each counts once, also where a CUDA graph launched it. The shares sum to 1; the greatest comes first. The
    names are the compiler's: `fastalex.training.profiling.short` makes those of C++ fit a table.

    Args:
        profiler: closed, with CUDA among its activities. If it was told of steps (`profiler.step()`), figures
            are a step's, otherwise those of all that it recorded.
    """
    averages = profiler.key_averages()
    steps = sum(
        event.count
        for event in averages
        if event.device_type == DeviceType.CPU and str(event.key).startswith("ProfilerStep")
    )
    rows = operators(averages, steps or 1, cuda=True)
    return [(name, calls, ms, share) for name, ms, share, calls in rows]
