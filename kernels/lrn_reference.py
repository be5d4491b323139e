"""Local response normalisation in plain PyTorch, with its closed-form gradient: the readable definition.

With v = x (or relu(x)), the window W(c) = [c - size // 2, c + (size - 1) // 2] of channels and

    d[c] = k + alpha / size * sum of v[j]^2 over j in W(c)

(Krizhevsky et al. 2012, section 3.3; PyTorch divides alpha by the window size, the paper does not), the
result and its gradient are

    y[c]  = v[c] * d[c]^-beta
    dv[c] = g[c] * d[c]^-beta - 2 * alpha * beta / size * v[c] * sum of g[j] * v[j] * d[j]^(-beta-1)

where the last sum is over every j whose window holds c. Half-precision inputs are computed in fp32 and
rounded once, on the way out. The fused implementations are tested against it and against float64
`torch.nn.functional`. It also computes the shapes that they do not take.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    """`x` in the dtype of the arithmetic: float64 for float64, else fp32."""
    return x if x.dtype == torch.float64 else x.float()


def _window_sum(v: Tensor, before: int, after: int) -> Tensor:
    """Sum over channels c - before .. c + after for every c; channels that do not exist count as 0."""
    channels = v.shape[1]
    before, after = min(before, channels - 1), min(after, channels - 1)
    padded = F.pad(v.movedim(1, -1), (before, after)).movedim(-1, 1)
    # Shifted slices, not differences of a running sum, which would spread one infinity over the whole pixel.
    return sum((padded[:, i : i + channels] for i in range(1, before + after + 1)), padded[:, :channels])


def _relu_backward(grad: Tensor, x: Tensor) -> Tensor:
    return torch.where(x <= 0, 0, grad)  # like PyTorch, a NaN input lets the gradient through


def _like(values: Tensor, x: Tensor) -> Tensor:
    """`values` in the dtype and the memory format of `x`."""
    return torch.empty_like(x).copy_(values)


def lrn_forward(x: Tensor, size: int, alpha: float, beta: float, k: float, relu: bool) -> Tensor:
    """`local_response_norm(relu(x) if relu else x)`; any rank from 3, same shape, dtype and strides out."""
    if x.numel() == 0:
        return torch.empty_like(x)
    v = _wide(x)
    v = v.relu() if relu else v
    d = k + alpha / size * _window_sum(v * v, size // 2, (size - 1) // 2)
    return _like(v / d**beta, x)


def lrn_backward(
    grad: Tensor, x: Tensor, size: int, alpha: float, beta: float, k: float, relu: bool
) -> Tensor:
    """Gradient of `lrn_forward` with respect to `x`; everything but the input is recomputed."""
    if x.numel() == 0:
        return torch.empty_like(x)
    g, v = _wide(grad), _wide(x)
    v = v.relu() if relu else v
    d = k + alpha / size * _window_sum(v * v, size // 2, (size - 1) // 2)
    scaled = g / d**beta
    # The windows that hold channel c belong to channels c - (size - 1) // 2 .. c + size // 2.
    dv = scaled - 2 * alpha * beta / size * v * _window_sum(scaled * v / d, (size - 1) // 2, size // 2)
    return _like(_relu_backward(dv, x) if relu else dv, x)


def add_bias(x: Tensor, bias: Tensor) -> Tensor:
    """`x` plus the bias of its channels, (C,), in the dtype of the arithmetic, not rounded to that of `x`."""
    wide = _wide(x)
    return torch.add(wide, bias.view(-1, 1, 1), out=torch.empty_like(wide))


def lrn_max_pool_forward(
    x: Tensor, size: int, alpha: float, beta: float, k: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`max_pool2d(local_response_norm(relu(x + bias)), 3, 2)` and the position of each maximum.

    The maximum is taken before rounding to the dtype of `x`. The second tensor is uint8, shaped like the
    first: row * 3 + column inside the 3x3 window, the first of equal maxima, the last NaN if there is any
    (as in `torch.nn.functional.max_pool2d`).
    """
    pooled_shape = [(n - 3) // 2 + 1 for n in x.shape[2:]]
    like = x[:, :, : pooled_shape[0], : pooled_shape[1]]  # its empty_like has the memory format of x
    if x.numel() == 0:
        return torch.empty_like(like), torch.empty_like(like, dtype=torch.uint8)
    biased = _wide(x) if bias is None else add_bias(x, bias)
    normalised = lrn_forward(biased, size, alpha, beta, k, True)
    pooled, index = F.max_pool2d(normalised, 3, 2, return_indices=True)
    width = x.shape[3]
    row = index // width - 2 * torch.arange(pooled_shape[0], device=x.device)[:, None]
    column = index % width - 2 * torch.arange(pooled_shape[1], device=x.device)
    return _like(pooled, like), torch.empty_like(like, dtype=torch.uint8).copy_(row * 3 + column)


def lrn_max_pool_backward(
    grad: Tensor, argmax: Tensor, x: Tensor, size: int, alpha: float, beta: float, k: float
) -> Tensor:
    """Gradient of `lrn_max_pool_forward` with respect to `x`, given that of its result and its argmax."""
    if x.numel() == 0:
        return torch.empty_like(x)
    g = _wide(grad)
    pooled_height, pooled_width = grad.shape[2:]
    spread = torch.zeros_like(x, dtype=g.dtype)
    for position in range(9):  # nine strided additions: deterministic on every device, unlike a scatter
        row, column = divmod(position, 3)
        view = spread[:, :, row : row + 2 * pooled_height - 1 : 2, column : column + 2 * pooled_width - 1 : 2]
        view += torch.where(argmax == position, g, 0)
    return _like(lrn_backward(spread, _wide(x), size, alpha, beta, k, True), x)


def lrn_max_pool_bias_backward(
    grad: Tensor, argmax: Tensor, x: Tensor, bias: Tensor, size: int, alpha: float, beta: float, k: float
) -> tuple[Tensor, Tensor]:
    """Gradients of `lrn_max_pool_forward` with respect to `x` and to `bias`."""
    dx = lrn_max_pool_backward(_wide(grad), argmax, add_bias(x, bias), size, alpha, beta, k)
    return _like(dx, x), dx.sum((0, 2, 3)).to(bias.dtype)
