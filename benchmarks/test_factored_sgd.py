"""The update of AlexNet's two hidden layers: their gradients whole, or multiplied out a few rows at a time.

    python -m pytest benchmarks/test_factored_sgd.py --benchmark-enable -s

The product of gradient and input, the clipping and the step of fc6 and fc7, for random ones of both, in the
dtype that the machine trains in. `whole` makes each weight's gradient, as autograd does; the others keep its
factors, which `FactoredSGD` multiplies out that many rows at a time: this is to find the best
`fastalex.training.optim.ROWS`. They take turns. Writes `benchmarks/results/factored_sgd_cpu.csv`, or
`factored_sgd_cpu_fp32.csv` on a CPU without bf16: milliseconds, and times `whole`'s.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastalex.training.optim
from benchmarks.hardware import KIND
from benchmarks.report import RESULTS, percentiles, write_csv
from fastalex.config import RuntimeConfig, TrainConfig
from fastalex.distributed.strategies import clip_gradients
from fastalex.models.factored_linear import FactoredLinear, Factors
from fastalex.runtime import choose_runtime
from fastalex.training.optim import create_optimizer

BLOCKS = (64, 128, 256, 512, 1024, 2048, 4096)
BATCHES = (64, 128)
CLIP_NORM = 5.0
ROUNDS = 15


@dataclass(frozen=True)
class Row:
    """One implementation's time for the update of both layers."""

    batch: int
    gradient: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    rounds: int
    times_whole: float


@pytest.mark.benchmark(group="factored SGD")
@pytest.mark.usefixtures("cpu_only")
def test_update(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if benchmark.disabled:
        pytest.skip("a measurement, not a test: needs --benchmark-enable")
    layers = [FactoredLinear(256 * 6 * 6, 4096), FactoredLinear(4096, 4096)]
    model = nn.Sequential(*layers)
    optimizer = create_optimizer(model, TrainConfig())
    dtype = choose_runtime(RuntimeConfig(device="cpu")).dtype
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    factors = {
        batch: [
            Factors(random(batch, layer.out_features), random(batch, layer.in_features)) for layer in layers
        ]
        for batch in BATCHES
    }

    def update(batch: int, rows: int | None) -> None:
        for layer, gradient in zip(layers, factors[batch], strict=True):
            layer.bias.grad = gradient.output.float().sum(0)
            if rows is None:
                layer.weight.grad = gradient.rows(0, layer.out_features)
            else:
                monkeypatch.setattr(fastalex.training.optim, "ROWS", rows)
                layer.factors = [gradient]
        clip_gradients(model, CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        for layer, gradient in zip(layers, factors[batch], strict=True):
            layer.factors = None
            gradient.scale = None

    seconds: dict[tuple[int, int | None], list[float]] = {}

    def measure() -> None:
        for batch in BATCHES:
            for rows in (None, *BLOCKS):
                start = time.perf_counter()
                update(batch, rows)
                seconds.setdefault((batch, rows), []).append(time.perf_counter() - start)

    measure()  # touches the memory
    seconds.clear()
    benchmark.pedantic(measure, rounds=ROUNDS)
    measured = []
    for (batch, rows), times in seconds.items():
        gradient = f"{rows} rows at a time" if rows else "whole"
        median, low, high = percentiles(times)
        factor = median / percentiles(seconds[batch, None])[0]
        measured.append(Row(batch, gradient, median, low, high, len(times), factor))
        print(f"\nbatch {batch}: {gradient}, {median:.0f} ms, {factor:.2f} times", end="")
    write_csv(measured, RESULTS / f"factored_sgd_{KIND}.csv", "cpu")
