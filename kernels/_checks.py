"""What several operators refuse: tensors that do not fit each other, and second derivatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.library import CustomOpDef


def check_fits(name: str, value: Tensor, shape: Sequence[int], dtype: torch.dtype, x: Tensor) -> None:
    """Refuse a tensor that does not fit: backward operators can be called directly; kernels check nothing.

    Args:
        name: of `value`, for the message.
        value: a gradient, or a tensor that the forward pass saved.
        shape, dtype: what `value` must have.
        x: a tensor on the device where `value` must be.

    Raises:
        ValueError: `value` has another shape, dtype or device.
    """
    if tuple(value.shape) != tuple(shape) or value.dtype != dtype or value.device != x.device:
        raise ValueError(
            f"{name} does not fit its input: got {value.dtype} {tuple(value.shape)} on {value.device}, "
            f"expected {dtype} {tuple(shape)} on {x.device}"
        )


def check_parameters(name: str, x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Refuse a weight and bias that do not fit each other, or are not fp32 on the device of `x`.

    Args:
        name: of the convolution, for the message.
        x: the convolution's input.
        weight: (out channels, ...).
        bias: expected to be (out channels,).

    Raises:
        ValueError: a wrong shape, dtype or device.
    """
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}: bias must be ({len(weight)},), got {tuple(bias.shape)}")
    for argument, value in (("weight", weight), ("bias", bias)):
        if value.dtype != torch.float32 or value.device != x.device:
            raise ValueError(
                f"{name}: {argument} must be float32 on {x.device}, got {value.dtype} on {value.device}"
            )


def refuse_second_derivative(backward: CustomOpDef, message: str) -> None:
    """Make the gradient of a backward operator raise NotImplementedError with `message`."""

    def refuse(ctx: Any, *grads: Tensor) -> NoReturn:
        raise NotImplementedError(message)

    backward.register_autograd(refuse)
