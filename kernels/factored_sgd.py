"""Momentum SGD on a fully connected layer's weight, from the factors of its gradient: a PyTorch operator.

Over N images the gradient of the weight is `output.T @ input`, with the gradient of the layer's output,
(N, out), and the layer's input, (N, in). AlexNet's two hidden layers have 55 million weights; with this
operator their gradients are never stored. `factored_sgd_triton` computes it on CUDA, `factored_sgd_numba` on
the CPU, and `factored_sgd_reference`, plain PyTorch, what these do not take.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import Tensor
from torch.library import custom_op

from . import factored_sgd_reference as reference


def factored_sgd(
    weight: Tensor,
    velocity: Tensor | None,
    output: Tensor,
    input: Tensor,
    *,
    rate: Tensor,
    momentum: float,
    weight_decay: float,
    pooling: Tensor | None = None,
    scale: Tensor | None = None,
    skip: Tensor | None = None,
    copy: Tensor | None = None,
) -> None:
    """Take a step of SGD on `weight`, in place, as `torch.optim.SGD` does with a velocity that began as 0.

        gradient = scale * upsampled(output.T @ input)
        velocity = momentum * velocity + gradient + weight_decay * weight
        weight = weight - rate * velocity

    Args:
        weight: the weight, (out, in), fp32 or float64, contiguous; updated.
        velocity: the momentum's buffer, like `weight`; updated. None without momentum.
        output: gradient of the layer's output, (N, out), fp32, bf16, fp16 or float64.
        input: the layer's input, (N, in), or (N, channels * pixels) with `pooling`; the dtype of `output`.
        rate: learning rate, (); a tensor, so that a step recorded as a CUDA graph can read another one later.
        momentum: fraction of the velocity that remains.
        weight_decay: multiple of the weight that is added to the gradient.
        pooling: (pixels, pooled pixels), if the weight was pooled for this batch: each channel's pixels of
            the product are multiplied by it. None if it was not.
        scale: factor of the product, () fp32; None means 1.
        skip: () fp32; nothing changes where it is not 0. None means 0.
        copy: a copy of the weight in the dtype of the next step's products, like `weight`; written. None
            writes none.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other.
    """
    if (velocity is None) != (momentum == 0):
        raise ValueError(f"factored_sgd: momentum={momentum} needs {'no' if momentum == 0 else 'a'} velocity")
    _check(weight, velocity, copy, output, input, pooling)
    _step(weight, velocity, copy, output, input, pooling, rate, scale, skip, momentum, weight_decay)


def _check(
    weight: Tensor,
    velocity: Tensor | None,
    copy: Tensor | None,
    output: Tensor,
    input: Tensor,
    pooling: Tensor | None,
) -> None:
    pixels, pooled = (1, 1) if pooling is None else pooling.shape
    fits = (
        output.dim() == input.dim() == weight.dim() == 2
        and len(output) == len(input)
        and output.shape[1] == len(weight)
        and input.shape[1] * pooled == weight.shape[1] * pixels
        and input.shape[1] % pixels == 0
    )
    if not fits:
        raise ValueError(
            f"factored_sgd: factors {tuple(output.shape)} and {tuple(input.shape)} do not fit a weight of "
            f"{tuple(weight.shape)}"
        )
    if output.dtype != input.dtype:
        raise ValueError(f"factored_sgd: factors of two dtypes, {output.dtype} and {input.dtype}")
    if output.dtype.itemsize > weight.dtype.itemsize:
        raise ValueError(f"factored_sgd: factors of {output.dtype} for a weight of {weight.dtype}")
    if velocity is not None and velocity.dtype != weight.dtype:
        raise ValueError(f"factored_sgd: velocity must be {weight.dtype}, got {velocity.dtype}")
    devices = {each.device for each in (weight, velocity, copy, output, input, pooling) if each is not None}
    if len(devices) > 1:
        raise ValueError(f"factored_sgd: tensors on {' and '.join(sorted(map(str, devices)))}")
    for name, tensor in (("weight", weight), ("velocity", velocity), ("copy", copy)):
        if tensor is not None and (tensor.shape != weight.shape or not tensor.is_contiguous()):
            raise ValueError(
                f"factored_sgd: {name} must be contiguous and {tuple(weight.shape)}, got "
                f"{tuple(tensor.shape)} with strides {tensor.stride()}"
            )


def _implementation(weight: Tensor, copy: Tensor | None) -> ModuleType:
    if weight.device.type == "cuda":
        from . import factored_sgd_triton as triton

        return triton if triton.takes(weight) else reference
    if weight.device.type == "cpu":
        from . import factored_sgd_numba

        return factored_sgd_numba if factored_sgd_numba.takes(weight, copy) else reference
    return reference


@custom_op("fastalex::factored_sgd", mutates_args=("weight", "velocity", "copy"))
def _step(
    weight: Tensor,
    velocity: Tensor | None,
    copy: Tensor | None,
    output: Tensor,
    input: Tensor,
    pooling: Tensor | None,
    rate: Tensor,
    scale: Tensor | None,
    skip: Tensor | None,
    momentum: float,
    weight_decay: float,
) -> None:
    _implementation(weight, copy).factored_sgd(
        weight, velocity, copy, output, input, pooling, rate, scale, skip, momentum, weight_decay
    )


@_step.register_fake
def _(*arguments: Any) -> None:
    return None
