"""How much arithmetic a training step is, and how much the hardware could do in the same time."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from fastalex.runtime import Runtime

# Large enough to run at the hardware's best, small enough not to delay the start of a run.
MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}
ROUNDS = 5


def training_flops(model: nn.Module, shape: Sequence[int]) -> int:
    """Count the FLOPs of a forward and backward pass over one batch, by PyTorch's own counter.

    It counts convolutions and matrix products, a multiply-add as two. Nothing is computed: the pass runs on
    the meta device, on a copy.

    Args:
        model: on any device, in the mode that it trains in.
        shape: of the batch, ``(N, C, H, W)``.
    """
    with torch.device("meta"):
        images = torch.empty(tuple(shape))
    network = copy.deepcopy(model).to("meta")
    backward = {torch.ops.aten.convolution_backward: _convolution_backward_flops}
    with FlopCounterMode(display=False, custom_mapping=backward) as counter:
        network(images).sum().backward()
    return counter.get_total_flops()


def matmul_flops_per_second(runtime: Runtime) -> float:
    """Measure the rate of a large matrix product in the runtime's arithmetic: the best of a few."""
    size = MATMUL_SIZE[runtime.device.type]
    # Random, since of ones a processor makes less heat and so more speed; but not by the run's own generator.
    generator = torch.Generator(runtime.device).manual_seed(0)
    a, b = torch.randn(2, size, size, dtype=runtime.dtype, device=runtime.device, generator=generator)
    seconds = []
    for _ in range(ROUNDS):
        runtime.synchronize()
        began = time.perf_counter()
        torch.mm(a, b)
        runtime.synchronize()
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds)


def _convolution_backward_flops(
    gradient: Sequence[int],
    x: Sequence[int],
    weight: Sequence[int],
    *args: Any,
    out_shape: Any,
    **kwargs: Any,
) -> int:
    """Each of the two gradients costs what the forward pass does.

    PyTorch's own formula forgets the groups in the gradient of the weight.
    """
    *_, transposed, _output_padding, _groups, output_mask = args
    once = conv_flop_count(list(x), list(weight), list(gradient), transposed)
    return once * (output_mask[0] + output_mask[1])
