"""What all operators refuse: gradients that do not fit their input, and second derivatives."""

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


def refuse_second_derivative(backward: CustomOpDef, message: str) -> None:
    """Make the gradient of a backward operator raise NotImplementedError with `message`."""

    def refuse(ctx: Any, *grads: Tensor) -> NoReturn:
        raise NotImplementedError(message)

    backward.register_autograd(refuse)
