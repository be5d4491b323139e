"""The clock, and what the machine can do at best."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch

from fastalex.config import RuntimeConfig
from fastalex.runtime import choose, cpu_computes_bf16

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# What kind of machine this is, which files of results are named for: a CPU that computes in fp32 at best runs
# other kernels than one that multiplies bf16, and its figures stand beside the other's, not in their place.
KIND = "cpu_fp32" if DEVICE == "cpu" and not cpu_computes_bf16() else DEVICE
KINDS = {"cpu": torch.bfloat16, "cpu_fp32": torch.float32, "cuda": torch.bfloat16}  # what each computes in
ARITHMETIC = {torch.bfloat16: "bf16", torch.float32: "fp32"}
MATMUL_SIZES = {"cpu": (1024, 2048, 4096), "cuda": (4096, 8192, 16384)}
COPY_BYTES = 256 << 20


def seconds(call: Callable[[], object]) -> float:
    """How long a call takes, with all that it has started on a GPU."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


class Hardware:
    """What the machine can do: matrix products in the arithmetic of fastalex, copies in memory."""

    def __init__(self) -> None:
        self.runtime = choose(RuntimeConfig())
        largest = MATMUL_SIZES[DEVICE][-1]
        self.a, self.b, self.product = torch.ones(
            3, largest, largest, dtype=self.runtime.dtype, device=DEVICE
        )
        self.source, self.target = torch.ones(2, COPY_BYTES, dtype=torch.uint8, device=DEVICE)

    def matmul_flops_per_second(self) -> float:
        """Of the size that does best; the best of three each."""
        rates = []
        for n in MATMUL_SIZES[DEVICE]:
            a, b, out = (x.view(-1)[: n * n].view(n, n) for x in (self.a, self.b, self.product))
            rates += [2 * n**3 / seconds(partial(torch.mm, a, b, out=out)) for _ in range(3)]
        return max(rates)

    def copy_bytes_per_second(self) -> float:
        """Read and written together; the best of three."""
        copy = min(seconds(lambda: self.target.copy_(self.source)) for _ in range(3))
        return 2 * COPY_BYTES / copy
