"""What operators say of tensors that do not belong together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_fits(name: str, value: Tensor, shape: Sequence[int], dtype: torch.dtype, x: Tensor) -> None:
    """Backward operators may be called directly: say what does not fit before a kernel reads past it.

    Args:
        name: of the value.
        value: a gradient, or what the forward pass left for it.
        shape: that it must have, as its dtype.
        dtype: see there.
        x: on whose device it must be.

    Raises:
        ValueError: if it has another.
    """
    if tuple(value.shape) != tuple(shape) or value.dtype != dtype or value.device != x.device:
        raise ValueError(
            f"{name} does not fit its input: got {value.dtype} {tuple(value.shape)} on {value.device}, "
            f"expected {dtype} {tuple(shape)} on {x.device}"
        )
