"""AlexNet's first block on the source pixels, as two operators and as one, interleaved in one run.

    python -m pytest benchmarks/test_folded_block.py --benchmark-enable -s

The training batch of `test_folded_conv.py`, its convolution and the ReLU, normalisation and 3x3 pooling after
it, with gradients of weight and bias. `two operators` are `folded_conv2d` and `relu_lrn_max_pool`, which save
the convolution's output for the backward pass; `one operator` is `folded_conv2d_relu_lrn_max_pool`, which
recomputes it. They take turns, and freed memory stays with the process, as in a training run. Writes
`benchmarks/results/folded_block_KIND.csv` (`hardware.py`): ms per batch, the time as a multiple of two
operators', and MB saved for the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.hardware import KIND
from benchmarks.passes import seconds_by_pass
from benchmarks.report import RESULTS, Measurement, write_csv
from benchmarks.test_folded_conv import BATCH, training_batch
from benchmarks.turns import seconds_by_turns
from fastalex.kernels import folded_conv2d, folded_conv2d_relu_lrn_max_pool, relu_lrn_max_pool
from fastalex.models.alexnet import LRN_ALPHA, LRN_BETA, LRN_K, LRN_SIZE
from fastalex.runtime import keep_pages

LRN: dict[str, Any] = {"size": LRN_SIZE, "alpha": LRN_ALPHA, "beta": LRN_BETA, "k": LRN_K}
ROUNDS = 25


def kept_bytes(forward: Callable[[], Tensor]) -> int:
    """Bytes that a forward pass saves for the backward pass, parameters and the data set included."""
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.data_ptr()] = x.nbytes
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        forward()
    return sum(kept.values())


@pytest.mark.benchmark(group="folded_block")
@pytest.mark.usefixtures("cpu_only", "enabled")
def test_first_block(benchmark: Any) -> None:
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
    turns = {name: partial(seconds_by_pass, forward, parameters, grad) for name, forward in forwards.items()}
    seconds = seconds_by_turns(benchmark, turns, ROUNDS)
    kept = {name: kept_bytes(forward) / 1e6 for name, forward in forwards.items()}
    measurements = []
    for (direction, name), times in sorted(seconds.items()):
        m = Measurement.of_times(
            {"implementation": name, "direction": direction},
            times,
            times_two_operators=median(times) / median(seconds[direction, "two operators"]),
            kept_mb=kept[name],
        )
        measurements.append(m)
        print(f"\n{direction}, {BATCH} images: {name}, {m.median:.1f} ms, {kept[name]:.0f} MB kept", end="")
    write_csv(measurements, RESULTS / f"folded_block_{KIND}.csv", "cpu", unit="ms")
