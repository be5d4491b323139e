"""A 3x3 convolution by Winograd's F(2x2, 3x3) as one PyTorch operator: 2.25 times fewer multiplications.

`winograd_reference` says how; the CPU runs `winograd_numba`, and there is nothing fast for other devices.
What is rounded in bf16 is not what a plain convolution rounds: the transformed weight and tiles, and products
before they become outputs, each once, from fp32. `benchmarks/test_winograd.py` measures what that costs in
accuracy. The weight's gradient comes in fp32.

The operator is opaque to torch.compile and has no autocast rule: the fp32 weight is transformed in fp32, and
the products are in the dtype of x. It is deterministic, and differentiable once.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.library import custom_op

from . import winograd_reference as reference


def winograd_conv2d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`torch.nn.functional.conv2d(x, weight, bias, padding=1)` for a 3x3 weight, in the dtype of x.

    Differentiable in all three.

    Args:
        x: fp32 or bf16 (N, in channels, H, W); fast if it is channels-last and all channels are multiples
            of 16.
        weight: fp32 (out channels, in channels, 3, 3).
        bias: fp32 (out channels,).

    Returns:
        (N, out channels, H, W), channels-last.

    Raises:
        ValueError: a tensor of a wrong shape, dtype or device.
    """
    name = "winograd_conv2d"
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(f"{name}: x must be (N, in channels, H, W), got {tuple(x.shape)}")
    if x.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"{name}: x must be float32 or bfloat16, got {x.dtype}")
    if weight.dim() != 4 or weight.shape[1:] != (x.shape[1], 3, 3) or len(weight) == 0:
        raise ValueError(
            f"{name}: weight must be (out channels, {x.shape[1]}, 3, 3), got {tuple(weight.shape)}"
        )
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}: bias must be ({len(weight)},), got {tuple(bias.shape)}")
    for argument, value in (("weight", weight), ("bias", bias)):
        if value.dtype != torch.float32 or value.device != x.device:
            raise ValueError(
                f"{name}: {argument} must be float32 on {x.device}, got {value.dtype} on {value.device}"
            )
    return _winograd(x, weight, bias)


def _implementation(x: Tensor) -> ModuleType:
    if x.device.type != "cpu":
        return reference
    from . import winograd_numba

    return winograd_numba


@custom_op("fastalex::winograd_conv2d", mutates_args=())
def _winograd(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):  # it reaches into operators
        return _implementation(x).winograd_conv2d(x, weight, bias)


@_winograd.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    shape = x.shape[0], weight.shape[0], *x.shape[2:]
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@custom_op("fastalex::winograd_conv2d_backward", mutates_args=())
def _winograd_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        return _implementation(x).winograd_conv2d_backward(grad, x, weight)


@_winograd_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    taps = weight.new_empty((3, 3, *weight.shape[:2]))
    return d_x, taps.permute(2, 3, 0, 1), weight.new_empty(weight.shape[:1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _winograd_backward(grad, *ctx.saved_tensors)


def _refuse(ctx: Any, *grads: Tensor) -> NoReturn:
    raise NotImplementedError(
        "winograd_conv2d is differentiable once; for second derivatives use torch.nn.functional.conv2d"
    )


_winograd.register_autograd(_differentiate, setup_context=_save)
_winograd_backward.register_autograd(_refuse)
