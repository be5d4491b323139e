"""Winograd's F(2x2, 3x3): a 3x3 convolution with 16 products for every 2x2 outputs instead of 36.

The padded input is cut into tiles of 4x4 that overlap by two, one for every 2x2 outputs. With the matrices
below, on the rows and on the columns of a tile d, of a weight's 3x3 g and of the outputs y,

    V = B^T d B,    U = G g G^T,    M = sum over in channels of U * V,    y = A^T M A

so that each of the 16 positions in a tile is a matrix product of its own, (tiles, in channels) by (in
channels, out channels). All of it is linear, and its gradient the same backwards:

    dM = A dy A^T,    dV = sum over out channels of U * dM,    dU = sum over tiles of V * dM,
    dd = B dV B^T,    dg = G^T dU G

where an input pixel's gradient is the sum over the up to four tiles it is in. After Lavin and Gray, "Fast
Algorithms for Convolutional Neural Networks", arXiv:1509.09308, section 4.1. Here a matrix is applied to
rows and columns at once, as its Kronecker product with itself.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def _both_sides(matrix: list[list[float]]) -> Tensor:
    one_side = torch.tensor(matrix, dtype=torch.float64)
    return torch.kron(one_side, one_side)


INPUT = _both_sides([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]])  # B^T
WEIGHT = _both_sides([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])  # G
OUTPUT = _both_sides([[1, 1, 1, 0], [0, 1, -1, -1]])  # A^T


def transform_weight(weight: Tensor) -> Tensor:
    """U: (16, out channels, in channels), of the weight (out channels, in channels, 3, 3)."""
    taps = weight.permute(2, 3, 0, 1)
    return (WEIGHT.to(weight) @ taps.reshape(9, -1)).view(16, *taps.shape[2:])


def weight_gradient(d_transformed: Tensor) -> Tensor:
    """The gradient of the weight from dU: the transpose of `transform_weight`."""
    channels = d_transformed.shape[1:]
    taps = WEIGHT.to(d_transformed).T @ d_transformed.flatten(1)
    return taps.view(3, 3, *channels).permute(2, 3, 0, 1)


def _transform_input(x: Tensor) -> Tensor:
    """V: (16, N, tile rows, tile columns, in channels)."""
    height, width = x.shape[2:]
    padded = F.pad(x, (1, 1 + width % 2, 1, 1 + height % 2))
    tiles = padded.unfold(2, 4, 2).unfold(3, 4, 2)
    return torch.einsum("pt,nchwt->pnhwc", INPUT.to(x), tiles.flatten(4))


def winograd_conv2d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The operator's definition: `conv2d(x, weight, bias, padding=1)` in weight's dtype, returned in x's."""
    height, width = x.shape[2:]
    products = torch.einsum(
        "pnhwc,pkc->pnhwk", _transform_input(x.to(weight.dtype)), transform_weight(weight)
    )
    pairs = torch.einsum("tp,pnhwk->nkhwt", OUTPUT.to(weight), products).unflatten(4, (2, 2))
    pixels = pairs.transpose(3, 4).flatten(4).flatten(2, 3)[:, :, :height, :width]
    out = (pixels + bias[:, None, None]).to(x.dtype)
    return out.contiguous(memory_format=torch.channels_last)


def winograd_conv2d_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, in its dtype, and of weight and bias, in theirs, from that of the result."""
    height, width = x.shape[2:]
    grad = grad.to(weight.dtype)
    pairs = F.pad(grad, (0, width % 2, 0, height % 2)).unfold(2, 2, 2).unfold(3, 2, 2)
    d_products = torch.einsum("tp,nkhwt->pnhwk", OUTPUT.to(weight), pairs.flatten(4))
    d_weight = torch.einsum("pnhwk,pnhwc->pkc", d_products, _transform_input(x.to(weight.dtype)))
    d_input = torch.einsum("pnhwk,pkc->pnhwc", d_products, transform_weight(weight))
    d_tiles = torch.einsum("pt,pnhwc->nchwt", INPUT.to(weight), d_input)
    size = 2 * d_tiles.shape[2] + 2, 2 * d_tiles.shape[3] + 2
    columns = d_tiles.permute(0, 1, 4, 2, 3).flatten(3).flatten(1, 2)
    d_x = F.fold(columns, size, kernel_size=4, stride=2)[:, :, 1 : height + 1, 1 : width + 1].to(x.dtype)
    d_x = d_x.contiguous(memory_format=torch.channels_last)
    return d_x, weight_gradient(d_weight), grad.sum((0, 2, 3))
