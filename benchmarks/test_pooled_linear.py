"""AlexNet's training step at small crops: its first hidden layer after a pool, or with pooled weights.

    python -m pytest benchmarks/test_pooled_linear.py --benchmark-enable -s

The network's step on random pixels, as the trainer takes it: forward and backward, clipped gradients, SGD on
the factors of the hidden layers' gradients. `pool, then linear` pools the activation to 6x6 pixels, its size
at a crop of 224x224, as torchvision's AlexNet does; `pooled weight` is `PooledLinear`, whose product is
smaller. They take turns. Writes `benchmarks/results/pooled_linear_KIND.csv` (`hardware.py`): ms per step and
how many times faster the second is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.hardware import KIND, seconds
from benchmarks.report import RESULTS, Measurement, write_csv
from benchmarks.turns import seconds_by_turns
from fastalex.config import RuntimeConfig, TrainConfig
from fastalex.distributed.strategies import clip_gradients
from fastalex.models import create_model
from fastalex.models.pooled_linear import PooledLinear
from fastalex.runtime import Runtime, choose_runtime
from fastalex.training.optim import create_optimizer
from fastalex.training.taps import Taps

CROPS = (64, 112, 128, 168)  # at which the last pool leaves 1, 2, 3 and 4 pixels per side
BATCHES = (64, 128)
CLIP_NORM = 5.0
ROUNDS = 7


class PoolThenLinear(PooledLinear):
    def pools_weight(self, height: int, width: int) -> bool:
        return False


def stepper(
    model: nn.Module, optimizer: torch.optim.Optimizer, runtime: Runtime, x: Tensor
) -> Callable[[], None]:
    labels = torch.randint(10, (len(x),), generator=torch.Generator().manual_seed(0))
    taps = Taps(model, copy.deepcopy(model).to("meta"), runtime, copies=False)

    def step() -> None:
        tapped = taps.of(x.shape)
        with runtime.autocast():
            logits, inputs = model(x, tapped)
        F.cross_entropy(logits.float(), labels).backward()
        taps.collect(tapped, inputs)
        clip_gradients(model, CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()

    return step


@pytest.mark.benchmark(group="pooled linear")
@pytest.mark.usefixtures("cpu_only", "enabled")
def test_training_step(benchmark: Any) -> None:
    runtime = choose_runtime(RuntimeConfig(device="cpu"))
    layers = {"pool, then linear": PoolThenLinear, "pooled weight": PooledLinear}
    steps: dict[str, dict[tuple[int, int], Callable[[], None]]] = {}
    for name, layer in layers.items():
        model = runtime.place(create_model("alexnet", init="he"))
        model.fc6.__class__ = layer
        optimizer = create_optimizer(model, TrainConfig())
        steps[name] = {}
        for crop in CROPS:
            for batch in BATCHES:
                x = torch.randn(batch, 3, crop, crop, dtype=runtime.dtype)
                x = x.to(memory_format=runtime.memory_format)
                steps[name][crop, batch] = stepper(model, optimizer, runtime, x)

    def turn(name: str) -> dict[tuple[int, int], float]:
        return {case: seconds(step) for case, step in steps[name].items()}

    spent = seconds_by_turns(benchmark, {name: partial(turn, name) for name in layers}, ROUNDS)
    measurements = []
    for ((crop, batch), name), times in spent.items():
        factor = median(times) / median(spent[(crop, batch), "pooled weight"])
        m = Measurement.of_times(
            {"crop": crop, "batch": batch, "implementation": name},
            times,
            pooled_weight_is_times_faster=factor,
        )
        measurements.append(m)
        print(f"\n{crop}x{crop}, batch {batch}: {name}, {m.median:.0f} ms, {factor:.2f} times", end="")
    write_csv(measurements, RESULTS / f"pooled_linear_{KIND}.csv", "cpu", unit="ms")
