"""A 3x3 or 5x5 convolution by Winograd's algorithm as one PyTorch operator: up to 5.8 times fewer products.

`winograd_reference` says how. The CPU runs one of two: `winograd_numba_bf16`, whose small tiles and 2.25
times fewer products are what bf16's rounding bears, and `winograd_numba_fp32`, with larger ones. There is
nothing fast for other devices. In bf16 what is rounded is not what a plain convolution rounds: the
transformed weight and tiles, and products before they become outputs, each once, from fp32.
`benchmarks/test_winograd.py` measures what that costs in accuracy. The weight's gradient comes in fp32.

The operator is opaque to torch.compile and has no autocast rule: the fp32 weight is transformed in fp32, and
the products are in the dtype of x, but of a 5x5 convolution always in fp32. It is deterministic, and
differentiable once. Infinity or NaN in a pixel makes all outputs of its tiles NaN, also those that a plain
convolution computes without it.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.library import custom_op

from . import winograd_reference as reference
from ._checks import check_fits

TAPS = 3, 5


def winograd_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`torch.nn.functional.conv2d(x, weight, bias, padding=r // 2)` for an r x r weight, in the dtype of x.

    Differentiable in all three.

    Args:
        x: fp32 or bf16 (N, in channels, H, W); fast if it is channels-last and all channels are multiples
            of 16.
        weight: fp32 (out channels, in channels, r, r), r being 3 or 5.
        bias: fp32 (out channels,), or None for zeros.

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
    shapes = [(x.shape[1], taps, taps) for taps in TAPS]
    if weight.dim() != 4 or weight.shape[1:] not in shapes or len(weight) == 0:
        expected = " or ".join(f"(out channels, {', '.join(map(str, shape))})" for shape in shapes)
        raise ValueError(f"{name}: weight must be {expected}, got {tuple(weight.shape)}")
    if bias is None:
        bias = weight.new_zeros(len(weight))
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}: bias must be ({len(weight)},), got {tuple(bias.shape)}")
    for argument, value in (("weight", weight), ("bias", bias)):
        if value.dtype != torch.float32 or value.device != x.device:
            raise ValueError(
                f"{name}: {argument} must be float32 on {x.device}, got {value.dtype} on {value.device}"
            )
    return _winograd(x, weight, bias)


def _implementation(x: Tensor, weight: Tensor) -> ModuleType:
    if x.device.type != "cpu" or x.numel() == 0:
        return reference
    from . import winograd_numba_bf16, winograd_numba_fp32
    from ._numba_simd import LANES

    if weight.shape[0] % LANES or weight.shape[1] % LANES:
        return reference
    small = x.dtype == torch.bfloat16 and weight.shape[2] == winograd_numba_bf16.TAPS
    return winograd_numba_bf16 if small else winograd_numba_fp32


def _check_gradient(grad: Tensor, x: Tensor, weight: Tensor) -> None:
    check_fits("gradient", grad, (x.shape[0], weight.shape[0], *x.shape[2:]), x.dtype, x)


@custom_op("fastalex::winograd_conv2d", mutates_args=())
def _winograd(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):  # it reaches into operators
        return _implementation(x, weight).winograd_conv2d(x, weight, bias)


@_winograd.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    shape = x.shape[0], weight.shape[0], *x.shape[2:]
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@custom_op("fastalex::winograd_conv2d_backward", mutates_args=())
def _winograd_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _check_gradient(grad, x, weight)
    with torch.autocast(x.device.type, enabled=False):
        return _implementation(x, weight).winograd_conv2d_backward(grad, x, weight)


@_winograd_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _check_gradient(grad, x, weight)
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    taps = weight.new_empty((*weight.shape[2:], *weight.shape[:2]))
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
