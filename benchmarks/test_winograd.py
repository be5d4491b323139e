"""AlexNet's and ResNet-18's convolutions by Winograd's algorithm against PyTorch's, by turns in one run.

    python -m pytest benchmarks/test_winograd.py --benchmark-enable -s

A training batch of 128, channels-last: activations in bf16 where the machine computes in it, fp32 weight and
bias, gradients of all three. `conv2d` is `torch.nn.functional.conv2d` under autocast, which rounds weight and
bias to bf16, and their gradients; `winograd` is `winograd_conv2d`. In bf16 it has two algorithms for 3x3
convolutions; `winograd, one axis` and `winograd, both axes` use the same one for all of them. The layers are
the 3x3 convolutions and AlexNet's 5x5 one, at crops of 224x224, 112x112 and 64x64 pixels. They take turns,
and freed memory stays with the process, as in a training run. Writes `benchmarks/results/winograd_KIND.csv`
(`hardware.py`): ms per batch, how many times faster `winograd` is, and for each layer the root mean square
error of the result and of the gradients of input and weight, relative to float64's, for rectified noise and
He initialisation.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from statistics import median
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.hardware import KIND, KINDS
from benchmarks.passes import seconds_by_pass
from benchmarks.report import RESULTS, Measurement, write_csv
from benchmarks.turns import seconds_by_turns
from fastalex.kernels import winograd, winograd_conv2d
from fastalex.runtime import keep_pages

DTYPE = KINDS[KIND]
IN_FP32 = DTYPE is torch.float32
BATCH = 128
ROUNDS = 15
CHECKED = 4  # images whose errors are computed: float64 is slow

Convolution = Callable[[Tensor, Tensor, Tensor], Tensor]


class Layer(NamedTuple):
    """A convolution: channels, and taps and pixels per axis."""

    channels: int
    out_channels: int
    taps: int
    pixels: int


LAYERS_3X3 = {"conv3": (256, 384), "conv4": (384, 384), "conv5": (384, 256)}
RESNET_18 = {224: (56, 28, 14, 7), 112: (28, 14, 7, 4), 64: (16, 8, 4, 2)}  # pixels of layer1 to layer4


def at(crop: int) -> str:
    return "" if crop == 224 else f" at {crop}"


LAYERS: dict[str, Layer] = {}
for crop, second, third in ((224, 27, 13), (112, 13, 6), (64, 7, 3)):
    LAYERS[f"conv2{at(crop)}"] = Layer(96, 256, 5, second)
    LAYERS |= {f"{name}{at(crop)}": Layer(*channels, 3, third) for name, channels in LAYERS_3X3.items()}
for crop, sizes in RESNET_18.items():
    for n, pixels in enumerate(sizes):
        LAYERS[f"ResNet-18 layer{n + 1}{at(crop)}"] = Layer(64 * 2**n, 64 * 2**n, 3, pixels)


def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(x, weight, bias, padding=weight.shape[2] // 2)


def autocast(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    with torch.autocast("cpu", DTYPE, enabled=not IN_FP32):
        return plain(x, weight, bias)


CONVOLUTIONS: dict[str, Convolution] = {"conv2d": autocast, "winograd": winograd_conv2d}
# From how many input channels on 3x3 convolutions use both axes
FORCED = {} if IN_FP32 else {"winograd, one axis": 2**31, "winograd, both axes": 0}
CONVOLUTIONS |= dict.fromkeys(FORCED, winograd_conv2d)


def forced(name: str) -> AbstractContextManager[object]:
    """A context in which `winograd_conv2d` uses the algorithm that an implementation's name says."""
    many = FORCED.get(name, winograd.MANY_CHANNELS)
    return mock.patch.object(winograd, "MANY_CHANNELS", many)


def tensors(layer: Layer) -> tuple[list[Tensor], Tensor]:
    """Input, weight and bias, and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    channels, out_channels, taps, pixels = layer
    x = torch.randn((BATCH, channels, pixels, pixels), generator=generator).relu().to(DTYPE)
    weight = torch.randn((out_channels, channels, taps, taps), generator=generator)
    weight *= (2 / (taps**2 * channels)) ** 0.5
    grad = torch.randn((BATCH, out_channels, pixels, pixels), generator=generator).to(DTYPE)
    x, weight, grad = (each.contiguous(memory_format=torch.channels_last) for each in (x, weight, grad))
    return [each.requires_grad_() for each in (x, weight, torch.zeros(out_channels))], grad


def errors(name: str, inputs: list[Tensor], grad: Tensor) -> list[float]:
    """Errors of output and gradients of input and weight, relative to float64, for the first images."""

    def results(convolution: Convolution, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
        out = convolution(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs[:2], grad)]

    some, grad = [inputs[0][:CHECKED], *inputs[1:]], grad[:CHECKED]
    with forced(name):
        found = results(CONVOLUTIONS[name], some, grad)
    exact = results(plain, [each.double() for each in some], grad.double())
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]


@pytest.mark.benchmark(group="winograd")
@pytest.mark.usefixtures("cpu_only", "enabled")
def test_training_batch(benchmark: Any) -> None:
    keep_pages()
    layers = {name: tensors(layer) for name, layer in LAYERS.items()}

    def turn(name: str) -> dict[tuple[str, str], float]:
        with forced(name):
            return {
                (case, direction): spent
                for case, (inputs, grad) in layers.items()
                if name not in FORCED or LAYERS[case].taps == 3
                for direction, spent in seconds_by_pass(
                    partial(CONVOLUTIONS[name], *inputs), inputs, grad
                ).items()
            }

    seconds = seconds_by_turns(benchmark, {name: partial(turn, name) for name in CONVOLUTIONS}, ROUNDS)
    pairs = dict.fromkeys((case, name) for (case, _), name in seconds)
    error = {(case, name): errors(name, *layers[case]) for case, name in pairs}
    measurements = []
    for ((case, direction), name), times in seconds.items():
        layer = LAYERS[case]
        described = (
            f"{case}, {BATCH} x {layer.channels} to {layer.out_channels}, "
            f"{layer.taps}x{layer.taps} on {layer.pixels}x{layer.pixels}"
        )
        factor = median(times) / median(seconds[(case, direction), "winograd"])
        m = Measurement.of_times(
            {"case": described, "implementation": name, "direction": direction},
            times,
            winograd_is_times_faster=factor,
            **dict(zip(("error", "error_d_input", "error_d_weight"), error[case, name], strict=True)),
        )
        measurements.append(m)
        print(
            f"\n{described}, {direction}: {name}, {m.median:.1f} ms, winograd {factor:.2f} times faster",
            end="",
        )
    write_csv(measurements, RESULTS / f"winograd_{KIND}.csv", "cpu", unit="ms")
