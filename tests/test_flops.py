"""The FLOPs of a training step, compared with a count by hand."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from fastalex.config import Precision, RuntimeConfig
from fastalex.models import create_model
from fastalex.runtime import choose_runtime
from fastalex.training import flops
from fastalex.training.flops import matmul_flops_per_second, training_flops


@pytest.mark.parametrize("groups", [1, 2])
def test_alexnet(groups: int) -> None:
    # Output positions times channels times weights; the paper groups the second, fourth and fifth layers.
    conv1 = 55 * 55 * 96 * 11 * 11 * 3
    conv = (
        conv1
        + 27 * 27 * 256 * 5 * 5 * 96 // groups
        + 13 * 13 * 384 * 3 * 3 * 256
        + 13 * 13 * (384 + 256) * 3 * 3 * 384 // groups
    )
    linear = 9216 * 4096 + 4096 * 4096 + 4096 * 10
    # Forward, gradient of the weights, and gradient of the input, which the first layer does not need.
    expected = 2 * (3 * (conv + linear) - conv1)
    assert training_flops(create_model("alexnet", groups=groups), (2, 3, 224, 224)) == 2 * expected


def test_depthwise_convolution() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=8, padding=1))
    pointwise, depthwise = 5 * 5 * 8 * 3, 5 * 5 * 8 * 9
    assert training_flops(network, (1, 3, 5, 5)) == 2 * (2 * pointwise + 3 * depthwise)


def test_one_image_with_batch_normalisation_is_counted() -> None:
    """A rank may have one image where several ranks share the statistics."""
    network = nn.Sequential(nn.Conv2d(3, 8, 5), nn.BatchNorm2d(8))
    assert training_flops(network, (1, 3, 5, 5)) == 2 * (2 * 8 * 3 * 25)
    assert network[1].training


def test_counting_leaves_the_network_unchanged() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    training_flops(network, (1, 3, 2, 2))
    assert network[1].weight.grad is None
    assert network[1].weight.device.type == "cpu"


def test_peak_rate_uses_random_numbers_from_its_own_generator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Constant operands draw less power, so that a GPU keeps a higher clock."""
    multiplied: list[torch.Tensor] = []
    monkeypatch.setattr(torch, "mm", lambda a, b: multiplied.extend((a, b)))
    before = torch.get_rng_state()
    matmul_flops_per_second(choose_runtime(RuntimeConfig(device="cpu", precision=Precision.fp32)))
    assert min(float(x.std()) for x in multiplied) > 0.5
    assert torch.equal(torch.get_rng_state(), before)


def test_peak_rate_is_that_of_the_fastest_product(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = choose_runtime(RuntimeConfig(device="cpu", precision=Precision.fp32))
    clock, seconds, product = [0.0], iter([0.5, 0.25, 2.0, 0.75, 1.0]), torch.mm

    def timed(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        clock[0] += next(seconds)
        return product(a, b)

    monkeypatch.setattr(torch, "mm", timed)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    size = flops.MATMUL_SIZE["cpu"]
    assert matmul_flops_per_second(runtime) == 2 * size**3 / 0.25
    assert next(seconds, None) is None  # every product was made
