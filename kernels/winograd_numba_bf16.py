# mypy: disallow-untyped-defs=False
"""Winograd's F(2x2, 3x3) on the CPU: matrix products by PyTorch, transforms in one pass over memory each.

The products take most of the time, and the transforms must not cost what the products save. So each transform
handles 16 channels of a tile at a time, applies both its sides in registers in fp32, and rounds once. At most
`IMAGES` images are in transformed tiles at a time, because the tiles take over four times the memory of the
pixels; the backward pass transforms the input again rather than save its tiles.

If the height or width is odd, the outputs end in half a tile, whose second output is not needed. The fourth
row or column of the tile serves only that output, so these tiles do without it: 7% fewer products for 13x13.
The matrix of position (i, j) therefore has its own number of rows. All 16 matrices lie one after another:

    (images * tile rows that have an i * tile columns that have a j, channels)

Each thread owns some rows of tiles. Tiles overlap in the gradient of the input; there the owner of a tile
computes the 2x2 pixels in its middle and adds the contributions of the neighbouring tiles, so that no two
threads write the same pixel.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from . import winograd_reference as reference
from ._column_sums import column_sums
from ._numba_simd import LANES, bits, inline, jit, load, pointer, run, splat, store

f32 = np.float32
OUTPUTS, TAPS = 2, 3  # F(2x2, 3x3)
NO_BIAS = torch.empty(0, dtype=torch.float32)
# 34 MiB of tiles in bf16 for 13x13x384. With fewer than 32 the products lose more than the caches gain.
IMAGES = 64

# --- one side of each transform ---------------------------------------------------------------------------


@inline
def _input_side(a, b, c, d):
    """B^T d."""
    return a - c, b + c, c - b, b - d


@inline
def _output_side(a, b, c, d):
    """A^T m."""
    return a + b + c, b - c - d


@inline
def _gradient_side(a, b):
    """A y."""
    return a, a + b, a - b, splat(f32(0)) - b


@inline
def _pixels_side(a, b, c, d, before, after):
    """The middle two of B v, plus the overlap: the fourth of the tile before, the first of the tile after."""
    return b - c + d - before, b + c - a + after


# --- one block of 16 channels, from c, of a tile ----------------------------------------------------------
#
# at       offset of the tile in the matrix of each position
# pixel    offset of the first of its 2x2 pixels
# lines    distance from a pixel to the one below, from a tile to the one below, and the latter for the tiles'
#          fourth column
# rows     which rows exist: the one before the two, the second of the two, the one after. Without the first
#          or the last there is no tile on that side; without the second this tile has no fourth row
# columns  the same for columns
#
# Rows and columns that do not exist count as 0.


@inline
def _load_if(exists, start, at):
    return load(start, at) if exists else splat(f32(0))


@inline
def _store_row(tiles, at, i, c, columns, row):
    store(tiles, at[i] + c, row[0])
    store(tiles, at[i + 1] + c, row[1])
    store(tiles, at[i + 2] + c, row[2])
    if columns[1]:
        store(tiles, at[i + 3] + c, row[3])


@inline
def _store_pixels(pixels, to, below, channels, rows, columns, left, right):
    store(pixels, to, left[0])
    if columns[1]:
        store(pixels, to + channels, right[0])
    if rows[1]:
        store(pixels, to + below, left[1])
        if columns[1]:
            store(pixels, to + below + channels, right[1])


@inline
def _input_column(pixels, at, below, rows, exists):
    return _input_side(
        _load_if(exists and rows[0], pixels, at - below),
        _load_if(exists, pixels, at),
        _load_if(exists and rows[1], pixels, at + below),
        _load_if(exists and rows[2], pixels, at + 2 * below),
    )


@inline
def _input_tile(pixels, tiles, bias, at, pixel, c, channels, lines, rows, columns):
    a = _input_column(pixels, pixel + c - channels, lines[0], rows, columns[0])
    b = _input_column(pixels, pixel + c, lines[0], rows, True)
    d = _input_column(pixels, pixel + c + channels, lines[0], rows, columns[1])
    e = _input_column(pixels, pixel + c + 2 * channels, lines[0], rows, columns[2])
    _store_row(tiles, at, 0, c, columns, _input_side(a[0], b[0], d[0], e[0]))
    _store_row(tiles, at, 4, c, columns, _input_side(a[1], b[1], d[1], e[1]))
    _store_row(tiles, at, 8, c, columns, _input_side(a[2], b[2], d[2], e[2]))
    if rows[1]:
        _store_row(tiles, at, 12, c, columns, _input_side(a[3], b[3], d[3], e[3]))


@inline
def _gradient_column(pixels, at, below, rows, exists):
    return _gradient_side(
        _load_if(exists, pixels, at),
        _load_if(exists and rows[1], pixels, at + below),
    )


@inline
def _gradient_tile(pixels, tiles, bias, at, pixel, c, channels, lines, rows, columns):
    a = _gradient_column(pixels, pixel + c, lines[0], rows, True)
    b = _gradient_column(pixels, pixel + c + channels, lines[0], rows, columns[1])
    _store_row(tiles, at, 0, c, columns, _gradient_side(a[0], b[0]))
    _store_row(tiles, at, 4, c, columns, _gradient_side(a[1], b[1]))
    _store_row(tiles, at, 8, c, columns, _gradient_side(a[2], b[2]))
    if rows[1]:
        _store_row(tiles, at, 12, c, columns, _gradient_side(a[3], b[3]))


@inline
def _output_column(tiles, at, j, c, rows, exists):
    return _output_side(
        _load_if(exists, tiles, at[j] + c),
        _load_if(exists, tiles, at[j + 4] + c),
        _load_if(exists, tiles, at[j + 8] + c),
        _load_if(exists and rows[1], tiles, at[j + 12] + c),
    )


@inline
def _output_tile(pixels, tiles, bias, at, pixel, c, channels, lines, rows, columns):
    a = _output_column(tiles, at, 0, c, rows, True)
    b = _output_column(tiles, at, 1, c, rows, True)
    d = _output_column(tiles, at, 2, c, rows, True)
    e = _output_column(tiles, at, 3, c, rows, columns[1])
    top = _output_side(a[0], b[0], d[0], e[0])
    bottom = _output_side(a[1], b[1], d[1], e[1])
    added = load(bias, c)
    left, right = (top[0] + added, bottom[0] + added), (top[1] + added, bottom[1] + added)
    _store_pixels(pixels, pixel + c, lines[0], channels, rows, columns, left, right)


@inline
def _pixels_column(tiles, at, j, c, line, rows, exists):
    """`c` may also point into the tile before or after."""
    return _pixels_side(
        _load_if(exists, tiles, at[j] + c),
        _load_if(exists, tiles, at[j + 4] + c),
        _load_if(exists, tiles, at[j + 8] + c),
        _load_if(exists and rows[1], tiles, at[j + 12] + c),
        _load_if(exists and rows[0], tiles, at[j + 12] + c - line),
        _load_if(exists and rows[2], tiles, at[j] + c + line),
    )


@inline
def _pixels_tile(pixels, tiles, bias, at, pixel, c, channels, lines, rows, columns):
    a = _pixels_column(tiles, at, 0, c, lines[1], rows, True)
    b = _pixels_column(tiles, at, 1, c, lines[1], rows, True)
    d = _pixels_column(tiles, at, 2, c, lines[1], rows, True)
    e = _pixels_column(tiles, at, 3, c, lines[2], rows, columns[1])
    before = _pixels_column(tiles, at, 3, c - channels, lines[2], rows, columns[0])
    after = _pixels_column(tiles, at, 0, c + channels, lines[1], rows, columns[2])
    top = _pixels_side(a[0], b[0], d[0], e[0], before[0], after[0])
    bottom = _pixels_side(a[1], b[1], d[1], e[1], before[1], after[1])
    left, right = (top[0], bottom[0]), (top[1], bottom[1])
    _store_pixels(pixels, pixel + c, lines[0], channels, rows, columns, left, right)


# --- kernels: each works on some rows of tiles, counted through all images, and in parallel on several ----


@inline
def _each_tile(do, start, stop, at, pixels, tiles, bias, begin, shape):
    """Call `do` for each block of each tile. `begin` holds the offsets of the 16 matrices."""
    height, width, channels = shape
    down, across = (height + 1) // 2, (width + 1) // 2
    lines = width * channels, across * channels, width // 2 * channels
    pixels, tiles, bias = pointer(pixels), pointer(tiles), pointer(bias)
    for line in range(start, stop):
        image, row = divmod(line, down)
        rows = row > 0, 2 * row + 1 < height, 2 * row + 2 < height
        for column in range(across):
            columns = column > 0, 2 * column + 1 < width, 2 * column + 2 < width
            for i in range(4):
                for j in range(4):
                    before = (image * (height // 2) + row) if i == 3 else line
                    before = before * (width // 2 if j == 3 else across) + column
                    at[4 * i + j] = begin[4 * i + j] + before * channels
            pixel = ((image * height + 2 * row) * width + 2 * column) * channels
            for c in range(0, channels, LANES):
                do(pixels, tiles, bias, at, pixel, c, channels, lines, rows, columns)


@jit()
def _input(start, stop, pixels, tiles, bias, begin, shape):
    """Transform the input: V."""
    at = np.empty(16, np.int64)
    _each_tile(_input_tile, start, stop, at, pixels, tiles, bias, begin, shape)


@jit(parallel=True)
def _parallel_input(tasks, count, pixels, tiles, bias, begin, shape):
    for task in numba.prange(tasks):
        start, stop = task * count // tasks, (task + 1) * count // tasks
        _input(start, stop, pixels, tiles, bias, begin, shape)


@jit()
def _gradient(start, stop, pixels, tiles, bias, begin, shape):
    """Transform the gradient of the result: dM."""
    at = np.empty(16, np.int64)
    _each_tile(_gradient_tile, start, stop, at, pixels, tiles, bias, begin, shape)


@jit(parallel=True)
def _parallel_gradient(tasks, count, pixels, tiles, bias, begin, shape):
    for task in numba.prange(tasks):
        start, stop = task * count // tasks, (task + 1) * count // tasks
        _gradient(start, stop, pixels, tiles, bias, begin, shape)


@jit()
def _output(start, stop, pixels, tiles, bias, begin, shape):
    """Compute the outputs from M."""
    at = np.empty(16, np.int64)
    _each_tile(_output_tile, start, stop, at, pixels, tiles, bias, begin, shape)


@jit(parallel=True)
def _parallel_output(tasks, count, pixels, tiles, bias, begin, shape):
    for task in numba.prange(tasks):
        start, stop = task * count // tasks, (task + 1) * count // tasks
        _output(start, stop, pixels, tiles, bias, begin, shape)


@jit()
def _pixels_gradient(start, stop, pixels, tiles, bias, begin, shape):
    """Compute the gradient of the input from dV."""
    at = np.empty(16, np.int64)
    _each_tile(_pixels_tile, start, stop, at, pixels, tiles, bias, begin, shape)


@jit(parallel=True)
def _parallel_pixels_gradient(tasks, count, pixels, tiles, bias, begin, shape):
    for task in numba.prange(tasks):
        start, stop = task * count // tasks, (task + 1) * count // tasks
        _pixels_gradient(start, stop, pixels, tiles, bias, begin, shape)


# --- the operator -----------------------------------------------------------------------------------------


class _Tiles:
    """The transformed tiles of dense (N, H, W, C) `pixels`, uninitialised until `run`.

    Attributes:
        positions: the matrix of each position, a view of the tiles.
    """

    def __init__(self, pixels: Tensor) -> None:
        images, height, width, channels = pixels.shape
        down, across = ([(size + 1) // 2] * 3 + [size // 2] for size in (height, width))
        counts = [images * rows * columns for rows in down for columns in across]
        self._work = images * down[0]
        self._begin = np.cumsum([0, *counts[:-1]]) * channels
        self._pixels = pixels
        self._all = pixels.new_empty((sum(counts), channels))
        self.positions = self._all.split(counts)

    def run(self, serial: Any, parallel: Any, bias: Tensor = NO_BIAS) -> _Tiles:
        """Run a kernel: it computes the tiles from the pixels, or the pixels from the tiles. Returns self."""
        arrays = bits(self._pixels), bits(self._all), bits(bias)
        run(serial, parallel, self._work, *arrays, self._begin, tuple(self._pixels.shape[1:]))
        return self


def winograd_conv2d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As `winograd_reference.winograd_conv2d`, for fp32 and bf16 and an fp32 weight on the CPU.

    `x` is not empty, and the numbers of in and out channels are multiples of `LANES`.
    """
    transformed = reference.transform_weight(weight, OUTPUTS).to(x.dtype).transpose(1, 2)
    bias = bias.contiguous()
    shape = len(x), len(weight), *x.shape[2:]
    out = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
    for part, part_out in reference.parts(IMAGES, x, out):
        _convolve(part, part_out, transformed, bias)
    return out


def _convolve(pixels: Tensor, out: Tensor, transformed: Tensor, bias: Tensor) -> None:
    """Convolve some images. A function, so that their tiles are freed before the next are allocated."""
    tiles = _Tiles(pixels).run(_input, _parallel_input)
    products = _Tiles(out)
    for v, u, m in zip(tiles.positions, transformed, products.positions, strict=True):
        torch.mm(v, u, out=m)
    products.run(_output, _parallel_output, bias)


def winograd_conv2d_backward(
    grad: Tensor, x: Tensor, weight: Tensor, of_x: bool, of_weight: bool
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """As `winograd_reference.winograd_conv2d_backward`, for the tensors that `winograd_conv2d` takes."""
    transformed = reference.transform_weight(weight, OUTPUTS).to(x.dtype)
    d_transformed = torch.zeros(transformed.shape, dtype=torch.float32)
    d_x = torch.empty_like(x, memory_format=torch.channels_last)
    grad = grad.contiguous(memory_format=torch.channels_last)
    for part, part_grads, part_d_x in reference.parts(IMAGES, x, grad, d_x):
        d_products = _Tiles(part_grads).run(_gradient, _parallel_gradient)
        if of_x:
            _write_pixels_gradient(d_products, part_d_x, transformed)
        if of_weight:
            # All matrices at once: adding bf16 to fp32 matrix by matrix is slow.
            d_transformed += _weight_gradient_term(d_products, part, transformed).float()
    d_weight = reference.weight_gradient(d_transformed, OUTPUTS, TAPS) if of_weight else None
    return d_x if of_x else None, d_weight, column_sums(reference.pixels(grad))


def _write_pixels_gradient(d_products: _Tiles, d_pixels: Tensor, transformed: Tensor) -> None:
    """Write the gradient of some images' pixels to `d_pixels`."""
    d_tiles = _Tiles(d_pixels)
    for d_product, u, d_tile in zip(d_products.positions, transformed, d_tiles.positions, strict=True):
        torch.mm(d_product, u, out=d_tile)
    d_tiles.run(_pixels_gradient, _parallel_pixels_gradient)


def _weight_gradient_term(d_products: _Tiles, pixels: Tensor, transformed: Tensor) -> Tensor:
    """Some images' term of dU."""
    tiles = _Tiles(pixels).run(_input, _parallel_input)
    term = torch.empty_like(transformed)
    for d_product, v, d_u in zip(d_products.positions, tiles.positions, term, strict=True):
        torch.mm(d_product.t(), v, out=d_u)
    return term
