"""The update of AlexNet's two hidden layers: with whole gradients, or with factors multiplied by row blocks.

    python -m pytest benchmarks/test_factored_sgd.py --benchmark-enable -s

The product of output gradient and input, clipping and step of fc6 and fc7, for random gradients and inputs in
the dtype that the machine trains in. `whole` computes each weight's gradient, as autograd does; the others
keep its factors, which `factored_sgd` multiplies a number of rows at a time. This finds the best
`COLUMN_BYTES` of `kernels/factored_sgd_numba.py`. They take turns. Writes
`benchmarks/results/factored_sgd_KIND.csv` (`benchmarks/hardware.py`): ms, also as a multiple of `whole`'s.
"""

from __future__ import annotations

from functools import partial
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.hardware import KIND, seconds
from benchmarks.report import RESULTS, Measurement, write_csv
from fastalex.config import RuntimeConfig, TrainConfig
from fastalex.distributed.strategies import clip_gradients
from fastalex.kernels import factored_sgd_numba
from fastalex.kernels.factored_sgd_reference import gradient_rows
from fastalex.models.factored_linear import FactoredLinear, Factors
from fastalex.runtime import choose_runtime
from fastalex.training.optim import create_optimizer

BLOCKS = (64, 128, 256, 512, 1024, 2048, 4096)
BATCHES = (64, 128)
CLIP_NORM = 5.0
ROUNDS = 15


@pytest.mark.benchmark(group="factored SGD")
@pytest.mark.usefixtures("cpu_only", "enabled")
def test_update(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [FactoredLinear(256 * 6 * 6, 4096), FactoredLinear(4096, 4096)]
    model = nn.Sequential(*layers)
    model.factored_layers = layers  # type: ignore[assignment]
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
                layer.weight.grad = gradient_rows(gradient.output, gradient.input, None, 0, len(layer.weight))
            else:
                monkeypatch.setattr(factored_sgd_numba, "COLUMN_BYTES", rows * dtype.itemsize)
                layer.parts.append(gradient)
        clip_gradients(model, CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        for gradient in factors[batch]:
            gradient.scale = None

    spent: dict[tuple[int, int | None], list[float]] = {}

    def measure() -> None:
        for batch in BATCHES:
            for rows in (None, *BLOCKS):
                spent.setdefault((batch, rows), []).append(seconds(partial(update, batch, rows)))

    measure()  # touches the memory
    spent.clear()
    benchmark.pedantic(measure, rounds=ROUNDS)
    measurements = []
    for (batch, rows), times in spent.items():
        gradient = f"{rows} rows at a time" if rows else "whole"
        factor = median(times) / median(spent[batch, None])
        m = Measurement.of_times({"batch": batch, "gradient": gradient}, times, times_whole=factor)
        measurements.append(m)
        print(f"\nbatch {batch}: {gradient}, {m.median:.0f} ms, {factor:.2f} times", end="")
    write_csv(measurements, RESULTS / f"factored_sgd_{KIND}.csv", "cpu", unit="ms")
