"""AlexNet's first convolution on the source pixels against augment and convolution, interleaved in one run.

    python -m pytest benchmarks/test_folded_conv.py --benchmark-enable -s

A training batch of CIFAR-10: 128 crops of 224 from 32-pixel images resized to 256, 11x11 convolution with
stride 4 and 96 channels, with gradients of its weight and bias. `plain` is `augment` in bf16, which is part
of its forward pass, then the convolution under autocast, channels-last, with an fp32 weight; all in fp32 on a
CPU without bf16. `folded` is `folded_conv2d`. They take turns, and freed memory stays with the process, as in
a training run. Writes `benchmarks/results/folded_conv_KIND.csv` (`hardware.py`): ms per batch, and how many
times faster `folded` is.
"""

from __future__ import annotations

from functools import partial
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.hardware import KIND, KINDS
from benchmarks.passes import seconds_by_pass
from benchmarks.report import RESULTS, Measurement, write_csv
from benchmarks.turns import seconds_by_turns
from fastalex.config import DataConfig
from fastalex.kernels import augment, folded_conv2d
from fastalex.runtime import keep_pages

DATA = DataConfig(name="synthetic", resize=256, crop=224)
DTYPE = KINDS[KIND]
OPTIONS: dict[str, Any] = {
    "resize": DATA.resize,
    "crop": DATA.crop,
    "mean": DATA.mean,
    "std": DATA.std,
    "dtype": DTYPE,
}
BATCH = 128
ROUNDS = 25


def training_batch() -> dict[str, Any]:
    """Arguments of `folded_conv2d`; weight and bias require gradients."""
    generator = torch.Generator().manual_seed(0)
    conv = torch.nn.Conv2d(3, 96, kernel_size=11, stride=4, padding=2).to(memory_format=torch.channels_last)
    limit = DATA.resize - DATA.crop
    return {
        "images": torch.randint(256, (512, 32, 32, 3), generator=generator, dtype=torch.uint8),
        "offsets": torch.randint(limit + 1, (BATCH, 2), generator=generator, dtype=torch.int32),
        "flips": torch.randint(2, (BATCH,), generator=generator).bool(),
        "indices": torch.randint(512, (BATCH,), generator=generator),
        "weight": conv.weight,
        "bias": conv.bias,
        "stride": 4,
        "padding": 2,
        **OPTIONS,
    }


@pytest.mark.benchmark(group="folded_conv")
@pytest.mark.usefixtures("cpu_only", "enabled")
def test_training_batch(benchmark: Any) -> None:
    keep_pages()
    arguments = training_batch()
    images, offsets, flips, indices = (arguments[name] for name in ("images", "offsets", "flips", "indices"))
    parameters = arguments["weight"], arguments["bias"]
    grad = torch.randn((BATCH, 96, 55, 55), generator=torch.Generator().manual_seed(1)).to(DTYPE)
    grad = grad.contiguous(memory_format=torch.channels_last)

    def plain() -> Tensor:
        crops = augment(images, offsets, flips, indices=indices, **OPTIONS)
        with torch.autocast("cpu", DTYPE, enabled=DTYPE is not torch.float32):
            return F.conv2d(crops, *parameters, stride=4, padding=2)

    def folded() -> Tensor:
        return folded_conv2d(**arguments)

    turns = {
        "plain": partial(seconds_by_pass, plain, parameters, grad),
        "folded": partial(seconds_by_pass, folded, parameters, grad),
    }
    seconds = seconds_by_turns(benchmark, turns, ROUNDS)
    case = "128 x (32 x 32 to 256, crop 224), 11 x 11, 96 channels"
    measurements = []
    for (direction, name), times in sorted(seconds.items()):
        factor = median(times) / median(seconds[direction, "folded"])
        subject = {"case": case, "implementation": name, "direction": direction}
        m = Measurement.of_times(subject, times, folded_is_times_faster=factor)
        measurements.append(m)
        print(f"\n{direction}: {name}, {m.median:.1f} ms, folded is {factor:.2f} times faster", end="")
    write_csv(measurements, RESULTS / f"folded_conv_{KIND}.csv", "cpu", unit="ms")
