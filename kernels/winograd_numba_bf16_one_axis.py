# mypy: disallow-untyped-defs=False
"""Winograd's convolution on the CPU in bf16 along one axis: 2.5 times fewer products for 5x5 taps, 2 for 3x3.

Along both axes a 5x5 convolution would lose three times as much precision to bf16's rounding. So only the
columns of an image are transformed, by F(m, r); its rows are left to PyTorch's convolution, in bf16 and at
its full rate. With the matrices B, G and A of `winograd_reference`, on tiles of m + r - 1 rows, one for every
m rows of outputs:

    V = B^T d,    U = G g,    M = the 1 x r convolution of V with U,    y = A^T M

Each position in a tile has a convolution of its own. They are one grouped convolution, because the positions
lie side by side as channels:

    (images, rows of tiles, W, positions * channels)

A kernel transforms 16 channels of a column at a time, in registers in fp32, and rounds once. Some images are
processed at a time, which bounds the memory for tiles. The gradient of the input is the convolution of the
result's gradient with the rotated weight, so it needs no kernel of its own; for that of the weight, with
dM = A dy, PyTorch computes dU, and dg = G^T dU.

The tiles take 1.5 to 2 times the memory of the pixels, where `winograd_numba_bf16` takes four. That is faster
even for 3x3 taps where there are few channels, whose products cost little beside the transforms.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import numba
import torch
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic
from torch import Tensor
from torch.nn import functional as F

from . import winograd_reference as reference
from ._numba_simd import LANES, _every, bits, emit_load, emit_store, jit, pointer, run
from ._winograd_numba import combination, gradients, literal_matrix

MOST_OUTPUTS = 4  # of a tile: with more it is not faster, and rounds more
# Positions of all tiles at a time: the tiles take 17 MB for 256 channels. With fewer the products lose speed;
# with twice as many AlexNet's take 0.98 of the time, and those of ResNet-18's first layers 1.12.
POSITIONS = 2**15
NO_BIAS = torch.empty(0, dtype=torch.float32)

# --- 16 channels of a column of a tile --------------------------------------------------------------------


def _times(builder: ir.IRBuilder, step: Any, number: int) -> Any:
    return builder.mul(step, ir.Constant(step.type, number))


def _is_inside(builder: ir.IRBuilder, row: Any, i: int, height: Any) -> Any:
    # Unsigned: then a negative number is larger than the height.
    return builder.icmp_unsigned("<", builder.add(row, ir.Constant(row.type, i)), height)


@intrinsic
def _column(typing_context, name, outputs, taps, pixels, at, step, row, height, tiles, to, channels, bias, c):
    """Transform rows of a column to the positions of a tile; or, for "output", positions to rows.

    Rows outside the image count as 0, and are not written.

    Args:
        name, outputs, taps: which transform, as constants.
        pixels, at, step: an array, the offset in it of the first row, and the distance to the next.
        row, height: the number of the first row, and of rows in the image.
        tiles, to, channels: an array, the offset in it of the first position, and the distance to the next.
        bias, c: for "output", an array whose values from c on are added to each row.
    """
    matrix = literal_matrix(name, outputs, taps)
    from_tile = name.literal_value == "output"

    def codegen(context, builder, signature, args):
        pixels_start, at, step, row, height, tiles_start, to, channels, bias_start, c = args[3:]

        def position(p):
            return builder.add(to, _times(builder, channels, p))

        if from_tile:
            given = [emit_load(builder, tiles_start, position(p), tiles.dtype) for p in range(len(matrix[0]))]
            added = emit_load(builder, bias_start, c, bias.dtype)
            for i, factors in enumerate(matrix):
                result = builder.fadd(combination(builder, factors, given), added)
                with builder.if_then(_is_inside(builder, row, i, height)):
                    index = builder.add(at, _times(builder, step, i))
                    emit_store(context, builder, pixels_start, index, result, pixels.dtype)
            return context.get_dummy_value()
        first_row = builder.neg(builder.mul(row, step))  # which can be read, whatever is outside
        given = []
        for i in range(len(matrix[0])):
            is_inside = _is_inside(builder, row, i, height)
            index = builder.add(at, builder.select(is_inside, _times(builder, step, i), first_row))
            value = emit_load(builder, pixels_start, index, pixels.dtype)
            given.append(builder.select(is_inside, value, _every(ir.FloatType(), 0.0)))
        for p, factors in enumerate(matrix):
            result = combination(builder, factors, given)
            emit_store(context, builder, tiles_start, position(p), result, tiles.dtype)
        return context.get_dummy_value()

    n = types.intp
    return types.void(name, outputs, taps, pixels, n, n, n, n, tiles, n, n, bias, n), codegen


# --- kernels: each works on some rows of tiles, counted through all images, and in parallel on several ----


@numba.njit(inline="always")  # before types are inferred: the constants stay constants
def _lines(name, outputs, taps, start, stop, pixels, tiles, bias, sizes):
    height, width, channels, down, above = sizes
    pixels, tiles, bias = pointer(pixels), pointer(tiles), pointer(bias)
    positions = outputs + taps - 1
    for line in range(start, stop):
        image, tile = divmod(line, down)
        row = outputs * tile - above
        for x in range(width):
            at = ((image * height + row) * width + x) * channels
            to = (line * width + x) * positions * channels
            for c in range(0, channels, LANES):
                _column(
                    name, outputs, taps,
                    pixels, at + c, width * channels, row, height, tiles, to + c, channels, bias, c,
                )  # fmt: skip


@lru_cache
def _kernels(name: str, outputs: int, taps: int) -> tuple[Any, Any]:
    """The kernel of a transform, for one thread and for several.

    `pixels` and `tiles` are arrays of (images, H, W, C) and (images, rows of tiles, W, positions * C).
    `sizes` holds H, W, C, the rows of tiles in an image, and the rows of pixels above the first tile's
    outputs.
    """

    @jit()
    def serial(start, stop, pixels, tiles, bias, sizes):
        _lines(name, outputs, taps, start, stop, pixels, tiles, bias, sizes)

    @jit(parallel=True)
    def parallel(tasks, count, pixels, tiles, bias, sizes):
        for task in numba.prange(tasks):
            start, stop = task * count // tasks, (task + 1) * count // tasks
            _lines(name, outputs, taps, start, stop, pixels, tiles, bias, sizes)

    return serial, parallel


# --- the operator -----------------------------------------------------------------------------------------


class _Tiling:
    """The tiles of images of one size, and the steps of the algorithm for some images at a time.

    Tiles are (images, positions * channels, rows of tiles, W), channels-last.

    Args:
        x: the images, or the result's gradient.
        taps: r.

    Attributes:
        outputs: m of F(m, r).
        positions: positions in a tile, m + r - 1.
        images: the number of images at a time; the last part of a batch may have fewer.
    """

    def __init__(self, x: Tensor, taps: int) -> None:
        height, width = x.shape[2:]
        self._taps = taps
        self.outputs = outputs_per_tile(height, taps)
        self.positions = self.outputs + taps - 1
        self._down = -(-height // self.outputs)
        self.images = max(1, POSITIONS // (self._down * width * self.positions))

    def weight(self, weight: Tensor) -> Tensor:
        """U, (positions * out channels, in channels, 1, r) in bf16, from the weight in fp32."""
        side = self._side(weight)
        transformed = torch.einsum("pt,kctx->pkcx", side, weight).flatten(0, 1)[:, :, None]
        return transformed.to(torch.bfloat16, memory_format=torch.channels_last)

    def weight_gradient(self, d_transformed: Tensor) -> Tensor:
        """The gradient of the weight from dU: the transpose of `weight`."""
        positions = d_transformed[:, :, 0].unflatten(0, (self.positions, -1))
        return torch.einsum("pt,pkcx->kctx", self._side(d_transformed), positions)

    def input(self, pixels: Tensor) -> Tensor:
        """V of dense pixels (images, H, W, C)."""
        return self._to_tiles("input", pixels, self._taps // 2)

    def gradient(self, pixels: Tensor) -> Tensor:
        """dM of the dense gradient (images, H, W, C)."""
        return self._to_tiles("gradient", pixels, 0)

    def products(self, tiles: Tensor, transformed: Tensor) -> Tensor:
        """M from V and U."""
        return F.conv2d(tiles, transformed, padding=self._padding, groups=self.positions)

    def output(self, tiles: Tensor, bias: Tensor, out: Tensor) -> None:
        """Compute the outputs, dense (images, H, W, C), from M."""
        self._run("output", out, tiles, 0, bias.contiguous())

    def transformed_gradient(self, d_products: Tensor, tiles: Tensor, like: Tensor) -> Tensor:
        """dU from dM and V; `like` has the shape and dtype of U, and is not read."""
        _, gradient, _ = torch.ops.aten.convolution_backward(
            d_products, tiles, like, None, [1, 1], self._padding, [1, 1], False, [0, 0],
            self.positions, [False, True, False],
        )  # fmt: skip
        return gradient

    @property
    def _padding(self) -> list[int]:
        return [0, self._taps // 2]

    def _side(self, like: Tensor) -> Tensor:
        return reference.matrices(self.outputs, self._taps).weight.to(like)

    def _to_tiles(self, name: str, pixels: Tensor, above: int) -> Tensor:
        images, _, width, channels = pixels.shape
        tiles = pixels.new_empty(images, self._down, width, self.positions * channels).permute(0, 3, 1, 2)
        self._run(name, pixels, tiles, above)
        return tiles

    def _run(self, name: str, pixels: Tensor, tiles: Tensor, above: int, bias: Tensor = NO_BIAS) -> None:
        arrays = bits(pixels), bits(reference.pixels(tiles)), bits(bias)
        sizes = *pixels.shape[1:], self._down, above
        run(*_kernels(name, self.outputs, self._taps), len(pixels) * self._down, *arrays, sizes)


def outputs_per_tile(height: int, taps: int) -> int:
    """The m with the fewest products for this height; of equals the smallest, which rounds least."""

    def products(outputs: int) -> int:
        return -(-height // outputs) * (outputs + taps - 1)

    return min(range(2, MOST_OUTPUTS + 1), key=products)


def winograd_conv2d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As `winograd_reference.winograd_conv2d`, for bf16 and an fp32 weight on the CPU.

    `x` is not empty, and the numbers of in and out channels are multiples of `LANES`.
    """
    tiling = _Tiling(x, weight.shape[2])
    transformed = tiling.weight(weight)
    shape = len(x), len(weight), *x.shape[2:]
    out = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
    for part, part_out in reference.parts(tiling.images, x, out):
        tiling.output(tiling.products(tiling.input(part), transformed), bias, part_out)
    return out


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    out_channels, channels, taps, _ = weight.shape
    tiling = _Tiling(x, taps)
    shape = tiling.positions * out_channels, channels, 1, taps
    d_transformed = torch.zeros(shape, dtype=torch.float32)
    like = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
    for part, part_grad in reference.parts(tiling.images, x, grad):
        d_products = tiling.gradient(part_grad)
        d_transformed += tiling.transformed_gradient(d_products, tiling.input(part), like)
    return tiling.weight_gradient(d_transformed)


winograd_conv2d_backward = partial(gradients, winograd_conv2d, _weight_gradient)
"""As `winograd_reference.winograd_conv2d_backward`, for the tensors that `winograd_conv2d` takes."""
