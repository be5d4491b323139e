"""The kernels that ran on the GPU, how often they ran, and their share of its time."""

from __future__ import annotations

from torch.autograd import DeviceType
from torch.profiler import profile

from fastalex.training.profiling import operators


def kernel_times(profiler: profile) -> list[tuple[str, float, float, float]]:
    """Name, calls per step, ms per step and share of the GPU's time of every kernel, copy and fill.

    Each counts once, also in a CUDA graph. The shares sum to 1; the largest comes first. The names are the
    compiler's: `fastalex.training.profiling.short` shortens C++ names for a table.

    Args:
        profiler: closed, with CUDA among its activities. Figures are per step if it
            recorded steps (`profiler.step()`), otherwise totals.
    """
    averages = profiler.key_averages()
    steps = sum(
        event.count
        for event in averages
        if event.device_type == DeviceType.CPU and str(event.key).startswith("ProfilerStep")
    )
    rows = operators(averages, steps or 1, cuda=True)
    return [(name, calls, ms, share) for name, ms, share, calls in rows]
