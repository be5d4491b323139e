"""`augment` and the convolution behind it as one PyTorch operator that never enlarges the images.

An enlarged image says nothing that the image did not, and neither does a convolution of it: each output is a
linear function of a few source pixels, of 3x3 to 4x4 for AlexNet's first layer on CIFAR-10, where the kernel
covers 11x11 enlarged ones. `folded_conv_reference` says how; the CPU runs `folded_conv_numba`. The kernels on
the source are computed from the weight in every call, and the weight's gradient from theirs: both are small
matrix products, whatever the batch.

The operator is opaque to torch.compile and has no autocast rule: the arithmetic is fp32 throughout, where
autocast would round crops and weight to bf16 first. It is deterministic, and differentiable once.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.library import custom_op

from . import folded_conv_reference as reference
from ._checks import check_fits
from .augment import _check_images, _check_plan, _check_ranges, _resolve_indices


def folded_conv2d(
    images: Tensor,
    offsets: Tensor,
    flips: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    resize: int,
    crop: int,
    mean: Sequence[float],
    std: Sequence[float],
    stride: int,
    padding: int,
    dtype: torch.dtype,
    indices: Tensor | None = None,
) -> Tensor:
    """`conv2d(augment(images, offsets, flips, ...), weight, bias, stride, padding)`, rounded only at the end.

    Differentiable in weight and bias.

    Args:
        images: uint8 (N, H, W, 3), contiguous, with H and W divisors of `resize`.
        weight: fp32 (out channels, 3, height, width); fast if the channels are a multiple of 96.
        bias: fp32 (out channels,).
        stride, padding: of the convolution, on both axes.
        dtype: of the result: float32, bfloat16 or float16.
        offsets, flips, resize, crop, mean, std, indices: as for `fastalex.kernels.augment`.

    Returns:
        (B, out channels, (crop + 2 * padding - height) // stride + 1, ... of width), channels-last.

    Raises:
        ValueError: as `augment` does, but on any device for an index or an offset out of range; a resize that
            is no whole multiple of the images; a weight or bias of a wrong shape, dtype or device; a kernel
            larger than the padded crop.
    """
    numbers = resize, crop, list(mean), list(std), stride, padding, dtype
    indices = _check(images, offsets, flips, weight, bias, *numbers, indices, "folded_conv2d")
    return _folded_conv(images, indices, offsets, flips, weight, bias, *numbers)


def _check(
    images: Tensor,
    offsets: Tensor,
    flips: Tensor,
    weight: Tensor,
    bias: Tensor,
    resize: int,
    crop: int,
    mean: Sequence[float],
    std: Sequence[float],
    stride: int,
    padding: int,
    dtype: torch.dtype,
    indices: Tensor | None,
    name: str,
) -> Tensor:
    """Check all but what is in the tensors; return the indices."""
    _check_images(images, resize, crop, mean, std, dtype, name)
    indices = _resolve_indices(images, indices, name)
    _check_plan(images, indices, offsets, flips, name)
    _check_convolution(images, weight, bias, resize, crop, stride, padding, name)
    return indices


def _check_convolution(
    images: Tensor,
    weight: Tensor,
    bias: Tensor,
    resize: int,
    crop: int,
    stride: int,
    padding: int,
    name: str,
) -> None:
    height, width = images.shape[1:3]
    if resize % height or resize % width:
        raise ValueError(
            f"{name}: resize must be a whole multiple of the images' height and width, "
            f"got {resize} for {height} x {width}"
        )
    if weight.dim() != 4 or weight.shape[1] != 3 or weight.numel() == 0:
        raise ValueError(
            f"{name}: weight must be (out channels, 3, height, width), got {tuple(weight.shape)}"
        )
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}: bias must be ({len(weight)},), got {tuple(bias.shape)}")
    for argument, value in (("weight", weight), ("bias", bias)):
        if value.dtype != torch.float32 or value.device != images.device:
            raise ValueError(
                f"{name}: {argument} must be float32 on {images.device}, got {value.dtype} on {value.device}"
            )
    if stride < 1 or padding < 0:
        raise ValueError(
            f"{name}: stride must be at least 1 and padding at least 0, got {stride} and {padding}"
        )
    if max(weight.shape[2:]) > crop + 2 * padding:
        raise ValueError(
            f"{name}: a kernel of {tuple(weight.shape[2:])} does not fit a crop of {crop} padded by {padding}"
        )


def _convolved(
    indices: Tensor,
    weight: Tensor,
    crop: int,
    stride: int,
    padding: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Tensor:
    """Room for the result."""
    height, width = ((crop + 2 * padding - taps) // stride + 1 for taps in weight.shape[2:])
    shape = indices.shape[0], weight.shape[0], height, width
    return torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last)


def _implementation(images: Tensor) -> ModuleType:
    if images.device.type != "cpu":
        return reference
    from . import folded_conv_numba

    return folded_conv_numba


@custom_op("fastalex::folded_conv", mutates_args=())
def _folded_conv(
    images: Tensor,
    indices: Tensor,
    offsets: Tensor,
    flips: Tensor,
    weight: Tensor,
    bias: Tensor,
    resize: int,
    crop: int,
    mean: Sequence[float],
    std: Sequence[float],
    stride: int,
    padding: int,
    dtype: torch.dtype,
) -> Tensor:
    _check_ranges(images, indices, offsets, resize - crop, "folded_conv2d")
    plan = images, indices, offsets, flips, weight.shape[2:]
    with torch.autocast(images.device.type, enabled=False):  # it reaches into operators
        batch = reference.crops(*plan, resize, crop, mean, std, stride, padding, torch.float32)
        kernels = reference.fold(weight, batch.rows, batch.columns)
        return _implementation(images).folded_conv2d(batch, kernels, bias, dtype)


@_folded_conv.register_fake
def _(
    images: Tensor,
    indices: Tensor,
    offsets: Tensor,
    flips: Tensor,
    weight: Tensor,
    bias: Tensor,
    resize: int,
    crop: int,
    mean: Sequence[float],
    std: Sequence[float],
    stride: int,
    padding: int,
    dtype: torch.dtype,
) -> Tensor:
    return _convolved(indices, weight, crop, stride, padding, dtype, weight.device)


@custom_op("fastalex::folded_conv_backward", mutates_args=())
def _folded_conv_backward(
    grad: Tensor,
    images: Tensor,
    indices: Tensor,
    offsets: Tensor,
    flips: Tensor,
    weight: Tensor,
    resize: int,
    crop: int,
    mean: Sequence[float],
    std: Sequence[float],
    stride: int,
    padding: int,
) -> tuple[Tensor, Tensor]:
    expected = _convolved(indices, weight, crop, stride, padding, grad.dtype, "meta")
    check_fits("gradient", grad, expected.shape, grad.dtype, weight)
    plan = images, indices, offsets, flips, weight.shape[2:]
    with torch.autocast(images.device.type, enabled=False):
        batch = reference.crops(*plan, resize, crop, mean, std, stride, padding, torch.float32)
        d_kernels, d_bias = _implementation(images).folded_conv2d_backward(grad, batch)
        d_weight = reference.unfold(d_kernels, batch.rows, batch.columns)
    return d_weight.contiguous(), d_bias


@_folded_conv_backward.register_fake
def _(
    grad: Tensor,
    images: Tensor,
    indices: Tensor,
    offsets: Tensor,
    flips: Tensor,
    weight: Tensor,
    resize: int,
    crop: int,
    mean: Sequence[float],
    std: Sequence[float],
    stride: int,
    padding: int,
) -> tuple[Tensor, Tensor]:
    return weight.new_empty(weight.shape), weight.new_empty(weight.shape[:1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    images, indices, offsets, flips, weight, _, *ctx.numbers, _ = inputs
    ctx.save_for_backward(images, indices, offsets, flips, weight)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    d_weight, d_bias = _folded_conv_backward(grad, *ctx.saved_tensors, *ctx.numbers)
    return None, None, None, None, d_weight, d_bias, None, None, None, None, None, None, None


def _refuse(ctx: Any, *grads: Tensor) -> NoReturn:
    raise NotImplementedError(
        "folded_conv2d is differentiable once; for second derivatives use torch.nn.functional.conv2d"
    )


_folded_conv.register_autograd(_differentiate, setup_context=_save)
_folded_conv_backward.register_autograd(_refuse)
