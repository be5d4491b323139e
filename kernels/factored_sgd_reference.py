"""A step of momentum SGD from the factors of a gradient, in plain PyTorch.

The gradient of a fully connected layer's weight over N images is `output.T @ input`. A few rows of it at a
time are multiplied out and applied, so that it is never stored.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.sgd import sgd

ROWS = 128  # of a gradient that are multiplied out at a time


def gradient_rows(output: Tensor, input: Tensor, pooling: Tensor | None, start: int, stop: int) -> Tensor:
    """Return rows `start` to `stop` (exclusive) of the gradient, fp32 or wider, (stop - start, in).

    The arguments are those of `factored_sgd`.
    """
    return _widened(product_rows(output, input, pooling, start, stop))


def product_rows(output: Tensor, input: Tensor, pooling: Tensor | None, start: int, stop: int) -> Tensor:
    """Return the same rows in the dtype that they are computed in: without `pooling`, the factors'."""
    product = output[:, start:stop].t() @ input
    return product if pooling is None else upsampled(_widened(product), pooling)


def _widened(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def upsampled(rows: Tensor, pooling: Tensor | None) -> Tensor:
    """Return `rows`, (..., channels * pixels), with each channel's pixels multiplied by `pooling`."""
    if pooling is None:
        return rows
    return (rows.reshape(-1, len(pooling)) @ pooling.to(rows.dtype)).view(len(rows), -1)


def factored_sgd(
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
    """As `fastalex.kernels.factored_sgd`, in blocks of rows. The host waits for `rate` and `skip`."""
    if skip is not None and skip.item():
        return
    lr = rate.item()
    for start in range(0, len(weight), ROWS):
        stop = min(start + ROWS, len(weight))
        rows = gradient_rows(output, input, pooling, start, stop).to(weight.dtype)
        sgd(
            [weight[start:stop]],
            [rows if scale is None else rows.mul_(scale)],
            [None if velocity is None else velocity[start:stop]],
            fused=True,
            weight_decay=weight_decay,
            momentum=momentum,
            lr=lr,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )
        if copy is not None:
            copy[start:stop] = weight[start:stop]
