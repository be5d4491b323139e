"""FLOPs of a training step, and the hardware's peak rate."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from fastalex.runtime import Runtime
from fastalex.training.outline import outline

# Side of the square matrices: large enough for the peak rate, small enough not to delay the start of a run.
MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}
ROUNDS = 5


def training_flops(model: nn.Module, shape: Sequence[int]) -> int:
    """Count the FLOPs of a forward and backward pass over one batch with PyTorch's counter.

    Convolutions and matrix products count, a multiply-add as two FLOPs. The pass runs on a copy on the meta
    device, so nothing is computed.

    Args:
        model: the network, on any device, in training mode.
        shape: of the batch, ``(N, C, H, W)``.
    """
    with torch.device("meta"):
        images = torch.empty(tuple(shape))
    network = outline(model, images.dtype)
    backward = {torch.ops.aten.convolution_backward: _convolution_backward_flops}
    with FlopCounterMode(display=False, custom_mapping=backward) as counter:
        network(images).sum().backward()
    return counter.get_total_flops()


def matmul_flops_per_second(runtime: Runtime) -> float:
    """Measure the FLOP/s of a large matrix product, as the best of :data:`ROUNDS`.

    Args:
        runtime: the device and dtype of the product.
    """
    size = MATMUL_SIZE[runtime.device.type]
    # Random, because constant operands draw less power and so run faster. A generator of its own leaves the
    # run's as it was.
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
    """Count each of the two gradients like the forward pass; PyTorch's formula omits the weight's groups."""
    *_, transposed, _output_padding, _groups, output_mask = args
    once = conv_flop_count(list(x), list(weight), list(gradient), transposed)
    return once * (output_mask[0] + output_mask[1])
