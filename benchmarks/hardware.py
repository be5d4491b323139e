"""The clock, and what the machine can do at best."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch

from fastalex.config import RuntimeConfig
from fastalex.runtime import choose_runtime, cpu_computes_bf16

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# What kind of machine this is, which files of results are named for: a CPU that computes in fp32 at best runs
# other kernels than one that multiplies bf16, and its figures stand beside the other's, not in their place.
KIND = "cpu_fp32" if DEVICE == "cpu" and not cpu_computes_bf16() else DEVICE
KINDS = {"cpu": torch.bfloat16, "cpu_fp32": torch.float32, "cuda": torch.bfloat16}  # what each computes in
ARITHMETIC = {torch.bfloat16: "bf16", torch.float32: "fp32"}
MATMUL_SIZES = {"cpu": (1024, 2048, 4096), "cuda": (4096, 8192, 16384)}
COPY_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}  # many times what the caches hold
# How `seconds_of` measures on a GPU.
CALLS = 10
FLUSHED_BYTES = 256 << 20  # more than any L2 cache holds
CYCLES_PER_SECOND = 2e9  # about; more is a longer wait
ATTEMPTS = 6

_Event = Any  # torch.cuda.Event, which mypy takes for a class without types


def seconds(call: Callable[[], object]) -> float:
    """How long a call takes on the clock, Python's part too, with all that it has started on a GPU."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def seconds_of(first: Callable[[], Any], *following: Callable[[Any], Any]) -> list[float]:
    """How long each of some calls takes that are made in turn, each with the result of the one before it.

    On the CPU by the clock, and once. On a GPU it is the time of what they run there, the median of `CALLS`
    rounds. A kernel is done sooner than Python has launched the next, so all rounds are put in the GPU's
    queue while it is kept busy, with events around the calls; if it began before the last was there, the
    figures are thrown away and the wait is made longer. Before each call `FLUSHED_BYTES` are written, which
    leaves nothing of its inputs in the L2 cache, and others' bytes to write back, as in a training step.
    (`triton.testing.do_bench` has no such wait, `do_bench_cudagraph` leaves the inputs in the cache.)

    Raises:
        RuntimeError: the calls wait for the GPU, so that they cannot be in its queue before it begins.
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
    _enqueue(calls, written)  # compiles, chooses configurations, takes memory
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
        # Either Python took longer, or the queue, of about a thousand kernels, was full.
        wait, rounds = 2 * wait, max(1, rounds // 2)
    raise RuntimeError("the calls wait for the GPU: they can be timed by the clock alone")


def _enqueue(calls: Sequence[Callable[..., Any]], written: torch.Tensor) -> list[tuple[_Event, _Event]]:
    """Make the calls; the events before and after each."""
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
    """What the machine can do: matrix products in the arithmetic of fastalex, copies in memory.

    On random numbers: of zeros and ones a processor makes less heat, and so more speed.
    """

    def __init__(self) -> None:
        self.runtime = choose_runtime(RuntimeConfig())
        largest = MATMUL_SIZES[DEVICE][-1]
        self.a, self.b = torch.randn(2, largest, largest, dtype=self.runtime.dtype, device=DEVICE)
        self.product = torch.empty_like(self.a)
        self.source = torch.randint(256, (COPY_BYTES[DEVICE],), dtype=torch.uint8, device=DEVICE)
        self.target = torch.empty_like(self.source)

    def matmul_flops_per_second(self) -> float:
        """Of the size that does best; the best of three each."""
        rates = []
        for n in MATMUL_SIZES[DEVICE]:
            a, b, out = (x.view(-1)[: n * n].view(n, n) for x in (self.a, self.b, self.product))
            multiply = partial(torch.mm, a, b, out=out)
            rates += [2 * n**3 / seconds_of(multiply)[0] for _ in range(3)]
        return max(rates)

    def copy_bytes_per_second(self) -> float:
        """Read and written together; the best of three."""
        copy = min(seconds_of(partial(self.target.copy_, self.source))[0] for _ in range(3))
        return 2 * self.source.nbytes / copy
