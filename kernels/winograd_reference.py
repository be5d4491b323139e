"""Winograd's F(m, r): a convolution of r x r taps with (m + r - 1)^2 products for every m x m outputs.

A plain convolution takes m^2 r^2. The padded input is cut into tiles of t x t, t = m + r - 1, that overlap by
r - 1, one for every m x m outputs. The matrices B, G and A of `matrices` are applied to the rows and the
columns of a tile d, of the weight g and of the outputs y:

    V = B^T d B,    U = G g G^T,    M = sum over in channels of U * V,    y = A^T M A

So each of the t^2 positions in a tile is one matrix product, (tiles, in channels) by (in channels, out
channels). All steps are linear, and the gradient is their transpose:

    dM = A dy A^T,    dV = sum over out channels of U * dM,    dU = sum over tiles of V * dM,
    dd = B dV B^T,    dg = G^T dU G

where an input pixel's gradient is the sum over the tiles that hold it. After Lavin and Gray, "Fast Algorithms
for Convolutional Neural Networks", arXiv:1509.09308, section 4.1. Here a matrix is applied to rows and
columns at once, as its Kronecker product with itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# Where the polynomials are evaluated: small numbers, because the matrices consist of their powers, and in
# pairs of opposite sign or inverse or both, which lose the least precision.
POINTS = (0.0, 1.0, -1.0, 2.0, -0.5, -2.0, 0.5)
LARGEST_TILE = len(POINTS) + 1
# F(6, 3) would have 1.5 times the rounding error of F(5, 3), and at these image sizes its larger transformed
# weight costs more than its fewer products save.
MOST_OUTPUTS = 5


class Matrices(NamedTuple):
    """B^T (t, t), G (t, r) and A^T (m, t), in float64."""

    input: Tensor
    weight: Tensor
    output: Tensor


@lru_cache
def matrices(outputs: int, taps: int) -> Matrices:
    """The transforms of F(m, r), by the construction of Toom and Cook.

    To multiply a polynomial of r coefficients, the taps, by one of m, evaluate both at t - 1 points and at
    infinity, multiply the values, and interpolate. The transpose of that is a correlation. After Blahut,
    "Fast Algorithms for Signal Processing", section 5.2.

    Args:
        outputs: m, on each axis.
        taps: r, on each axis; m + r - 1 is at most `LARGEST_TILE`.
    """
    points = POINTS[: outputs + taps - 2]
    infinity = len(points)
    input = torch.zeros(infinity + 1, infinity + 1, dtype=torch.float64)
    weight, output = input.new_zeros(infinity + 1, taps), input.new_zeros(outputs, infinity + 1)
    for row, point in enumerate(points):
        others = [other for other in points if other != point]
        scale = math.prod(point - other for other in others)
        powers = torch.tensor([point**power for power in range(infinity)], dtype=torch.float64)
        input[row, :infinity] = math.copysign(1, scale) * _polynomial(others)
        weight[row] = powers[:taps] / abs(scale)
        output[:, row] = powers[:outputs]
    input[infinity] = _polynomial(list(points))
    weight[infinity, -1] = output[-1, infinity] = 1
    return Matrices(input, weight, output)


def _polynomial(roots: list[float]) -> Tensor:
    """The coefficients of the product of all x - root, lowest power first."""
    coefficients = torch.ones(1, dtype=torch.float64)
    for root in roots:
        coefficients = F.pad(coefficients, (1, 0)) - root * F.pad(coefficients, (0, 1))
    return coefficients


def outputs_per_tile(height: int, width: int, taps: int) -> int:
    """The m with the fewest products for outputs of this size; of equals the smallest, which rounds least."""

    def products(outputs: int) -> int:
        tile = outputs + taps - 1
        return -(-height // outputs) * -(-width // outputs) * tile * tile

    return min(range(2, min(MOST_OUTPUTS, LARGEST_TILE - taps + 1) + 1), key=products)


def _both_sides(matrix: Tensor) -> Tensor:
    return torch.kron(matrix, matrix)


def transform_weight(weight: Tensor, outputs: int) -> Tensor:
    """U, (t^2, out channels, in channels), from the weight (out channels, in channels, r, r)."""
    side = _both_sides(matrices(outputs, weight.shape[2]).weight).to(weight)
    taps = weight.permute(2, 3, 0, 1)
    return (side @ taps.reshape(side.shape[1], -1)).view(-1, *taps.shape[2:])


def weight_gradient(d_transformed: Tensor, outputs: int, taps: int) -> Tensor:
    """The gradient of the weight from dU: the transpose of `transform_weight`."""
    side = _both_sides(matrices(outputs, taps).weight).to(d_transformed)
    gradient = side.T @ d_transformed.flatten(1)
    return gradient.view(taps, taps, *d_transformed.shape[1:]).permute(2, 3, 0, 1)


def pixels(x: Tensor) -> Tensor:
    """`x` as dense (N, H, W, C), without a copy if it is channels-last already."""
    return x.permute(0, 2, 3, 1).contiguous()


def parts(images: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """So many images of each tensor at a time, as dense (images, H, W, C)."""
    return zip(*(pixels(each).split(images) for each in tensors), strict=True)


def _missing(size: int, outputs: int) -> int:
    """The number of the last tile's outputs that lie beyond `size`."""
    return -size % outputs


def _transform_input(x: Tensor, outputs: int, taps: int) -> Tensor:
    """V: (t^2, N, tile rows, tile columns, in channels)."""
    height, width = x.shape[2:]
    before, tile = taps // 2, outputs + taps - 1
    right, below = (before + _missing(size, outputs) for size in (width, height))
    tiles = F.pad(x, (before, right, before, below)).unfold(2, tile, outputs).unfold(3, tile, outputs)
    return torch.einsum("pt,nchwt->pnhwc", _both_sides(matrices(outputs, taps).input).to(x), tiles.flatten(4))


def winograd_conv2d(x: Tensor, weight: Tensor, bias: Tensor, outputs: int | None = None) -> Tensor:
    """The operator's definition: `conv2d(x, weight, bias, padding=r // 2)`.

    The arithmetic is in weight's dtype and the result in that of x.

    Args:
        outputs: m; None takes that of `outputs_per_tile`.
    """
    (height, width), taps = x.shape[2:], weight.shape[2]
    outputs = outputs or outputs_per_tile(height, width, taps)
    transformed = _transform_input(x.to(weight.dtype), outputs, taps)
    products = torch.einsum("pnhwc,pkc->pnhwk", transformed, transform_weight(weight, outputs))
    side = _both_sides(matrices(outputs, taps).output).to(weight)
    blocks = torch.einsum("tp,pnhwk->nkhwt", side, products).unflatten(4, (outputs, outputs))
    pixels = blocks.transpose(3, 4).flatten(4).flatten(2, 3)[:, :, :height, :width]
    out = (pixels + bias[:, None, None]).to(x.dtype)
    return out.contiguous(memory_format=torch.channels_last)


def winograd_conv2d_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    of_x: bool = True,
    of_weight: bool = True,
    outputs: int | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """The gradients of x, weight and bias, each in its dtype, from that of the result.

    That of x is None without `of_x`, and that of the weight without `of_weight`.
    """
    (height, width), taps = x.shape[2:], weight.shape[2]
    outputs = outputs or outputs_per_tile(height, width, taps)
    grad = grad.to(weight.dtype)
    input, _, output = matrices(outputs, taps)
    padded = F.pad(grad, (0, _missing(width, outputs), 0, _missing(height, outputs)))
    blocks = padded.unfold(2, outputs, outputs).unfold(3, outputs, outputs).flatten(4)
    d_products = torch.einsum("tp,nkhwt->pnhwk", _both_sides(output).to(weight), blocks)
    transformed = _transform_input(x.to(weight.dtype), outputs, taps)
    d_weight = torch.einsum("pnhwk,pnhwc->pkc", d_products, transformed)
    d_input = torch.einsum("pnhwk,pkc->pnhwc", d_products, transform_weight(weight, outputs))
    d_tiles = torch.einsum("pt,pnhwc->nchwt", _both_sides(input).to(weight), d_input)
    down, across = (outputs * tiles + taps - 1 for tiles in d_tiles.shape[2:4])
    columns = d_tiles.permute(0, 1, 4, 2, 3).flatten(3).flatten(1, 2)
    folded = F.fold(columns, (down, across), kernel_size=outputs + taps - 1, stride=outputs)
    before = taps // 2
    d_x = folded[:, :, before : before + height, before : before + width].to(x.dtype)
    d_x = d_x.contiguous(memory_format=torch.channels_last)
    return (
        d_x if of_x else None,
        weight_gradient(d_weight, outputs, taps) if of_weight else None,
        grad.sum((0, 2, 3)),
    )
