# mypy: disallow-untyped-defs=False
"""Winograd's convolution on the CPU in fp32, whose precision allows tiles of up to 8x8.

Tiles of 8x8 take 5.8 times fewer products than a plain 5x5 convolution of 27x27 pixels, and tiles of 7x7 take
3.4 times fewer than a plain 3x3 convolution of 13x13. The transforms multiply by up to 5.25, which loses four
bits: too many for bf16, while in fp32 the result still has a thousandth of bf16's error.

All three transforms are one kernel, `_transform`. It multiplies each tile by a matrix from both sides and
moves it from one lattice of tiles in memory to another. The matrix is a compile-time constant: factors of 0,
1 and -1 cost no multiplication, and a block of 16 channels of a tile stays in registers and the first-level
cache. Pixels that a tile has beyond the border are read from and written to a padded copy of a few images,
so that the kernel has no special case.

`ROWS` tiles are processed at a time, so that they are still in a cache when the next step needs them: the
three steps touch ten times the memory of the pixels. The gradient of the input is the convolution of the
result's gradient with the rotated weight, so it needs no kernel of its own.
"""

from __future__ import annotations

import math
from functools import lru_cache, partial
from typing import Any

import numba
import torch
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic
from torch import Tensor

from . import winograd_reference as reference
from ._numba_simd import _FLOATS, LANES, _address, bits, jit, pointer, run
from ._winograd_numba import combination, gradients, literal_matrix

ROWS = 200  # enough for full speed of the products; twice as many only take twice the memory

_Steps = tuple[int, int, int, int, int]
"""Distances in memory from one image, row of tiles, tile, row of a tile and column of a tile to the next."""

# --- one transform ----------------------------------------------------------------------------------------


@intrinsic
def _tile(typing_context, name, outputs, taps, source, at, down, across, target, to, below, beside):
    """Transform 16 channels of a tile from both sides; its elements are at + i * down + j * across.

    Args:
        name, outputs, taps: which transform, as constants.
        source, at, down, across: an fp32 array, the tile's offset in it, and the distances between the tile's
            rows and between its columns.
        target, to, below, beside: the same for the result.
    """
    matrix = literal_matrix(name, outputs, taps)
    before, after = range(len(matrix[0])), range(len(matrix))

    def codegen(context, builder, signature, args):
        source, at, down, across, target, to, below, beside = args[3:]

        def element(start, origin, row, i, column, j):
            steps = [builder.mul(step, ir.Constant(step.type, n)) for step, n in ((row, i), (column, j))]
            return _address(builder, start, builder.add(origin, builder.add(*steps)), _FLOATS)

        columns = []
        for j in before:
            values = [builder.load(element(source, at, down, i, across, j), align=4) for i in before]
            columns.append([combination(builder, matrix[i], values) for i in after])
        for i in after:
            row = [column[i] for column in columns]
            for j in after:
                result = combination(builder, matrix[j], row)
                builder.store(result, element(target, to, below, i, beside, j), align=4)
        return context.get_dummy_value()

    n = types.intp
    return types.void(name, outputs, taps, source, n, n, n, target, n, n, n), codegen


@numba.njit(inline="always")  # before types are inferred: the constants stay constants
def _tiles(name, outputs, taps, start, stop, source, target, sizes, a, b):
    source, target = pointer(source), pointer(target)
    for line in range(start, stop):
        image, row = divmod(line, sizes[0])
        for column in range(sizes[1]):
            at = image * a[0] + row * a[1] + column * a[2]
            to = image * b[0] + row * b[1] + column * b[2]
            for c in range(0, sizes[2], LANES):
                _tile(name, outputs, taps, source, at + c, a[3], a[4], target, to + c, b[3], b[4])


@lru_cache
def _transform(name: str, outputs: int, taps: int) -> tuple[Any, Any]:
    """The kernel of a transform, for one thread and for several.

    Each works on some rows of tiles, counted through all images. `sizes` holds the rows of tiles in an image,
    the tiles in a row and the channels; `a` and `b` are the `_Steps` of source and target.
    """

    @jit()
    def serial(start, stop, source, target, sizes, a, b):
        _tiles(name, outputs, taps, start, stop, source, target, sizes, a, b)

    @jit(parallel=True)
    def parallel(tasks, count, source, target, sizes, a, b):
        for task in numba.prange(tasks):
            start, stop = task * count // tasks, (task + 1) * count // tasks
            _tiles(name, outputs, taps, start, stop, source, target, sizes, a, b)

    return serial, parallel


# --- the operator -----------------------------------------------------------------------------------------


class _Tiling:
    """The tiles of images of one size, and the steps of the algorithm for some images at a time.

    Its methods return scratch memory that the next call of the same method overwrites. Allocating it for
    every part of the batch would fragment the heap, and its pages would not be in a cache.

    Attributes:
        outputs: m of F(m, r).
        positions: positions in a tile, t^2.
        images: the number of images at a time; the last part of a batch may have fewer.
    """

    def __init__(self, x: Tensor, taps: int) -> None:
        height, width = x.shape[2:]
        self.outputs, self._taps = reference.outputs_per_tile(height, width, taps), taps
        self._tile = self.outputs + taps - 1
        self.positions = self._tile**2
        self._down, self._across = -(-height // self.outputs), -(-width // self.outputs)
        # From the last row and column to the end of the last tile's outputs
        self._below, self._right = -height % self.outputs, -width % self.outputs
        self.images = max(1, ROWS // (self._down * self._across))
        self._scratch: dict[str, Tensor] = {}

    def input(self, pixels: Tensor) -> Tensor:
        """V, (t^2, tiles, C), of pixels (images, H, W, C)."""
        return self._to_tiles("input", pixels, self._taps // 2)

    def gradient(self, pixels: Tensor) -> Tensor:
        """dM, (t^2, tiles, C), of the gradient (images, H, W, C)."""
        return self._to_tiles("gradient", pixels, 0)

    def products(self, tiles: Tensor, transformed: Tensor) -> Tensor:
        """M, (t^2, tiles, out channels), from V and U (t^2, C, out channels)."""
        out = self._buffer("products", *tiles.shape[:2], transformed.shape[2])
        return torch.bmm(tiles, transformed, out=out)

    def output(self, tiles: Tensor) -> Tensor:
        """The outputs, (images, H, W, C), from M."""
        images, channels = tiles.shape[1] // (self._down * self._across), tiles.shape[2]
        size = self._down * self.outputs, self._across * self.outputs
        pixels = self._buffer("output", images, *size, channels)
        self._run("output", images, tiles, self._steps_in_tiles(tiles), pixels, self._steps_in_pixels(pixels))
        return pixels[:, : size[0] - self._below, : size[1] - self._right]

    def _to_tiles(self, name: str, pixels: Tensor, border: int) -> Tensor:
        images, height, width, channels = pixels.shape
        size = height + 2 * border + self._below, width + 2 * border + self._right
        padded = self._buffer(f"padded {name}", images, *size, channels)
        padded[:, border : border + height, border : border + width] = pixels
        tiles = self._buffer(name, self.positions, images * self._down * self._across, channels)
        self._run(name, images, padded, self._steps_in_pixels(padded), tiles, self._steps_in_tiles(tiles))
        return tiles

    def _buffer(self, name: str, *shape: int) -> Tensor:
        """The scratch memory `name`: zeros at first, then what the last call left (padding stays zero)."""
        size = math.prod(shape)
        if name not in self._scratch:
            self._scratch[name] = torch.zeros(size, dtype=torch.float32)
        return self._scratch[name][:size].view(shape)

    def _run(self, name: str, images: int, a: Tensor, a_steps: _Steps, b: Tensor, b_steps: _Steps) -> None:
        sizes = self._down, self._across, a.shape[-1]
        kernels = _transform(name, self.outputs, self._taps)
        run(*kernels, images * self._down, bits(a), bits(b), sizes, a_steps, b_steps)

    def _steps_in_pixels(self, pixels: Tensor) -> _Steps:
        image, row, column, _ = pixels.stride()
        return image, self.outputs * row, self.outputs * column, row, column

    def _steps_in_tiles(self, tiles: Tensor) -> _Steps:
        position, tile, _ = tiles.stride()
        return self._down * self._across * tile, self._across * tile, tile, self._tile * position, position


def winograd_conv2d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As `winograd_reference.winograd_conv2d`, for fp32 and bf16 and an fp32 weight on the CPU.

    `x` is not empty, and the numbers of in and out channels are multiples of `LANES`.
    """
    tiling = _Tiling(x, weight.shape[2])
    transformed = reference.transform_weight(weight, tiling.outputs).transpose(1, 2)
    shape = len(x), len(weight), *x.shape[2:]
    out = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
    for part, part_out in reference.parts(tiling.images, x, out):
        products = tiling.products(tiling.input(part), transformed)
        torch.add(tiling.output(products), bias, out=part_out)
    return out


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    out_channels, channels, taps, _ = weight.shape
    tiling = _Tiling(x, taps)
    d_transformed = torch.zeros(tiling.positions, out_channels, channels, dtype=torch.float32)
    for part, part_grads in reference.parts(tiling.images, x, grad):
        d_transformed.baddbmm_(tiling.gradient(part_grads).transpose(1, 2), tiling.input(part))
    return reference.weight_gradient(d_transformed, tiling.outputs, taps)


winograd_conv2d_backward = partial(gradients, winograd_conv2d, _weight_gradient)
"""As `winograd_reference.winograd_conv2d_backward`, for the tensors that `winograd_conv2d` takes."""
