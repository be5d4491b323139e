"""AlexNet's training step at small crops: the first hidden layer behind its pool, or with pooled weights.

    python -m pytest benchmarks/test_pooled_linear.py --benchmark-enable -s

The network's step on random pixels, as the fast loop takes it: forward and backward, clipped gradients, SGD
on the factors of the hidden layers' gradients. `pool, then linear` pools the image up to 6x6 pixels, which
224x224 would have given, as torchvision's AlexNet does; `pooled weight` is `PooledLinear`, whose product is
smaller. They take turns. Writes `benchmarks/results/pooled_linear_cpu.csv`, or `pooled_linear_cpu_fp32.csv`
on a CPU without bf16: milliseconds a step and how many times faster the second is.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.hardware import KIND
from benchmarks.report import RESULTS, percentiles, write_csv
from fastalex.config import RuntimeConfig, TrainConfig
from fastalex.distributed.strategies import clip_gradients
from fastalex.models import create_model
from fastalex.models.factored_linear import factored_layers, keeping_factors
from fastalex.models.pooled_linear import PooledLinear
from fastalex.runtime import Runtime, choose_runtime
from fastalex.training.optim import create_optimizer

CROPS = (64, 112, 128, 168)  # of which the last pool leaves 1, 2, 3 and 4 pixels a side
BATCHES = (64, 128)
CLIP_NORM = 5.0
ROUNDS = 7


class PoolThenLinear(PooledLinear):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.adaptive_avg_pool2d(x, self.size).flatten(1), self.weight, None)


@dataclass(frozen=True)
class Row:
    """One implementation's time for a training step."""

    crop: int
    batch: int
    implementation: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    rounds: int
    pooled_weight_is_times_faster: float


def stepper(
    model: nn.Module, optimizer: torch.optim.Optimizer, runtime: Runtime, x: Tensor
) -> Callable[[], None]:
    labels = torch.randint(10, (len(x),), generator=torch.Generator().manual_seed(0))
    factored = factored_layers(model)

    def step() -> None:
        with keeping_factors(factored):
            with runtime.autocast():
                logits = model(x)
            F.cross_entropy(logits.float(), labels).backward()
            clip_gradients(model, CLIP_NORM)
            optimizer.step()
            optimizer.zero_grad()

    return step


@pytest.mark.benchmark(group="pooled linear")
@pytest.mark.usefixtures("cpu_only")
def test_training_step(benchmark: Any) -> None:
    if benchmark.disabled:
        pytest.skip("a measurement, not a test: needs --benchmark-enable")
    runtime = choose_runtime(RuntimeConfig(device="cpu"))
    model = runtime.place(create_model("alexnet", init="he"))
    optimizer = create_optimizer(model, TrainConfig())
    forwards = {"pool, then linear": PoolThenLinear, "pooled weight": PooledLinear}
    steps: dict[tuple[int, int], Callable[[], None]] = {}
    for crop in CROPS:
        for batch in BATCHES:
            x = torch.randn(batch, 3, crop, crop, dtype=runtime.dtype).to(memory_format=runtime.memory_format)
            steps[crop, batch] = stepper(model, optimizer, runtime, x)
    seconds: dict[tuple[int, int, str], list[float]] = {}

    def measure(name: str) -> None:
        model.fc6.__class__ = forwards[name]
        for case, step in steps.items():
            start = time.perf_counter()
            step()
            seconds.setdefault((*case, name), []).append(time.perf_counter() - start)

    ours = "pooled weight"
    benchmark.pedantic(
        measure, args=(ours,), setup=lambda: measure("pool, then linear"), rounds=ROUNDS, warmup_rounds=1
    )
    rows = []
    for (crop, batch, name), times in seconds.items():
        median, low, high = percentiles(times[1:])  # the first round compiles
        factor = median / percentiles(seconds[crop, batch, ours][1:])[0]
        rows.append(Row(crop, batch, name, median, low, high, len(times) - 1, factor))
        print(f"\n{crop}x{crop}, batch {batch}: {name}, {median:.0f} ms, {factor:.2f} times", end="")
    write_csv(rows, RESULTS / f"pooled_linear_{KIND}.csv", "cpu")
