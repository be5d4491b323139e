"""Local response normalisation on NVIDIA GPUs, in Triton: forward, backward, and both fused with max pooling.

**Triton in a paragraph.** A `@triton.jit` function is a kernel: Python syntax, compiled for the GPU. It is
launched over a grid of *programs*. A program is not a thread: it computes on whole blocks of values at
once, such as `tl.arange(0, BLOCK)`, and Triton distributes a block over the program's 32 x `num_warps`
threads. A value marked `tl.constexpr` is known when the kernel is compiled, so an `if` on one, or a
`tl.static_range` up to one, costs no instructions. `tl.load` and `tl.store` take a block of addresses and a
mask; where the mask is off, no memory is accessed.

**The layout.** A channels-last activation lies in memory as N x H x W x C: the channels of one position are
neighbours, and so is the window of channels that this normalisation sums over. In NCHW that window would be
spread over as many distant planes. Other layouts are therefore copied to channels-last and the result back:
8 bytes per element in bf16, where plain PyTorch moves several times that (`python -m
fastalex.kernels.inspect`).

**The formulas.** With d[c] = k + alpha / size * sum of x[j]^2 over the window of c, which runs from c -
size // 2 to c + (size - 1) // 2 (Krizhevsky et al. 2012, section 3.3; alpha over size is PyTorch's
convention), and with G the incoming gradient,

    y[c]  = x[c] * d[c]^-beta
    dx[c] = G[c] * d[c]^-beta - 2 * alpha * beta / size * x[c] * sum of G[j] * x[j] * d[j]^(-beta - 1)

where the last sum runs over the j whose window holds c. The arithmetic is fp32 whatever the tensors are.

**The kernels** take C a multiple of 8 and windows of 2 to 5 channels. They give every *lane*, an entry of the
block, a vector of 8 neighbouring channels. Eight channels of bf16 are 128 bits, the widest load of a thread.
The grid is flat over all such vectors, so that 96 channels leave no lane idle; a block padded to a power of
two would leave a quarter idle. The window of the outer channels reaches into the neighbouring vectors: small
*halo* loads, masked off at the first and the last vector of a position, fetch those (2 channels on each side
forward, 4 backward, from lines that the neighbouring lanes load anyway). A loaded (BLOCK, 8) tile is then
split into 8 *columns* (`_unzip`), each a block of one value per lane, that is, a register. Sliding the window
means reading another column: no shared memory, no shuffles between threads, no barrier. `_zip` joins the
columns for a 128-bit store.

**Pooling** (3x3 windows, stride 2, as in AlexNet). Forward, a lane walks down one pooled column, normalises
a row of three positions at a time, and keeps the row that two pooled rows share. It writes the maximum and,
in one byte, its position among the nine; the normalised activation is never written. Backward, a lane walks
down the input in quads of 2x2 positions, the step of the pooling. A quad lies under at most four pooling
windows, always in the same places, so for each position the lane *gathers* the gradient of those windows
whose maximum it was. Gathering needs no atomics, which would add in a different order in each run: every
element of dx is written once, by one lane, in a fixed order.

**A bias** of the convolution before them can be given to the pooled kernels, for which the convolution would
need a pass over its output, and its gradient, the sum of dx over all positions, a pass over dx. Forward adds
it in registers, in fp32. Backward adds it again, and each lane sums the dx that it computes, before rounding.
At its end a program adds the sums of its lanes that have the same channels and writes a row of C of them.
`torch.sum` adds the rows. There is no atomic addition, so the order is fixed. The rows are 1% of the bytes of
the backward pass with 96 channels, 3% with 256, and are read again at once, most likely from L2.

**Saved for backward**: the input, before ReLU, and the byte. ReLU, d and the powers are recomputed: they
cost a few instructions on values that must be loaded anyway, and saving them would cost memory traffic. An
H200 has the bandwidth for more: there the pooled kernels are bound by instructions in bf16 (docs/gpu.md).

**Registers** decide how many threads a GPU can keep in flight. The pooled backward needs the most. Variants
tried, with their registers in bf16 on sm_90: all four windows of a quad loaded at once, 127; one position at
a time, 85; sums of the window without sharing pairs, 77; ReLU by comparing in fp32 instead of a maximum,
which the compiler moves to packed bf16 halves, 64; loops over the windows that stay loops, so that the
loads are not all hoisted to the top, 62. Serving both positions of a row from one load of a window saves 8%
of the instructions but needs 77, and spills when capped at 64. Halving the registers doubles the threads in
flight on an H100, from a quarter of its capacity to a half. (`_POOL_BACKWARD_REGISTERS` is the cap in use.)
With a bias the sums take eight registers more, so the loop over the four positions of a quad stays a loop,
which needs 71; unrolled it needs 96, and spills when capped at 80.

**Compile time** grows with the square of the number of operations on blocks: Triton's coalescing pass
follows, from each load and store, every operation that is connected with it, and takes 90% of the time. So
what is the same for eight columns is done on the tile, where the machine code stays the same: conversion to
fp32, comparison and rounding. Powers on tiles compile in half the time, but take up to 14 registers more.

**Other channel counts and windows** are not computed here: `takes` says which tensors are, and `lrn` passes
the others to `lrn_reference`.
"""

# mypy: disable-error-code="no-untyped-def,assignment"
# (Triton's values have no types that mypy knows)
# ruff: noqa: RUF005
# (Triton concatenates tuples; it does not unpack into them)

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ._layout import empty_pixels, finish, pixels
from ._triton_launch import SIZES, KernelCase, Launch, cdiv

# ---------------------------------------------------------------- loading and storing eight channels


@triton.jit
def _unzip(tile, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """A (BLOCK, WIDTH) tile as WIDTH columns."""
    if WIDTH == 1:
        return (tl.reshape(tile, (BLOCK,)),)
    elif WIDTH == 2:
        even, odd = tl.split(tile)  # halves a last axis of two
        return (even, odd)
    else:
        even, odd = tl.split(tl.reshape(tile, (BLOCK, WIDTH // 2, 2)))
        evens = _unzip(even, BLOCK, WIDTH // 2)
        odds = _unzip(odd, BLOCK, WIDTH // 2)
        columns = ()
        for i in tl.static_range(WIDTH // 2):
            columns = columns + (evens[i], odds[i])
        return columns


@triton.jit
def _zip(columns, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """The inverse of `_unzip`."""
    if WIDTH == 2:
        return tl.join(columns[0], columns[1])
    else:
        evens = ()
        odds = ()
        for i in tl.static_range(WIDTH // 2):
            evens = evens + (columns[2 * i],)
            odds = odds + (columns[2 * i + 1],)
        pair = tl.join(_zip(evens, BLOCK, WIDTH // 2), _zip(odds, BLOCK, WIDTH // 2))
        return tl.reshape(pair, (BLOCK, WIDTH))


@triton.jit
def _load(pointer, offset, mask, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """WIDTH neighbouring channels of every lane, from `offset` on, as columns; 0 where the mask is off.

    Floats are converted to fp32, while they are one tile: fewer operations to compile.
    """
    if WIDTH == 0:
        return ()
    elif WIDTH * pointer.dtype.element_ty.primitive_bitwidth > 128:
        # Two loads of 128 bits: after one of 256 Triton rearranges the tile through shared memory.
        HALF: tl.constexpr = WIDTH // 2
        return _load(pointer, offset, mask, BLOCK, HALF) + _load(pointer, offset + HALF, mask, BLOCK, HALF)
    else:
        address = pointer + offset[:, None] + tl.arange(0, WIDTH)[None, :]
        tile = tl.load(address, mask=mask[:, None], other=0)
        if pointer.dtype.element_ty.is_floating():
            tile = tile.to(tl.float32)
        return _unzip(tile, BLOCK, WIDTH)


@triton.jit
def _store(pointer, offset, mask, tile, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Store a tile, rounding to the pointer's type."""
    if WIDTH * pointer.dtype.element_ty.primitive_bitwidth > 128:
        HALF: tl.constexpr = WIDTH // 2
        low, high = tl.split(tl.permute(tl.reshape(tile, (BLOCK, 2, HALF)), (0, 2, 1)))
        _store(pointer, offset, mask, low, BLOCK, HALF)
        _store(pointer, offset + HALF, mask, high, BLOCK, HALF)
    else:
        address = pointer + offset[:, None] + tl.arange(0, WIDTH)[None, :]
        tl.store(address, tile.to(pointer.dtype.element_ty), mask=mask[:, None])


@triton.jit
def _vector_masks(mask, group, GROUPS: tl.constexpr):
    """The masks of a vector, its left halo and its right halo. `group` numbers the C / 8 vectors."""
    return mask, mask & (group > 0), mask & (group < GROUPS - 1)


@triton.jit
def _load_with_halo(pointer, offset, masks, BLOCK: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Channels -LEFT ... 7 + RIGHT of every lane's vector, as columns."""
    # A halo is loaded a power of two wide: Triton's blocks are, and it keeps the access aligned.
    LEFT_WIDTH: tl.constexpr = triton.next_power_of_2(LEFT)
    RIGHT_WIDTH: tl.constexpr = triton.next_power_of_2(RIGHT)
    left = _load(pointer, offset - LEFT_WIDTH, masks[1], BLOCK, LEFT_WIDTH)
    middle = _load(pointer, offset, masks[0], BLOCK, 8)
    right = _load(pointer, offset + 8, masks[2], BLOCK, RIGHT_WIDTH)
    return left[LEFT_WIDTH - LEFT :] + middle + right[:RIGHT]


@triton.jit
def _load_bias(pointer, group, masks, BLOCK: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """The bias of every lane's channels, as `_load_with_halo`; no columns if there is none."""
    bias = ()
    if pointer is not None:
        bias = _load_with_halo(pointer, group * 8, masks, BLOCK, LEFT, RIGHT)
    return bias


# ---------------------------------------------------------------- the arithmetic, on columns in registers


@triton.jit
def _power(d, neg_beta, B75: tl.constexpr):
    """d^-beta. Beta = 0.75 takes two fast instructions, which give infinity for 0 and 0 for infinity.

    A negative d (from a negative k or alpha) has whole powers only; the others are NaN, as in PyTorch.
    """
    if B75:
        r = tl.rsqrt(d)
        return r * tl.sqrt(r)
    else:
        magnitude = tl.where(neg_beta == 0.0, 1.0, tl.exp2(neg_beta * tl.log2(tl.abs(d))))
        is_whole = tl.floor(neg_beta) == neg_beta
        is_even = 2.0 * tl.floor(0.5 * neg_beta) == neg_beta
        sign = tl.where(is_even, 1.0, tl.where(is_whole, -1.0, float("nan")))
        return tl.where(d < 0.0, sign, 1.0) * magnitude


@triton.jit
def _reciprocal(d, B75: tl.constexpr):
    if B75:
        r = tl.rsqrt(d)  # the one that `_power` has computed already
        return r * r
    else:
        return 1.0 / d


@triton.jit
def _window_sums(columns, COUNT: tl.constexpr, SIZE: tl.constexpr):
    """Sums of SIZE neighbouring columns, starting at each of the first COUNT."""
    sums = ()
    for i in tl.static_range(COUNT):
        total = columns[i]
        for j in tl.static_range(1, SIZE):
            total += columns[i + j]
        sums = sums + (total,)
    return sums


@triton.jit
def _normalise(
    x_pointer,
    offset,
    masks,
    bias,
    terms,
    BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    RELU: tl.constexpr,
    B75: tl.constexpr,
    BIASED: tl.constexpr,
):
    """The normalised (ReLU of) x of every lane, a tile. `terms`: alpha / size, k and -beta.

    If BIASED, `bias` is that of the channels as columns, with the halo.
    """
    alpha, k, neg_beta = terms
    LEFT: tl.constexpr = SIZE // 2
    loaded = _load_with_halo(x_pointer, offset, masks, BLOCK, LEFT, (SIZE - 1) // 2)
    x = ()
    squares = ()
    for i in tl.static_range(7 + SIZE):
        v = loaded[i]
        if BIASED:
            v += bias[i]
        if RELU:
            v = tl.maximum(v, 0.0, propagate_nan=tl.PropagateNan.ALL)
        x = x + (v,)
        squares = squares + (v * v,)
    sums = _window_sums(squares, 8, SIZE)
    y = ()
    for i in tl.static_range(8):
        y = y + (x[LEFT + i] * _power(k + alpha * sums[i], neg_beta, B75),)
    return _zip(y, BLOCK, 8)


@triton.jit
def _gradient(
    x_pointer,
    offset,
    masks,
    bias_pointer,
    group,
    grad,
    terms,
    slope,
    BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    RELU: tl.constexpr,
    B75: tl.constexpr,
):
    """dx of every lane, a tile; `grad` holds channels -RIGHT ... 7 + LEFT of G as columns.

    With a bias dx is 0 where the mask is off, for then both x and the bias are 0.
    """
    alpha, k, neg_beta = terms
    LEFT: tl.constexpr = SIZE // 2
    RIGHT: tl.constexpr = (SIZE - 1) // 2
    HALO: tl.constexpr = SIZE - 1
    loaded = _load_with_halo(x_pointer, offset, masks, BLOCK, HALO, HALO)
    bias = _load_bias(bias_pointer, group, masks, BLOCK, HALO, HALO)
    x = ()
    squares = ()
    for i in tl.static_range(8 + 2 * HALO):
        v = loaded[i]
        if bias_pointer is not None:
            v += bias[i]
        if RELU:
            v = tl.where(v < 0.0, 0.0, v)  # the same as a maximum, in fewer registers: see the docstring
        x = x + (v,)
        squares = squares + (v * v,)
    sums = _window_sums(squares, 8 + HALO, SIZE)
    scaled = ()
    ratios = ()
    for j in tl.static_range(8 + HALO):
        d = k + alpha * sums[j]
        # Channels that do not exist must add nothing; with k = 0 their d would be 0 and its power infinite.
        if j < RIGHT:
            d = tl.where(masks[1], d, 1.0)
        if j >= 8 + RIGHT:
            d = tl.where(masks[2], d, 1.0)
        w = grad[j] * _power(d, neg_beta, B75)
        scaled = scaled + (w,)
        ratios = ratios + (w * x[LEFT + j] * _reciprocal(d, B75),)
    sums = _window_sums(ratios, 8, SIZE)
    dx = ()
    for i in tl.static_range(8):
        v = x[HALO + i]
        out = scaled[RIGHT + i] - slope * v * sums[i]
        if RELU:
            out = tl.where(v == 0.0, 0.0, out)  # not v > 0: NaN passes, as in PyTorch
        dx = dx + (out,)
    return _zip(dx, BLOCK, 8)


# ---------------------------------------------------------------- kernels: local response normalisation


@triton.jit(do_not_specialize=SIZES)
def _forward_kernel(
    x_pointer,
    y_pointer,
    vectors,
    alpha,
    k,
    neg_beta,
    C: tl.constexpr,
    SIZE: tl.constexpr,
    RELU: tl.constexpr,
    B75: tl.constexpr,
    BLOCK: tl.constexpr,
):
    GROUPS: tl.constexpr = C // 8
    start = tl.program_id(0).to(tl.int64) * BLOCK  # 64 bits once a program; the lanes' offsets stay at 32
    lane = tl.arange(0, BLOCK)
    group = ((start % GROUPS).to(tl.int32) + lane) % GROUPS
    masks = _vector_masks(lane < vectors - start, group, GROUPS)
    y = _normalise(
        x_pointer + start * 8, lane * 8, masks, (), (alpha, k, neg_beta), BLOCK, SIZE, RELU, B75, False
    )
    _store(y_pointer + start * 8, lane * 8, masks[0], y, BLOCK, 8)


@triton.jit(do_not_specialize=SIZES)
def _backward_kernel(
    x_pointer,
    grad_pointer,
    dx_pointer,
    vectors,
    alpha,
    k,
    neg_beta,
    slope,
    C: tl.constexpr,
    SIZE: tl.constexpr,
    RELU: tl.constexpr,
    B75: tl.constexpr,
    BLOCK: tl.constexpr,
):
    GROUPS: tl.constexpr = C // 8
    start = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    group = ((start % GROUPS).to(tl.int32) + lane) % GROUPS
    masks = _vector_masks(lane < vectors - start, group, GROUPS)
    grad = _load_with_halo(grad_pointer + start * 8, lane * 8, masks, BLOCK, (SIZE - 1) // 2, SIZE // 2)
    terms = (alpha, k, neg_beta)
    dx = _gradient(
        x_pointer + start * 8, lane * 8, masks, None, group, grad, terms, slope, BLOCK, SIZE, RELU, B75
    )
    _store(dx_pointer + start * 8, lane * 8, masks[0], dx, BLOCK, 8)


# ---------------------------------------------------------------- kernels: with 3x3 stride-2 max pooling


@triton.jit
def _keep_larger(best, best_tap, value, tap):
    """Max pooling's comparison, on tiles: of equal values the first stays, and NaN wins."""
    larger = (value > best) | (value != value)
    return tl.where(larger, value, best), tl.where(larger, tap, best_tap)


@triton.jit
def _row_maximum(
    x_pointer,
    offset,
    masks,
    bias_pointer,
    group,
    terms,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    B75: tl.constexpr,
):
    """The largest of three neighbouring positions of a row, and which it is: 0, 1 or 2."""
    BIASED: tl.constexpr = bias_pointer is not None
    bias = _load_bias(bias_pointer, group, masks, BLOCK, SIZE // 2, (SIZE - 1) // 2)
    best = _normalise(x_pointer, offset, masks, bias, terms, BLOCK, SIZE, True, B75, BIASED)
    best_tap = tl.zeros((BLOCK, 8), tl.int32)
    for column in tl.static_range(1, 3):
        y = _normalise(x_pointer, offset + column * C, masks, bias, terms, BLOCK, SIZE, True, B75, BIASED)
        best, best_tap = _keep_larger(best, best_tap, y, column)
    return best, best_tap


@triton.jit(do_not_specialize=SIZES)
def _pool_forward_kernel(
    x_pointer,
    y_pointer,
    argmax_pointer,
    bias_pointer,
    batch,
    height,
    width,
    rows,
    alpha,
    k,
    neg_beta,
    C: tl.constexpr,
    SIZE: tl.constexpr,
    B75: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A lane: one vector of channels, down `rows` pooled rows of one pooled column."""
    GROUPS: tl.constexpr = C // 8
    pooled_height = (height - 3) // 2 + 1
    pooled_width = (width - 3) // 2 + 1
    strips = (pooled_height + rows - 1) // rows
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    group = lane % GROUPS
    column = lane // GROUPS % pooled_width
    first_row = lane // (GROUPS * pooled_width) % strips * rows
    image = (lane // (GROUPS * pooled_width * strips)).to(tl.int64)
    inside = image < batch
    source = image * (height * width * C) + ((2 * first_row * width + 2 * column) * C + group * 8)
    target = image * (pooled_height * pooled_width * C) + (
        (first_row * pooled_width + column) * C + group * 8
    )
    terms = (alpha, k, neg_beta)
    masks = _vector_masks(inside, group, GROUPS)
    best, best_tap = _row_maximum(x_pointer, source, masks, bias_pointer, group, terms, C, BLOCK, SIZE, B75)
    for row in range(rows):
        masks = _vector_masks(inside & (first_row + row < pooled_height), group, GROUPS)
        middle, middle_tap = _row_maximum(
            x_pointer, source + width * C, masks, bias_pointer, group, terms, C, BLOCK, SIZE, B75
        )
        best, best_tap = _keep_larger(best, best_tap, middle, middle_tap + 3)
        last, last_tap = _row_maximum(
            x_pointer, source + 2 * width * C, masks, bias_pointer, group, terms, C, BLOCK, SIZE, B75
        )
        best, best_tap = _keep_larger(best, best_tap, last, last_tap + 6)
        _store(y_pointer, target, masks[0], best, BLOCK, 8)
        _store(argmax_pointer, target, masks[0], best_tap, BLOCK, 8)
        best = last  # the row that the next window begins with
        best_tap = last_tap
        source += 2 * width * C
        target += pooled_width * C


@triton.jit
def _pooled_gradient(
    grad_pointer,
    argmax_pointer,
    pooled,
    quad,
    inside,
    group,
    pooled_height,
    pooled_width,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    ROW,
    COLUMN,
):
    """The gradient of position (ROW, COLUMN) of a quad, from the windows whose maximum it was, with the halo.

    Pooling window (r, c) begins at the first position of quad (r, c), so a quad's even rows lie under the
    windows of its own row and the one above (where they are the third row), its odd rows under its own only;
    columns likewise. `pooled` is the offset of the window that begins in the quad.
    """
    BEFORE: tl.constexpr = (SIZE - 1) // 2
    AFTER: tl.constexpr = SIZE // 2
    zero = tl.zeros((BLOCK,), tl.float32)
    total = ()
    for _ in tl.static_range(7 + SIZE):
        total = total + (zero,)
    # Loops, not static ranges: unrolled, the loads of all windows move to the top and fill the registers.
    for up in range(2 - ROW):
        for back in range(2 - COLUMN):
            y = quad[0] - up
            x = quad[1] - back
            exists = (y >= 0) & (y < pooled_height) & (x >= 0) & (x < pooled_width)
            masks = _vector_masks(inside & exists, group, C // 8)
            offset = pooled - (up * pooled_width + back) * C
            grad = _load_with_halo(grad_pointer, offset, masks, BLOCK, BEFORE, AFTER)
            argmax = _load_with_halo(argmax_pointer, offset, masks, BLOCK, BEFORE, AFTER)
            tap = (ROW + 2 * up) * 3 + COLUMN + 2 * back
            added = ()
            for i in tl.static_range(7 + SIZE):
                added = added + (tl.where(argmax[i] == tap, total[i] + grad[i], total[i]),)
            total = added
    return total


@triton.jit
def _position(
    x_pointer,
    grad_pointer,
    argmax_pointer,
    dx_pointer,
    bias_pointer,
    source,
    pooled,
    quad,
    inside,
    group,
    sizes,
    terms,
    slope,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    B75: tl.constexpr,
    ROW,
    COLUMN,
):
    """Store dx of position (ROW, COLUMN) of a quad, and return it, a tile."""
    height, width, pooled_height, pooled_width = sizes
    grad = _pooled_gradient(
        grad_pointer, argmax_pointer, pooled, quad, inside, group,
        pooled_height, pooled_width, C, BLOCK, SIZE, ROW, COLUMN,
    )  # fmt: skip
    exists = (2 * quad[0] + ROW < height) & (2 * quad[1] + COLUMN < width)
    masks = _vector_masks(inside & exists, group, C // 8)
    offset = source + (ROW * width + COLUMN) * C
    dx = _gradient(x_pointer, offset, masks, bias_pointer, group, grad, terms, slope, BLOCK, SIZE, True, B75)
    _store(dx_pointer, offset, masks[0], dx, BLOCK, 8)
    return dx


@triton.jit
def _store_sums(sums_pointer, tile, C: tl.constexpr, BLOCK: tl.constexpr):
    """Sum a tile over the program's lanes of the same channels, into its row of (programs, C)."""
    GROUPS: tl.constexpr = C // 8
    SLOTS: tl.constexpr = triton.next_power_of_2(GROUPS)
    TIMES: tl.constexpr = triton.next_power_of_2((BLOCK + GROUPS - 1) // GROUPS)
    # Lanes slot, slot + GROUPS, slot + 2 * GROUPS ... have the same channels. `tl.gather` moves them from
    # thread to thread: through shared memory, but once in a program.
    row = tl.arange(0, TIMES * SLOTS)
    slot = row % SLOTS
    lane = row // SLOTS * GROUPS + slot
    exists = (slot < GROUPS) & (lane < BLOCK)
    index = tl.broadcast_to(tl.where(exists, lane, 0)[:, None], (TIMES * SLOTS, 8))
    found = tl.where(exists[:, None], tl.gather(tile, index, 0), 0.0)
    sums = tl.sum(tl.reshape(found, (TIMES, SLOTS, 8)), 0)
    program = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, SLOTS)
    group = ((program * BLOCK % GROUPS).to(tl.int32) + slot) % GROUPS
    offset = program * C + (group * 8)[:, None] + tl.arange(0, 8)[None, :]
    tl.store(sums_pointer + offset, sums, mask=(slot < GROUPS)[:, None])


@triton.jit(do_not_specialize=SIZES)
def _pool_backward_kernel(
    x_pointer,
    grad_pointer,
    argmax_pointer,
    dx_pointer,
    bias_pointer,
    sums_pointer,
    batch,
    height,
    width,
    rows,
    alpha,
    k,
    neg_beta,
    slope,
    C: tl.constexpr,
    SIZE: tl.constexpr,
    B75: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A lane: one vector of channels, down `rows` quads of 2x2 input positions.

    With a bias, `sums_pointer` receives the sums of dx over the program's positions, a row of C per program.
    """
    GROUPS: tl.constexpr = C // 8
    pooled_height = (height - 3) // 2 + 1
    pooled_width = (width - 3) // 2 + 1
    quads = (width + 1) // 2  # in a row
    strips = ((height + 1) // 2 + rows - 1) // rows
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    group = lane % GROUPS
    quad_x = lane // GROUPS % quads
    quad_y = lane // (GROUPS * quads) % strips * rows
    image = (lane // (GROUPS * quads * strips)).to(tl.int64)
    inside = image < batch
    source = image * (height * width * C) + ((2 * quad_y * width + 2 * quad_x) * C + group * 8)
    pooled = image * (pooled_height * pooled_width * C) + ((quad_y * pooled_width + quad_x) * C + group * 8)
    sizes = (height, width, pooled_height, pooled_width)
    terms = (alpha, k, neg_beta)
    sums = tl.zeros((BLOCK, 8), tl.float32)
    for _ in range(rows):
        if bias_pointer is None:
            for position in tl.static_range(4):
                _position(
                    x_pointer, grad_pointer, argmax_pointer, dx_pointer, None,
                    source, pooled, (quad_y, quad_x), inside, group, sizes, terms, slope,
                    C, BLOCK, SIZE, B75, position // 2, position % 2,
                )  # fmt: skip
        else:
            for position in range(4):  # not a static range: see "Registers" in the docstring
                sums += _position(
                    x_pointer, grad_pointer, argmax_pointer, dx_pointer, bias_pointer,
                    source, pooled, (quad_y, quad_x), inside, group, sizes, terms, slope,
                    C, BLOCK, SIZE, B75, position // 2, position % 2,
                )  # fmt: skip
        quad_y += 1
        source += 2 * width * C
        pooled += pooled_width * C
    if bias_pointer is not None:
        _store_sums(sums_pointer, sums, C, BLOCK)


# ---------------------------------------------------------------- what to launch, on channels-last tensors

# Fixed, not autotuned: compiling and timing alternatives would cost every process a minute before its first
# step. On an H200 blocks of 64 to 256 lanes differ by less than a tenth, and these are the fastest of 2 to 27
# rows.
_BLOCK, _WARPS = 128, 4  # one vector per thread
_FORWARD_ROWS, _BACKWARD_ROWS = 3, 2  # in a lane's strip
# For the pooled backward. Without a cap ptxas aims, on some GPUs, for too few registers and spills the rest.
# 72 is the lowest cap, in steps of eight, that prevents it. With 64, bf16 spills on sm_86 and sm_89 with
# Triton 3.6, and fp16 on sm_90 and sm_100 with 3.8; bf16 on an H200 does not spill and is up to 3% faster.
_POOL_BACKWARD_REGISTERS = 72


def _launch(kernel: Any, lanes: int, arguments: dict[str, Any], maxnreg: int | None = None) -> Launch:
    return Launch(kernel, cdiv(lanes, _BLOCK), {**arguments, "BLOCK": _BLOCK}, _WARPS, maxnreg)


def takes(x: Tensor, size: int) -> bool:
    """Whether the kernels of this module compute the result for `x`, (N, C, ...), and a window of `size`."""
    # Offsets within an image are 32 bits wide.
    return x.numel() > 0 and x.shape[1] % 8 == 0 and 2 <= size <= 5 and x[0].numel() < 2**31


def _scalars(size: int, alpha: float, beta: float, k: float) -> dict[str, float | bool]:
    """The numbers that every kernel takes."""
    return {"alpha": alpha / size, "k": float(k), "neg_beta": -float(beta), "B75": beta == 0.75}


def _slope(size: int, alpha: float, beta: float) -> float:
    """The factor of the gradient's second term."""
    return 2 * alpha * beta / size


def _forward(x: Tensor, y: Tensor, size: int, alpha: float, beta: float, k: float, relu: bool) -> Launch:
    vectors = x.numel() // 8
    arguments = {
        "x_pointer": x,
        "y_pointer": y,
        "vectors": vectors,
        "C": x.shape[-1],
        "SIZE": size,
        "RELU": relu,
        **_scalars(size, alpha, beta, k),
    }
    return _launch(_forward_kernel, vectors, arguments)


def _backward(
    grad: Tensor, x: Tensor, dx: Tensor, size: int, alpha: float, beta: float, k: float, relu: bool
) -> list[Launch]:
    vectors = x.numel() // 8
    arguments = {
        "x_pointer": x,
        "grad_pointer": grad,
        "dx_pointer": dx,
        "vectors": vectors,
        "slope": _slope(size, alpha, beta),
        "C": x.shape[-1],
        "SIZE": size,
        "RELU": relu,
        **_scalars(size, alpha, beta, k),
    }
    return [_launch(_backward_kernel, vectors, arguments)]


def _pool_forward(
    x: Tensor,
    y: Tensor,
    argmax: Tensor,
    size: int,
    alpha: float,
    beta: float,
    k: float,
    bias: Tensor | None = None,
) -> Launch:
    batch, height, width, channels = x.shape
    arguments = {
        "x_pointer": x,
        "y_pointer": y,
        "argmax_pointer": argmax,
        "bias_pointer": bias,
        "batch": batch,
        "height": height,
        "width": width,
        "rows": _FORWARD_ROWS,
        "C": channels,
        "SIZE": size,
        **_scalars(size, alpha, beta, k),
    }
    strips = batch * cdiv(y.shape[1], _FORWARD_ROWS) * y.shape[2]
    return _launch(_pool_forward_kernel, strips * (channels // 8), arguments)


def _pool_backward(
    grad: Tensor,
    argmax: Tensor,
    x: Tensor,
    dx: Tensor,
    size: int,
    alpha: float,
    beta: float,
    k: float,
    bias: Tensor | None = None,
) -> list[Launch]:
    batch, height, width, channels = x.shape
    strips = batch * cdiv((height + 1) // 2, _BACKWARD_ROWS) * ((width + 1) // 2)
    lanes = strips * (channels // 8)
    sums = None
    if bias is not None:
        sums = torch.empty(cdiv(lanes, _BLOCK), channels, dtype=torch.float32, device=x.device)
    arguments = {
        "x_pointer": x,
        "grad_pointer": grad,
        "argmax_pointer": argmax,
        "dx_pointer": dx,
        "bias_pointer": bias,
        "sums_pointer": sums,
        "batch": batch,
        "height": height,
        "width": width,
        "rows": _BACKWARD_ROWS,
        "slope": _slope(size, alpha, beta),
        "C": channels,
        "SIZE": size,
        **_scalars(size, alpha, beta, k),
    }
    return [_launch(_pool_backward_kernel, lanes, arguments, _POOL_BACKWARD_REGISTERS)]


# ---------------------------------------------------------------- the four functions


def lrn_forward(x: Tensor, size: int, alpha: float, beta: float, k: float, relu: bool) -> Tensor:
    """Local response normalisation of `x`, or of relu(x).

    x: (N, C, ...), 3-D to 5-D, fp32, bf16 or fp16, any strides, as `takes` says. alpha is divided by `size`,
    as PyTorch does. Returns a tensor like `torch.empty_like(x)`.
    """
    out = torch.empty_like(x)
    y = empty_pixels(out)
    _forward(pixels(x), y, size, alpha, beta, k, relu).run()
    return finish(out, y)


def lrn_backward(
    grad: Tensor, x: Tensor, size: int, alpha: float, beta: float, k: float, relu: bool
) -> Tensor:
    """Gradient of `lrn_forward` with respect to `x`, given that of its result, `grad` (the shape of `x`)."""
    out = torch.empty_like(x)
    dx = empty_pixels(out)
    for launch in _backward(pixels(grad), pixels(x), dx, size, alpha, beta, k, relu):
        launch.run()
    return finish(out, dx)


def lrn_max_pool_forward(
    x: Tensor, size: int, alpha: float, beta: float, k: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`max_pool2d(lrn(relu(x + bias)), kernel_size=3, stride=2)`.

    x: (N, C, H, W) with H and W at least 3. bias: (C,), fp32 or the dtype of x. Returns the pooled result
    and a uint8 tensor of the same shape and strides, the position of the maximum in its window: 3 * row +
    column, the first of equals.
    """
    like = x[:, :, : (x.shape[2] - 3) // 2 + 1, : (x.shape[3] - 3) // 2 + 1]
    out, argmax = torch.empty_like(like), torch.empty_like(like, dtype=torch.uint8)
    y, argmax_pixels = empty_pixels(out), empty_pixels(argmax)
    bias = None if bias is None else bias.contiguous()
    _pool_forward(pixels(x), y, argmax_pixels, size, alpha, beta, k, bias).run()
    return finish(out, y), finish(argmax, argmax_pixels)


def lrn_max_pool_backward(
    grad: Tensor, argmax: Tensor, x: Tensor, size: int, alpha: float, beta: float, k: float
) -> Tensor:
    """Gradient of `lrn_max_pool_forward` with respect to `x`, given that of its result and its argmax."""
    out = torch.empty_like(x)
    dx = empty_pixels(out)
    for launch in _pool_backward(pixels(grad), pixels(argmax), pixels(x), dx, size, alpha, beta, k):
        launch.run()
    return finish(out, dx)


def lrn_max_pool_bias_backward(
    grad: Tensor, argmax: Tensor, x: Tensor, bias: Tensor, size: int, alpha: float, beta: float, k: float
) -> tuple[Tensor, Tensor]:
    """Gradients of `lrn_max_pool_forward` with respect to `x` and `bias`. The second is summed in fp32."""
    out = torch.empty_like(x)
    dx = empty_pixels(out)
    arguments = pixels(grad), pixels(argmax), pixels(x), dx, size, alpha, beta, k, bias.contiguous()
    (launch,) = _pool_backward(*arguments)
    launch.run()
    return finish(out, dx), launch.tensors["sums_pointer"].sum(0).to(bias.dtype)


# ---------------------------------------------------------------- for `inspect`

_PAPER: dict[str, Any] = {"size": 5, "alpha": 5e-4, "beta": 0.75, "k": 2.0}
_CHANNELS = 96


def inspect_cases(quick: bool = False) -> list[KernelCase]:
    """The kernels at the shape of AlexNet's first normalisation; the pooled ones also with a bias."""
    height = 31 if quick else 55
    pooled = (height - 3) // 2 + 1

    def activation(dtype: torch.dtype, batch: int, device: torch.device, size: int = height) -> Tensor:
        if device.type == "meta":
            return torch.empty(batch, size, size, _CHANNELS, dtype=dtype, device=device)
        return torch.randn(batch, size, size, _CHANNELS).to(dtype)

    def parameter(device: torch.device) -> Tensor:
        return torch.zeros(_CHANNELS, device=device)

    def forward(dtype: torch.dtype, batch: int, device: torch.device) -> Launch:
        x = activation(dtype, batch, device)
        return _forward(x, torch.empty_like(x), **_PAPER, relu=True)

    def backward(dtype: torch.dtype, batch: int, device: torch.device) -> Launch:
        x = activation(dtype, batch, device)
        return _backward(torch.ones_like(x), x, torch.empty_like(x), **_PAPER, relu=True)[0]

    def pool_forward(dtype: torch.dtype, batch: int, device: torch.device, biased: bool = False) -> Launch:
        y = activation(dtype, batch, device, pooled)
        argmax = torch.zeros_like(y, dtype=torch.uint8)
        bias = parameter(device) if biased else None
        return _pool_forward(activation(dtype, batch, device), y, argmax, **_PAPER, bias=bias)

    def pool_backward(dtype: torch.dtype, batch: int, device: torch.device, biased: bool = False) -> Launch:
        x = activation(dtype, batch, device)
        grad = activation(dtype, batch, device, pooled)
        argmax = torch.zeros_like(grad, dtype=torch.uint8)
        bias = parameter(device) if biased else None
        return _pool_backward(grad, argmax, x, torch.empty_like(x), **_PAPER, bias=bias)[0]

    def eager(
        pools: bool, backwards: bool, biased: bool
    ) -> Callable[[torch.dtype, int], Callable[[], object]]:
        def prepare(dtype: torch.dtype, batch: int) -> Callable[[], object]:
            x = torch.empty(batch, _CHANNELS, height, height, dtype=dtype, device="meta")
            x = x.to(memory_format=torch.channels_last).requires_grad_()
            bias = torch.empty(_CHANNELS, 1, 1, dtype=dtype, device="meta", requires_grad=True)

            def run() -> Tensor:
                y = F.local_response_norm(F.relu(x + bias if biased else x), **_PAPER)
                return F.max_pool2d(y, 3, 2) if pools else y

            if not backwards:
                return run
            y = run()
            grad = torch.empty_like(y)
            return lambda: y.backward(grad)

        return prepare

    def case(
        name: str, launch: Callable[..., Launch], writes: tuple[str, ...], **promises: Any
    ) -> KernelCase:
        return KernelCase(
            name=name,
            launch=launch,
            writes=tuple(f"{tensor}_pointer" for tensor in writes),
            elements="x_pointer",
            eager=eager("pool" in name, "backward" in name, "bias" in name),
            **promises,
        )

    return [
        case("relu_lrn forward", forward, ("y",), traffic_limit=1.05, vector_loads=1, vector_stores=1),
        case("relu_lrn backward", backward, ("dx",), traffic_limit=1.05, vector_loads=2, vector_stores=1),
        case(
            "relu_lrn_max_pool forward", pool_forward, ("y", "argmax"),
            traffic_limit=1.25, vector_loads=9, vector_stores=1, narrowest_store=64,
        ),
        case(
            "relu_lrn_max_pool backward", pool_backward, ("dx",),
            traffic_limit=1.25, vector_loads=8, vector_stores=4,
        ),
        case(
            "bias_relu_lrn_max_pool forward", partial(pool_forward, biased=True), ("y", "argmax"),
            traffic_limit=1.25, vector_loads=11, vector_stores=1, narrowest_store=64,
        ),
        # The sums are stored in lines of 4 * C bytes, but by more threads than have 128 bits each.
        case(
            "bias_relu_lrn_max_pool backward", partial(pool_backward, biased=True), ("dx", "sums"),
            traffic_limit=1.25, vector_loads=3, vector_stores=1, narrowest_store=32,
        ),
    ]  # fmt: skip
