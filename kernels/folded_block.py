"""`folded_conv2d` with ReLU, LRN and max pooling as one operator that does not store the intermediates.

The output of AlexNet's first convolution is its largest tensor by far, 149 MB for a batch of 128 in fp32, and
the folded convolution computes it quickly. So it is computed `IMAGES` images at a time, pooled and dropped.
The backward pass computes it again, also `IMAGES` images at a time, so its gradient, which is as large, is
never stored as a whole either. What is saved for the gradient is one byte per output: the argmax of its
pooling window.

The operator calls the functions of `folded_conv` and the operators of `lrn`. Its result equals theirs to the
bit; the gradients of weight and bias are summed in another order. As they are, it is opaque to torch.compile,
has no autocast rule and is differentiable once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from . import folded_conv_reference as reference
from ._checks import refuse_second_derivative
from .augment import _check_images, _resolve_indices
from .folded_conv import SCHEMA, _check, _check_values, _empty_output, _implementation
from .folded_conv_reference import FoldedConv
from .lrn import _check_pooling, _lrn_max_pool, _lrn_max_pool_backward, _pooled

IMAGES = 32  # 37 MB of fp32 for AlexNet at 224x224; with fewer, the fixed cost of a part shows


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
    colors: Tensor | None = None,
) -> Tensor:
    """`relu_lrn_max_pool(folded_conv2d(images, ...), size, alpha, beta, k)`, a part of the batch at a time.

    Differentiable in weight and bias.

    Args:
        images: uint8 (N, H, W, 3), contiguous. H and W divide `resize`.
        offsets: int32 (B, 2), top and left of each crop within the resized image, 0 .. resize - crop.
        flips: bool (B,), which crops are mirrored.
        weight: fp32 (out channels, 3, height, width); fast if the out channels are a multiple of 96.
        bias: fp32 (out channels,).
        resize: pixels of the resized image on each axis.
        crop: pixels of a crop on each axis, at most `resize`.
        mean: three numbers, one per channel, for pixels in 0..1.
        std: three positive numbers, as `mean`.
        stride: of the convolution, on both axes, at least 1.
        padding: zeros added to each side of the crop, on both axes.
        dtype: of the result: float32, bfloat16 or float16.
        size: channels in the window of the normalisation, at least 1.
        alpha, beta, k: factor of the mean square, exponent and added constant, as for `local_response_norm`.
        indices: int64 (B,), the image of each crop. None: image i for crop i (and N = B).
        colors: float32 (B, 3), what is added to every pixel of a crop, as for `augment`. None: 0.

    Returns:
        (B, out channels, (H - 3) // 2 + 1, (W - 3) // 2 + 1) in `dtype`, channels-last, where H and W are the
        height and width of the convolution's output.

    Raises:
        ValueError: as `folded_conv2d` and `relu_lrn_max_pool`.
    """
    name = "folded_conv2d_relu_lrn_max_pool"
    _check_images(images, resize, crop, mean, std, dtype, name)
    indices = _resolve_indices(images, indices, name)
    convolution = FoldedConv(
        images, indices, offsets, flips, colors, weight, bias,
        resize, crop, list(mean), list(std), stride, padding, dtype,
    )  # fmt: skip
    _check(convolution, name)
    _check_pooling(_empty_output(convolution, "meta"), size, name)
    return _block(*convolution, size, alpha, beta, k)[0]


_SCHEMA = f"{SCHEMA}, SymInt size, float alpha, float beta, float k"


def _empty_outputs(convolution: FoldedConv) -> tuple[Tensor, Tensor]:
    """The uninitialised result, and its argmax: uint8 of the same shape."""
    like = _pooled(_empty_output(convolution, "meta"))
    device = convolution.weight.device
    return torch.empty_like(like, device=device), torch.empty_like(like, device=device, dtype=torch.uint8)


@custom_op("fastalex::conv_block", mutates_args=(), schema=f"({_SCHEMA}) -> (Tensor, Tensor)")
def _block(*args: Any) -> tuple[Tensor, Tensor]:
    convolution, lrn = FoldedConv(*args[:-4]), args[-4:]
    _check_values(convolution, "folded_conv2d_relu_lrn_max_pool")
    out, argmax = _empty_outputs(convolution)
    convolve = _implementation(convolution.images).folded_conv2d
    with torch.autocast(convolution.images.device.type, enabled=False):  # it applies within operators too
        batch = reference.source_crops(convolution, torch.float32)
        kernels = reference.fold(convolution.weight, batch.rows, batch.columns)
        for part, *outputs in zip(*(each.split(IMAGES) for each in (batch, out, argmax)), strict=True):
            convolved = convolve(part, kernels, convolution.bias, convolution.dtype)
            for output, result in zip(outputs, _lrn_max_pool(convolved, *lrn), strict=True):
                output.copy_(result)
    return out, argmax


@_block.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor]:
    return _empty_outputs(FoldedConv(*args[:-4]))


@custom_op(
    "fastalex::conv_block_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor argmax, {_SCHEMA}) -> (Tensor, Tensor)",
)
def _block_backward(grad: Tensor, argmax: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    convolution, lrn = FoldedConv(*args[:-4]), args[-4:]
    implementation = _implementation(convolution.images)
    with torch.autocast(convolution.images.device.type, enabled=False):
        batch = reference.source_crops(convolution, torch.float32)
        kernels = reference.fold(convolution.weight, batch.rows, batch.columns)
        d_kernels, d_bias = torch.zeros_like(kernels), torch.zeros_like(convolution.bias)
        for part, *pooled in zip(*(each.split(IMAGES) for each in (batch, grad, argmax)), strict=True):
            convolved = implementation.folded_conv2d(part, kernels, convolution.bias, convolution.dtype)
            d_convolved = _lrn_max_pool_backward(*pooled, convolved, *lrn)
            terms = implementation.folded_conv2d_backward(d_convolved, part)
            d_kernels += terms[0]
            d_bias += terms[1]
        d_weight = reference.unfold(d_kernels, batch.rows, batch.columns)
    return d_weight.contiguous(), d_bias


@_block_backward.register_fake
def _(grad: Tensor, argmax: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    weight, bias = args[5:7]
    return weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors, ctx.numbers = inputs[:7], inputs[7:]
    ctx.save_for_backward(output[1], *tensors)
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    gradients = _block_backward(grad, *ctx.saved_tensors, *ctx.numbers)
    return None, None, None, None, None, *gradients, *(None for _ in ctx.numbers)


_block.register_autograd(_differentiate, setup_context=_save)
refuse_second_derivative(_block_backward, "folded_conv2d_relu_lrn_max_pool is differentiable once")
