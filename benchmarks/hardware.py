"""Timing of calls, and the machine's limits: matrix products and copies.

python -m benchmarks.hardware [--toy]       answers requests on standard input
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch

from benchmarks.turns import serve
from fastalex.config import RuntimeConfig
from fastalex.runtime import choose_runtime, cpu_computes_bf16, cpu_has_matrix_units

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The kinds of machine, after which results files are named, and their arithmetic. A CPU with vector units for
# bf16, one with matrix units for it (AMX), and one with neither run other kernels.
KINDS = {
    "cpu": torch.bfloat16,
    "cpu_amx": torch.bfloat16,
    "cpu_fp32": torch.float32,
    "cuda": torch.bfloat16,
}
ARITHMETIC = {torch.bfloat16: "bf16", torch.float32: "fp32"}
MATMUL_SIZES = {"cpu": (1024, 2048, 4096), "cuda": (4096, 8192, 16384)}  # rows and columns
COPY_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}  # many times the size of the caches
# For `seconds_of` on a GPU.
CALLS = 10
FLUSHED_BYTES = 256 << 20  # more than any L2 cache holds
CYCLES_PER_SECOND = 2e9  # approximately; a higher value waits longer
ATTEMPTS = 6


def _kind() -> str:
    if DEVICE == "cuda":
        return DEVICE
    if cpu_has_matrix_units():
        return "cpu_amx"
    return "cpu" if cpu_computes_bf16() else "cpu_fp32"


KIND = _kind()

_Event = Any  # torch.cuda.Event, which has no types for mypy


def seconds(call: Callable[[], object]) -> float:
    """Wall time of a call, including Python's part and everything that it launches on a GPU."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def seconds_of(first: Callable[[], Any], *following: Callable[[Any], Any]) -> list[float]:
    """Seconds of each call in a chain, in which a call is given the result of the call before it.

    On the CPU the chain runs once, and times are wall times. On a GPU they are the times of the kernels, the
    median of `CALLS` rounds. A kernel may finish before Python has launched the next, so all rounds are
    enqueued while the GPU is kept busy, with events around the calls; if it began before the last round was
    enqueued, the figures are discarded and the wait is lengthened. `FLUSHED_BYTES` are written before each
    call: they evict its inputs from the L2 cache and leave other bytes to write back, as in a training step.
    (`triton.testing.do_bench` does not wait, and `do_bench_cudagraph` leaves the inputs in the cache.)

    Raises:
        RuntimeError: the calls wait for the GPU, so that they cannot be enqueued before it begins.
    """
    calls: tuple[Callable[..., Any], ...] = (first, *following)
    if DEVICE == "cuda":
        return _seconds_on_gpu(calls)
    spent = []
    arguments: tuple[Any, ...] = ()
    for call in calls:
        began = time.perf_counter()
        arguments = (call(*arguments),)
        spent.append(time.perf_counter() - began)
    return spent


def _seconds_on_gpu(calls: Sequence[Callable[..., Any]]) -> list[float]:
    written = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=DEVICE)
    _enqueue(calls, written)  # compiles, chooses configurations, allocates memory
    torch.cuda.synchronize()
    began = time.perf_counter()
    _enqueue(calls, written)
    dispatch = time.perf_counter() - began
    wait, rounds = 4 * CALLS * dispatch, CALLS
    for _ in range(ATTEMPTS):
        torch.cuda.synchronize()
        torch.cuda._sleep(int(wait * CYCLES_PER_SECOND))
        events = [_enqueue(calls, written) for _ in range(rounds)]
        began_early = events[0][0][0].query()
        torch.cuda.synchronize()
        if not began_early:
            return [
                median(start.elapsed_time(end) / 1e3 for start, end in one_call)
                for one_call in zip(*events, strict=True)
            ]
        # Either Python took longer, or the queue, which holds about a thousand kernels, was full.
        wait, rounds = 2 * wait, max(1, rounds // 2)
    raise RuntimeError("the calls wait for the GPU: only their wall time can be measured")


def _enqueue(calls: Sequence[Callable[..., Any]], written: torch.Tensor) -> list[tuple[_Event, _Event]]:
    """Make the calls; return the events before and after each."""
    events = []
    arguments: tuple[Any, ...] = ()
    for call in calls:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        written.zero_()
        start.record()
        arguments = (call(*arguments),)
        end.record()
        events.append((start, end))
    return events


class Hardware:
    """The machine's rates: matrix products in fastalex's arithmetic, and copies in memory.

    The operands are random numbers: with zeros and ones a processor runs cooler, and so faster.

    Args:
        matmul_sizes: rows and columns of the products that are tried, the largest last.
        copy_bytes: to be copied.
    """

    def __init__(
        self, matmul_sizes: Sequence[int] = MATMUL_SIZES[DEVICE], copy_bytes: int = COPY_BYTES[DEVICE]
    ) -> None:
        self.runtime = choose_runtime(RuntimeConfig())
        self.sizes = matmul_sizes
        self.a, self.b = torch.randn(
            2, self.sizes[-1], self.sizes[-1], dtype=self.runtime.dtype, device=DEVICE
        )
        self.product = torch.empty_like(self.a)
        self.source = torch.randint(256, (copy_bytes,), dtype=torch.uint8, device=DEVICE)
        self.target = torch.empty_like(self.source)

    def matmul_flops_per_second(self) -> float:
        """The best of three products of each size, and of all sizes."""
        rates = []
        for n in self.sizes:
            a, b, out = (x.view(-1)[: n * n].view(n, n) for x in (self.a, self.b, self.product))
            multiply = partial(torch.mm, a, b, out=out)
            rates += [2 * n**3 / seconds_of(multiply)[0] for _ in range(3)]
        return max(rates)

    def copy_bytes_per_second(self) -> float:
        """Bytes read and bytes written together; the best of three copies."""
        copy = min(seconds_of(partial(self.target.copy_, self.source))[0] for _ in range(3))
        return 2 * self.source.nbytes / copy


def start(toy: bool) -> dict[str, Callable[[], float]]:
    """The functions that the process offers; with `toy` at sizes whose figures mean nothing."""
    hardware = Hardware((256,), 1 << 20) if toy else Hardware()
    return {"matmul": hardware.matmul_flops_per_second, "copy": hardware.copy_bytes_per_second}


if __name__ == "__main__":
    serve(lambda: start("--toy" in sys.argv))
