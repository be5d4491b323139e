"""AlexNet's first block on the source pixels, as two operators and as one, interleaved, in one run.

    python -m pytest benchmarks/test_folded_block.py --benchmark-enable -s

The training batch of `test_folded_conv.py`, its convolution and the ReLU, normalisation and 3x3 pooling
behind it, gradients of weight and bias. `two operators` are `folded_conv2d` and `relu_lrn_max_pool`, which
keep the convolution's output for the gradient; `one operator` is `folded_conv2d_relu_lrn_max_pool`, which
computes it again. They take turns, and memory that is freed stays with the process, as in a training run.
Writes `benchmarks/results/folded_block_cpu.csv`, or `folded_block_cpu_fp32.csv` without bf16: milliseconds a
batch, how many times as long as two operators, and megabytes kept from the forward pass for the backward one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.hardware import KIND
from benchmarks.passes import seconds_by_pass
from benchmarks.report import RESULTS, percentiles, write_csv
from benchmarks.test_folded_conv import BATCH, training_batch
from fastalex.kernels import folded_conv2d, folded_conv2d_relu_lrn_max_pool, relu_lrn_max_pool
from fastalex.models.alexnet import LRN_ALPHA, LRN_BETA, LRN_K, LRN_SIZE
from fastalex.runtime import keep_pages

LRN: dict[str, Any] = {"size": LRN_SIZE, "alpha": LRN_ALPHA, "beta": LRN_BETA, "k": LRN_K}
ROUNDS = 25


@dataclass(frozen=True)
class Row:
    """One implementation's time for one pass over a batch."""

    implementation: str
    direction: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    rounds: int
    times_two_operators: float
    kept_mb: float


def kept_bytes(forward: Callable[[], Tensor]) -> int:
    """What a forward pass keeps for the backward one, parameters and the data set included."""
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.data_ptr()] = x.nbytes
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        forward()
    return sum(kept.values())


@pytest.mark.benchmark(group="folded_block")
@pytest.mark.usefixtures("cpu_only")
def test_first_block(benchmark: Any) -> None:
    if benchmark.disabled:
        pytest.skip("a measurement, not a test: needs --benchmark-enable")
    keep_pages()
    arguments = training_batch()
    parameters = arguments["weight"], arguments["bias"]

    def two() -> Tensor:
        return relu_lrn_max_pool(folded_conv2d(**arguments), **LRN)

    def one() -> Tensor:
        return folded_conv2d_relu_lrn_max_pool(**arguments, **LRN)

    forwards = {"two operators": two, "one operator": one}
    grad = torch.randn(two().shape, generator=torch.Generator().manual_seed(1)).to(arguments["dtype"])
    grad = grad.contiguous(memory_format=torch.channels_last)
    seconds: dict[tuple[str, str], list[float]] = {}

    def measure(name: str) -> None:
        for direction, spent in seconds_by_pass(forwards[name], parameters, grad).items():
            seconds.setdefault((direction, name), []).append(spent)

    benchmark.pedantic(
        measure,
        args=("one operator",),
        setup=lambda: measure("two operators"),
        rounds=ROUNDS,
        warmup_rounds=1,
    )
    kept = {name: kept_bytes(forward) / 1e6 for name, forward in forwards.items()}
    rows = []
    for (direction, name), times in sorted(seconds.items()):
        median, low, high = percentiles(times[1:])  # the first round compiles
        factor = median / percentiles(seconds[direction, "two operators"][1:])[0]
        rows.append(Row(name, direction, median, low, high, len(times) - 1, factor, kept[name]))
        print(f"\n{direction}, {BATCH} images: {name}, {median:.1f} ms, {kept[name]:.0f} MB kept", end="")
    write_csv(rows, RESULTS / f"folded_block_{KIND}.csv", "cpu")
