"""A 3x3 or 5x5 convolution by Winograd's algorithm as one PyTorch operator: up to 5.8 times fewer products.

`winograd_reference` derives it. On the CPU, fp32 runs `winograd_numba_fp32` with large tiles. bf16's rounding
allows less: 3x3 convolutions of many channels run `winograd_numba_bf16`, small tiles with 2.25 times fewer
products; those of few channels, and 5x5 ones, run `winograd_numba_bf16_one_axis`, larger tiles along one axis
with 2 and 2.5 times fewer. Other devices run the reference, which is not fast. bf16 rounds other values here
than in a plain convolution: the transformed weight, the transformed tiles, and the products before they
become outputs, each once, from fp32. `benchmarks/test_winograd.py` measures the effect on accuracy. The
weight's gradient is fp32.

The operator is opaque to torch.compile and has no autocast rule: the fp32 weight is transformed in fp32; the
products are in the dtype of x. It is deterministic, and differentiable once. Infinity or NaN in a pixel makes
all outputs of its tiles NaN, even those that do not depend on that pixel in a plain convolution.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from . import winograd_reference as reference
from ._checks import check_fits, check_parameters, refuse_second_derivative

TAPS = 3, 5
CHANNELS = 16  # the fast implementations take multiples of their vectors' length, in and out
# In bf16, from so many input channels on, 3x3 taps are faster with tiles along both axes than along one
MANY_CHANNELS = 256


def winograd_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`torch.nn.functional.conv2d(x, weight, bias, padding=r // 2)` for an r x r weight, in the dtype of x.

    Differentiable in all three.

    Args:
        x: fp32 or bf16 (N, in channels, H, W); fast if it is channels-last and the numbers of in and out
            channels are multiples of 16.
        weight: fp32 (out channels, in channels, r, r), where r is 3 or 5.
        bias: fp32 (out channels,), or None for zeros.

    Returns:
        (N, out channels, H, W) in the dtype of x, channels-last.

    Raises:
        ValueError: a tensor has a wrong shape, dtype or device.
    """
    name = "winograd_conv2d"
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(f"{name}: x must be (N, in channels, H, W), got {tuple(x.shape)}")
    if x.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"{name}: x must be float32 or bfloat16, got {x.dtype}")
    shapes = [(x.shape[1], taps, taps) for taps in TAPS]
    if weight.dim() != 4 or weight.shape[1:] not in shapes or len(weight) == 0:
        expected = " or ".join(f"(out channels, {', '.join(map(str, shape))})" for shape in shapes)
        raise ValueError(f"{name}: weight must be {expected}, got {tuple(weight.shape)}")
    if bias is None:
        bias = weight.new_zeros(len(weight))
    check_parameters(name, x, weight, bias)
    return _winograd(x, weight, bias)


def _implementation(x: Tensor, weight: Tensor) -> ModuleType:
    if x.device.type != "cpu" or x.numel() == 0:
        return reference
    from . import winograd_numba_bf16, winograd_numba_bf16_one_axis, winograd_numba_fp32

    if weight.shape[0] % CHANNELS or weight.shape[1] % CHANNELS:
        return reference
    if x.dtype == torch.float32:
        return winograd_numba_fp32
    is_small = weight.shape[2] == winograd_numba_bf16.TAPS
    return winograd_numba_bf16 if is_small and x.shape[1] >= MANY_CHANNELS else winograd_numba_bf16_one_axis


def _check_gradient(grad: Tensor, x: Tensor, weight: Tensor) -> None:
    check_fits("gradient", grad, (x.shape[0], weight.shape[0], *x.shape[2:]), x.dtype, x)


@custom_op("fastalex::winograd_conv2d", mutates_args=())
def _winograd(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):  # it applies within operators too
        return _implementation(x, weight).winograd_conv2d(x, weight, bias)


@_winograd.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    shape = x.shape[0], weight.shape[0], *x.shape[2:]
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@custom_op("fastalex::winograd_conv2d_backward", mutates_args=())
def _winograd_backward(
    grad: Tensor, x: Tensor, weight: Tensor, of_x: bool = True, of_weight: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias; what is not asked for is empty.

    The defaults are for graphs that torch.compile has cached with an older version, which has no such choice.
    """
    _check_gradient(grad, x, weight)
    with torch.autocast(x.device.type, enabled=False):
        backward = _implementation(x, weight).winograd_conv2d_backward
        d_x, d_weight, d_bias = backward(grad, x, weight, of_x, of_weight)
    return (
        x.new_empty(0) if d_x is None else d_x,
        weight.new_empty(0) if d_weight is None else d_weight,
        d_bias,
    )


@_winograd_backward.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, of_x: bool = True, of_weight: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    _check_gradient(grad, x, weight)
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    taps = weight.new_empty((*weight.shape[2:], *weight.shape[:2]))
    return (
        d_x if of_x else x.new_empty(0),
        taps.permute(2, 3, 0, 1) if of_weight else weight.new_empty(0),
        weight.new_empty(weight.shape[:1]),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor]:
    of_x, of_weight, *_ = ctx.needs_input_grad
    d_x, d_weight, d_bias = _winograd_backward(grad, *ctx.saved_tensors, of_x, of_weight)
    return d_x if of_x else None, d_weight if of_weight else None, d_bias


_winograd.register_autograd(_differentiate, setup_context=_save)
refuse_second_derivative(
    _winograd_backward,
    "winograd_conv2d is differentiable once; for second derivatives use torch.nn.functional.conv2d",
)
