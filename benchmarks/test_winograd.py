"""AlexNet's 3x3 convolutions by Winograd's algorithm against PyTorch's, interleaved, in one run.

    python -m pytest benchmarks/test_winograd.py --benchmark-enable -s

A training batch of 128 on 13x13 pixels, channels-last: bf16 activations, fp32 weight and bias, gradients of
all three. `conv2d` is `torch.nn.functional.conv2d` under autocast, which rounds weight and bias to bf16, and
their gradients; `winograd` is `winograd_conv2d`. They take turns, and memory that is freed stays with the
process, as in a training run. Writes `benchmarks/results/winograd_cpu.csv`: milliseconds a batch, how many
times faster `winograd` is, and for each layer the root mean square error of the result and of the gradients
of input and weight, relative to float64's, for rectified noise and a weight initialised after He.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.report import RESULTS, percentiles, write_csv
from fastalex.kernels import winograd_conv2d
from fastalex.runtime import keep_pages

LAYERS = {"conv3": (256, 384), "conv4": (384, 384), "conv5": (384, 256)}
BATCH = 128
SIZE = 13
ROUNDS = 15
CHECKED = 4  # images whose errors are looked at: float64 takes long

Convolution = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Row:
    """One implementation's time for one pass over a batch, and its errors relative to float64."""

    case: str
    implementation: str
    direction: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    rounds: int
    winograd_is_times_faster: float
    error: float | None  # of the result
    error_d_input: float | None
    error_d_weight: float | None


def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(x, weight, bias, padding=1)


def autocast(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return plain(x, weight, bias)


CONVOLUTIONS: dict[str, Convolution] = {"conv2d": autocast, "winograd": winograd_conv2d}


def layer(channels: int, out_channels: int) -> tuple[list[Tensor], Tensor]:
    """Input, weight and bias, and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((BATCH, channels, SIZE, SIZE), generator=generator).relu().bfloat16()
    weight = torch.randn((out_channels, channels, 3, 3), generator=generator) * (2 / (9 * channels)) ** 0.5
    grad = torch.randn((BATCH, out_channels, SIZE, SIZE), generator=generator).bfloat16()
    x, weight, grad = (each.contiguous(memory_format=torch.channels_last) for each in (x, weight, grad))
    return [each.requires_grad_() for each in (x, weight, torch.zeros(out_channels))], grad


def errors(name: str, inputs: list[Tensor], grad: Tensor) -> list[float]:
    """Of the output and the gradients of input and weight, for the first images."""

    def results(convolution: Convolution, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
        out = convolution(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs[:2], grad)]

    some, grad = [inputs[0][:CHECKED], *inputs[1:]], grad[:CHECKED]
    found = results(CONVOLUTIONS[name], some, grad)
    exact = results(plain, [each.double() for each in some], grad.double())
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]


@pytest.mark.benchmark(group="winograd")
def test_training_batch(benchmark: Any) -> None:
    if benchmark.disabled:
        pytest.skip("a measurement, not a test: needs --benchmark-enable")
    keep_pages()
    layers = {name: layer(*channels) for name, channels in LAYERS.items()}
    seconds: dict[tuple[str, str, str], list[float]] = {}

    def measure(name: str) -> None:
        totals = [0.0, 0.0]
        for case, (inputs, grad) in layers.items():
            start = time.perf_counter()
            result = CONVOLUTIONS[name](*inputs)
            middle = time.perf_counter()
            torch.autograd.grad(result, inputs, grad)
            passes = middle - start, time.perf_counter() - middle
            note(case, name, *passes)
            totals = [total + spent for total, spent in zip(totals, passes, strict=True)]
        note("all three", name, *totals)

    def note(case: str, name: str, forward: float, backward: float) -> None:
        passes = {"forward": forward, "backward": backward, "forward + backward": forward + backward}
        for direction, spent in passes.items():
            seconds.setdefault((case, direction, name), []).append(spent)

    benchmark.pedantic(
        measure, args=("winograd",), setup=lambda: measure("conv2d"), rounds=ROUNDS, warmup_rounds=1
    )
    error = {(case, name): errors(name, *layers[case]) for case in layers for name in CONVOLUTIONS}
    rows = []
    for (case, direction, name), times in seconds.items():
        times = times[1:]  # the first round compiles
        median, low, high = percentiles(times)
        factor = median / percentiles(seconds[case, direction, "winograd"][1:])[0]
        described = f"{case}, {BATCH} x {LAYERS[case][0]} to {LAYERS[case][1]}" if case in LAYERS else case
        of = error.get((case, name), [None] * 3)
        rows.append(Row(described, name, direction, median, low, high, len(times), factor, *of))
        print(
            f"\n{described}, {direction}: {name}, {median:.1f} ms, winograd {factor:.2f} times faster", end=""
        )
    write_csv(rows, RESULTS / "winograd_cpu.csv", "cpu")
