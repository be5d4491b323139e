"""`folded_conv2d` and the ReLU, normalisation and max pooling behind it as one operator that keeps neither.

The output of AlexNet's first convolution is its largest tensor by far, 149 MB for a batch of 128 in fp32,
and folded it takes little time to compute. So it is computed `IMAGES` images at a time, pooled, and
forgotten; the backward pass computes it again, and its gradient, which is as large, is never there as a whole
either. What is kept for the gradient is one byte for each pooled number: which one of its window it was.

It is made of the operators of `folded_conv` and `lrn`. The result is theirs to the bit; the gradients of
weight and bias are added up in another order. What is said there of torch.compile, autocast and second
derivatives holds here too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.library import custom_op

from . import folded_conv_reference as reference
from .folded_conv import _check, _check_ranges, _convolved, _implementation
from .lrn import _check_pooling, _lrn_max_pool, _lrn_max_pool_backward, _pooled

IMAGES = 32  # 37 MB of fp32 for AlexNet at 224x224; with fewer, what each part takes beside its images shows


def folded_conv2d_relu_lrn_max_pool(
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
    size: int,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
    indices: Tensor | None = None,
) -> Tensor:
    """`relu_lrn_max_pool(folded_conv2d(images, ...), size, alpha, beta, k)`; arguments and errors as there.

    Differentiable in weight and bias.

    Returns:
        (B, out channels, (H - 3) // 2 + 1, (W - 3) // 2 + 1) in `dtype`, channels-last, for a convolution's
        output of height H and width W.
    """
    name = "folded_conv2d_relu_lrn_max_pool"
    numbers = resize, crop, list(mean), list(std), stride, padding, dtype
    indices = _check(images, offsets, flips, weight, bias, *numbers, indices, name)
    _check_pooling(_convolved(indices, weight, crop, stride, padding, dtype, "meta"), size, name)
    return _block(images, indices, offsets, flips, weight, bias, *numbers, size, alpha, beta, k)[0]


def _room(
    indices: Tensor, weight: Tensor, crop: int, stride: int, padding: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Room for the result, and for which one of its window each number is."""
    like = _pooled(_convolved(indices, weight, crop, stride, padding, dtype, "meta"))
    device = weight.device
    return torch.empty_like(like, device=device), torch.empty_like(like, device=device, dtype=torch.uint8)


@custom_op("fastalex::conv_block", mutates_args=())
def _block(
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
    size: int,
    alpha: float,
    beta: float,
    k: float,
) -> tuple[Tensor, Tensor]:
    _check_ranges(images, indices, offsets, resize - crop, "folded_conv2d_relu_lrn_max_pool")
    plan = images, indices, offsets, flips, weight.shape[2:]
    out, argmax = _room(indices, weight, crop, stride, padding, dtype)
    convolution = _implementation(images)
    with torch.autocast(images.device.type, enabled=False):  # it reaches into operators
        batch = reference.crops(*plan, resize, crop, mean, std, stride, padding, torch.float32)
        kernels = reference.fold(weight, batch.rows, batch.columns)
        for part, *some in zip(*(each.split(IMAGES) for each in (batch, out, argmax)), strict=True):
            convolved = convolution.folded_conv2d(part, kernels, bias, dtype)
            for room, result in zip(some, _lrn_max_pool(convolved, size, alpha, beta, k), strict=True):
                room.copy_(result)
    return out, argmax


@_block.register_fake
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
    size: int,
    alpha: float,
    beta: float,
    k: float,
) -> tuple[Tensor, Tensor]:
    return _room(indices, weight, crop, stride, padding, dtype)


@custom_op("fastalex::conv_block_backward", mutates_args=())
def _block_backward(
    grad: Tensor,
    argmax: Tensor,
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
    size: int,
    alpha: float,
    beta: float,
    k: float,
) -> tuple[Tensor, Tensor]:
    plan = images, indices, offsets, flips, weight.shape[2:]
    convolution = _implementation(images)
    with torch.autocast(images.device.type, enabled=False):
        batch = reference.crops(*plan, resize, crop, mean, std, stride, padding, torch.float32)
        kernels = reference.fold(weight, batch.rows, batch.columns)
        d_kernels, d_bias = torch.zeros_like(kernels), torch.zeros_like(bias)
        for part, *some in zip(*(each.split(IMAGES) for each in (batch, grad, argmax)), strict=True):
            convolved = convolution.folded_conv2d(part, kernels, bias, dtype)
            d_convolved = _lrn_max_pool_backward(*some, convolved, size, alpha, beta, k)
            shares = convolution.folded_conv2d_backward(d_convolved, part)
            d_kernels += shares[0]
            d_bias += shares[1]
        d_weight = reference.unfold(d_kernels, batch.rows, batch.columns)
    return d_weight.contiguous(), d_bias


@_block_backward.register_fake
def _(
    grad: Tensor,
    argmax: Tensor,
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
    size: int,
    alpha: float,
    beta: float,
    k: float,
) -> tuple[Tensor, Tensor]:
    return weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    images, indices, offsets, flips, weight, bias, *ctx.numbers = inputs
    ctx.save_for_backward(output[1], images, indices, offsets, flips, weight, bias)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    gradients = _block_backward(grad, *ctx.saved_tensors, *ctx.numbers)
    return None, None, None, None, *gradients, *(None for _ in ctx.numbers)


def _refuse(ctx: Any, *grads: Tensor) -> NoReturn:
    raise NotImplementedError("folded_conv2d_relu_lrn_max_pool is differentiable once")


_block.register_autograd(_differentiate, setup_context=_save)
_block_backward.register_autograd(_refuse)
