"""Synthetic profiler events of training steps on a GPU, for tests without one."""

from __future__ import annotations

from typing import Any

from torch.autograd import DeviceType
from torch.autograd.profiler_util import EventList, FunctionEvent

STEPS = 6


def event(name: str, start: float, end: float, **options: Any) -> FunctionEvent:
    """Create an event, on the host or with ``device_type`` on the GPU; times in microseconds."""
    placed = {"thread": 1, "use_device": "cuda", "stack": [], **options}
    return FunctionEvent(0, name, start_us=start, end_us=end, **placed)


def on_gpu(name: str, start: float, end: float, **options: Any) -> FunctionEvent:
    return event(name, start, end, device_type=DeviceType.CUDA, **options)


def launched(operator: FunctionEvent, *kernels: FunctionEvent) -> list[FunctionEvent]:
    """Return an operator and its kernels, which PyTorch lists both with the operator and on their own."""
    for kernel in kernels:
        operator.append_kernel(kernel.name, 0, kernel.time_range.elapsed_us())
    return [operator, *kernels]


def recorded(*events: FunctionEvent) -> EventList:
    """Return events as ``profiler.events()`` does."""
    found = EventList(
        sorted(events, key=lambda one: (one.time_range.start, -one.time_range.end)), use_device="cuda"
    )
    found._build_tree()
    return found


def training_steps() -> EventList:
    """Return the events of six steps of 1,000 microseconds, each with 400 of GPU work.

    On the host a step has 100 us of input, 200 of forward, 300 of backward and 100 of optimizer. On the GPU
    it has a product launched by ``aten::mm`` (100), ``gemm_graph`` (120) and ``lrn`` (80) launched without an
    operator as by a CUDA graph, another ``lrn`` launched by ``fastalex::relu_lrn`` (80), and a copy (20).
    """
    events = []
    for step in range(STEPS):
        t = 1000 * step
        events += [
            event("ProfilerStep*", t, t + 1000, is_user_annotation=True),
            on_gpu("ProfilerStep*", t + 5, t + 950, is_user_annotation=True),
        ]
        for name, start, end in (
            ("input", 0, 100),
            ("forward", 100, 300),
            ("backward", 300, 600),
            ("optimizer", 600, 700),
        ):
            events.append(event(name, t + start, t + end, is_user_annotation=True))
            if name != "input":  # no kernel is launched in it
                events.append(on_gpu(name, t + start + 50, t + end + 200, is_user_annotation=True))
        events += launched(event("aten::mm", t + 110, t + 130), on_gpu("gemm", t + 300, t + 400))
        events += launched(event("fastalex::relu_lrn", t + 140, t + 150), on_gpu("lrn", t + 400, t + 480))
        events += [on_gpu("gemm_graph", t + 500, t + 620), on_gpu("lrn", t + 620, t + 700)]
        events += launched(
            event("aten::copy_", t + 10, t + 20), on_gpu("Memcpy HtoD (Pinned -> Device)", t + 20, t + 40)
        )
        events.append(event("cudaDeviceSynchronize", t + 710, t + 990, thread=2))
    return recorded(*events)
