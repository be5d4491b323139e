"""A convolution of augmented images as one PyTorch operator that never enlarges the images.

An enlarged image holds no more information than its source. Each output of the convolution is a linear
function of a few source pixels: for AlexNet's first layer on CIFAR-10, of 3x3 to 4x4, where the kernel covers
11x11 enlarged ones. So the weight is *folded* into kernels on the source (`folded_conv_reference` derives
them), and the weight's gradient is computed from theirs. Both are small matrix products, whatever the batch.
The CPU runs `folded_conv_numba`, other devices the reference.

The operator is opaque to torch.compile and has no autocast rule: the arithmetic is fp32 throughout, where
autocast would round crops and weight to bf16 first. It is deterministic, and differentiable once.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from . import folded_conv_reference as reference
from ._checks import check_fits, check_parameters, refuse_second_derivative
from .augment import _check_images, _check_plan, _check_ranges, _resolve_indices
from .folded_conv_reference import FoldedConv


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
    colors: Tensor | None = None,
) -> Tensor:
    """`conv2d(augment(images, offsets, flips, ...), weight, bias, stride, padding)`, rounded only at the end.

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
        indices: int64 (B,), the image of each crop. None: image i for crop i (and N = B).
        colors: float32 (B, 3), what is added to every pixel of a crop, as for `augment`. None: 0.

    Returns:
        (B, out channels, (crop + 2 * padding - height) // stride + 1, the same of the width) in `dtype`,
        channels-last.

    Raises:
        ValueError: as `augment`, but on every device for an index or an offset out of range; also if `resize`
            is not a whole multiple of H and W, if weight or bias has a wrong shape, dtype or device, and if
            the kernel is larger than the padded crop.
    """
    name = "folded_conv2d"
    _check_images(images, resize, crop, mean, std, dtype, name)
    indices = _resolve_indices(images, indices, name)
    arguments = FoldedConv(
        images, indices, offsets, flips, colors, weight, bias,
        resize, crop, list(mean), list(std), stride, padding, dtype,
    )  # fmt: skip
    _check(arguments, name)
    return _folded_conv(*arguments)


_TENSORS = "Tensor images, Tensor indices, Tensor offsets, Tensor flips, Tensor? colors, Tensor weight"
_NUMBERS = "SymInt resize, SymInt crop, float[] mean, float[] std, SymInt stride, SymInt padding"
# The fields of `FoldedConv`, in the notation of torch.library. Written out, not inferred from a signature, so
# that four operators share it.
SCHEMA = f"{_TENSORS}, Tensor bias, {_NUMBERS}, ScalarType dtype"


def _check(arguments: FoldedConv, name: str) -> None:
    """Raise ValueError for what `_check_images` does not check, except the values in tensors."""
    images, indices, offsets, flips, colors, weight, bias, resize, crop, _, _, stride, padding, _ = arguments
    _check_plan(images, indices, offsets, flips, colors, name)
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
    check_parameters(name, images, weight, bias)
    if stride < 1 or padding < 0:
        raise ValueError(
            f"{name}: stride must be at least 1 and padding at least 0, got {stride} and {padding}"
        )
    if max(weight.shape[2:]) > crop + 2 * padding:
        raise ValueError(
            f"{name}: a kernel of {tuple(weight.shape[2:])} does not fit a crop of {crop} padded by {padding}"
        )


def _check_values(arguments: FoldedConv, name: str) -> None:
    """Raise ValueError for an index or an offset out of range."""
    images, indices, offsets, *_ = arguments
    _check_ranges(images, indices, offsets, arguments.resize - arguments.crop, name)


def _empty_output(arguments: FoldedConv, device: torch.device | str) -> Tensor:
    """An uninitialised result."""
    padded = arguments.crop + 2 * arguments.padding
    height, width = ((padded - taps) // arguments.stride + 1 for taps in arguments.weight.shape[2:])
    shape = arguments.indices.shape[0], arguments.weight.shape[0], height, width
    return torch.empty(shape, dtype=arguments.dtype, device=device, memory_format=torch.channels_last)


def _implementation(images: Tensor) -> ModuleType:
    if images.device.type != "cpu":
        return reference
    from . import folded_conv_numba

    return folded_conv_numba


@custom_op("fastalex::folded_conv", mutates_args=(), schema=f"({SCHEMA}) -> Tensor")
def _folded_conv(*args: Any) -> Tensor:
    arguments = FoldedConv(*args)
    _check_values(arguments, "folded_conv2d")
    images, weight = arguments.images, arguments.weight
    with torch.autocast(images.device.type, enabled=False):  # it applies within operators too
        batch = reference.source_crops(arguments, torch.float32)
        kernels = reference.fold(weight, batch.rows, batch.columns)
        return _implementation(images).folded_conv2d(batch, kernels, arguments.bias, arguments.dtype)


@_folded_conv.register_fake
def _(*args: Any) -> Tensor:
    arguments = FoldedConv(*args)
    return _empty_output(arguments, arguments.weight.device)


@custom_op(
    "fastalex::folded_conv_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_TENSORS}, {_NUMBERS}) -> (Tensor, Tensor)",
)
def _folded_conv_backward(grad: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    # The gradients do not depend on the bias, which this operator does not take.
    arguments = FoldedConv._make((*args[:6], None, *args[6:], grad.dtype))
    images, weight = arguments.images, arguments.weight
    check_fits("gradient", grad, _empty_output(arguments, "meta").shape, grad.dtype, weight)
    with torch.autocast(images.device.type, enabled=False):
        batch = reference.source_crops(arguments, torch.float32)
        d_kernels, d_bias = _implementation(images).folded_conv2d_backward(grad, batch)
        d_weight = reference.unfold(d_kernels, batch.rows, batch.columns)
    return d_weight.contiguous(), d_bias


@_folded_conv_backward.register_fake
def _(grad: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    weight = args[5]
    return weight.new_empty(weight.shape), weight.new_empty(weight.shape[:1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, _ = inputs[:7]
    *ctx.numbers, _ = inputs[7:]
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _folded_conv_backward(grad, *ctx.saved_tensors, *ctx.numbers)
    return None, None, None, None, None, *gradients, *(None for _ in ctx.numbers), None


_folded_conv.register_autograd(_differentiate, setup_context=_save)
refuse_second_derivative(
    _folded_conv_backward,
    "folded_conv2d is differentiable once; for second derivatives use torch.nn.functional.conv2d",
)
