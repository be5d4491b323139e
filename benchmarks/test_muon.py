"""One step of AlexNet's five convolutions' weights: SGD, PyTorch's Muon and fastalex's.

    python -m pytest benchmarks/test_muon.py --benchmark-enable -s

For random gradients. PyTorch's `torch.optim.Muon` takes matrices only, here the flattened weights, and
multiplies in bf16 whatever the machine. fastalex's multiplies in the dtype that the machine trains in, and in
another order (`fastalex/training/muon.py`). They take turns. Writes `benchmarks/results/muon_KIND.csv`
(`hardware.py`): ms, also as a multiple of fastalex's.
"""

from __future__ import annotations

from functools import partial
from statistics import median
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.hardware import KIND, seconds
from benchmarks.report import RESULTS, Measurement, write_csv
from fastalex.config import Optimizer, RuntimeConfig, TrainConfig
from fastalex.models import create_model
from fastalex.runtime import choose_runtime
from fastalex.training.optim import create_optimizer

ROUNDS = 15


@pytest.mark.benchmark(group="Muon")
@pytest.mark.usefixtures("cpu_only", "enabled")
def test_step_of_the_convolutions(benchmark: Any) -> None:
    runtime = choose_runtime(RuntimeConfig(device="cpu"))
    layers = [layer for layer in create_model("alexnet").modules() if isinstance(layer, nn.Conv2d)]
    for layer in layers:
        layer.bias = None
    network = runtime.place(nn.Sequential(*layers))
    sgd = create_optimizer(network, TrainConfig())
    ours = create_optimizer(network, TrainConfig(optimizer=Optimizer.muon), runtime.dtype)
    matrices = [nn.Parameter(layer.weight.detach().flatten(1).clone()) for layer in layers]
    theirs = torch.optim.Muon(matrices, lr=0.01, weight_decay=0.0)

    def step(optimizer: torch.optim.Optimizer) -> None:
        for layer, matrix, gradient in zip(layers, matrices, gradients, strict=True):
            layer.weight.grad = gradient
            matrix.grad = gradient.flatten(1) if optimizer is theirs else None
        optimizer.step()

    gradients = [torch.randn_like(layer.weight) for layer in layers]
    optimizers = {"SGD": sgd, "PyTorch's Muon": theirs, "fastalex's Muon": ours}
    spent: dict[str, list[float]] = {name: [] for name in optimizers}

    def measure() -> None:
        for name, optimizer in optimizers.items():
            spent[name].append(seconds(partial(step, optimizer)))

    measure()  # touches the memory
    for times in spent.values():
        times.clear()
    benchmark.pedantic(measure, rounds=ROUNDS)
    measurements = []
    for name, times in spent.items():
        factor = median(times) / median(spent["fastalex's Muon"])
        m = Measurement.of_times({"optimizer": name}, times, times_ours=factor)
        measurements.append(m)
        print(f"\n{name}: {m.median:.1f} ms, {factor:.2f} times", end="")
    write_csv(measurements, RESULTS / f"muon_{KIND}.csv", "cpu", unit="ms")
