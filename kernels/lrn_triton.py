"""Local response normalisation on NVIDIA GPUs, in Triton: forward, backward, and both fused with max pooling.

**Triton in a paragraph.** A `@triton.jit` function is a kernel: Python syntax, compiled for the GPU. It is
launched over a grid of *programs*. A program is not a thread: it computes on whole blocks of values at once,
such as `tl.arange(0, BLOCK)`, and Triton deals a block out over the program's 32 x `num_warps` threads. A value
marked `tl.constexpr` is known when the kernel is compiled, so an `if` on one, or a `tl.static_range` up to one,
leaves nothing behind in the machine code. `tl.load` and `tl.store` take a block of addresses and a mask; where
the mask is off nothing is touched. `@triton.autotune` times the listed block sizes at the first call and keeps
the fastest.

**The layout.** A channels-last activation lies in memory as N x H x W x C: the channels of one position are
neighbours, and so is the window of channels that this normalisation sums over. In NCHW that window would be
spread over as many distant planes. Other layouts are therefore copied to channels-last and the result back: 8
bytes an element in bf16, where plain PyTorch moves several times that (`python -m fastalex.kernels.inspect`).

**The formulas.** With d[c] = k + alpha / size * sum of x[j]^2 over the window of c, which runs from
c - size // 2 to c + (size - 1) // 2 (Krizhevsky et al. 2012, section 3.3; alpha over size is PyTorch's
convention), and with G the incoming gradient,

    y[c]  = x[c] * d[c]^-beta
    dx[c] = G[c] * d[c]^-beta - 2 * alpha * beta / size * x[c] * sum of G[j] * x[j] * d[j]^(-beta - 1)

where the last sum runs over the j whose window holds c. The arithmetic is fp32 whatever the tensors are.

**The fast kernels** (C a multiple of 8, windows of 2 to 5 channels) give every *lane*, an entry of the block,
a vector of 8 neighbouring channels. Eight channels of bf16 are 128 bits, the widest load a thread has; the grid
is flat over all such vectors, so that 96 channels leave no lane idle, where a block padded to a power of two
would idle a quarter. The window of the outer channels reaches into the neighbouring vectors: small *halo* loads,
masked off at the first and the last vector of a position, fetch those (2 channels a side forward, 4 backward,
from lines that the neighbouring lanes load anyway). A loaded (BLOCK, 8) tile is then split into 8 *columns*
(`_unzip`), each a block of one value a lane, that is, a register. Sliding the window means naming another column:
no shared memory, no shuffles between threads, no barrier. `_zip` joins the columns for a 128-bit store.

**Pooling** (3x3 windows, stride 2, as in AlexNet). Forward, a lane walks down one pooled column, normalises a row
of three positions at a time, and keeps the row that two pooled rows share. It writes the maximum and, in one
byte, which of the nine won; the normalised activation is never written. Backward, a lane walks down the input
in quads of 2x2 positions, the step of the pooling. A quad lies under at most four pooling windows, always in the
same places, so for each position the lane *gathers* the gradient of those windows whose winner it was. Gathering
is why there are no atomics, which would add in a different order each run: every element of dx is written once,
by one lane, in a fixed order.

**Saved for backward**: the input, before ReLU, and the byte. ReLU, d and the powers are recomputed: they cost a
few instructions on values that must be loaded anyway, and saving them would cost memory traffic, which is what
these kernels are bound by.

**Registers** decide how many threads a GPU can keep in flight. What was tried for the pooled backward, the
hungriest (bf16, sm_90): all four windows of a quad loaded at once 127; one position at a time 85; sums of the
window without sharing pairs 77; ReLU by comparing in fp32 instead of a maximum, which the compiler moves to
packed bf16 halves, 64; loops over the windows that stay loops, so that the loads are not all hoisted to the top,
62. Serving both positions of a row from one load of a window saves 8% of the instructions but needs 77; a cap at
64 (`maxnreg`) spills for all but the last.

**Everything else** (other channel counts, other windows) takes the plain kernels at the end: a lane an element,
a loop over the window, loads that the cache serves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ._triton_launch import Grid, KernelCase, Launch

# --------------------------------------------------------------------------- loading and storing eight channels


@triton.jit
def _unzip(tile, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """A (BLOCK, WIDTH) tile as WIDTH columns. `tl.split` halves a last axis of 2: even columns, odd columns."""
    if WIDTH == 1:
        return (tl.reshape(tile, (BLOCK,)),)
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
    if WIDTH == 1:
        return tl.reshape(columns[0], (BLOCK, 1))
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
    """WIDTH neighbouring channels of every lane, from `offset`, as WIDTH columns; 0 where the mask is off."""
    if WIDTH == 0:
        return ()
    elif WIDTH * pointer.dtype.element_ty.primitive_bitwidth > 128:
        # Two loads of 128 bits: one of 256 would make Triton rearrange the tile through shared memory.
        return _load(pointer, offset, mask, BLOCK, WIDTH // 2) + _load(
            pointer, offset + WIDTH // 2, mask, BLOCK, WIDTH // 2
        )
    else:
        address = pointer + offset[:, None] + tl.arange(0, WIDTH)[None, :]
        return _unzip(tl.load(address, mask=mask[:, None], other=0), BLOCK, WIDTH)


@triton.jit
def _store(pointer, offset, mask, columns, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """The inverse of `_load`, rounding to the pointer's type."""
    if WIDTH * pointer.dtype.element_ty.primitive_bitwidth > 128:
        HALF: tl.constexpr = WIDTH // 2
        _store(pointer, offset, mask, columns[:HALF], BLOCK, HALF)
        _store(pointer, offset + HALF, mask, columns[HALF:], BLOCK, HALF)
    else:
        tile = _zip(columns, BLOCK, WIDTH).to(pointer.dtype.element_ty)
        tl.store(pointer + offset[:, None] + tl.arange(0, WIDTH)[None, :], tile, mask=mask[:, None])


@triton.jit
def _load_with_halo(
    pointer, offset, mask, left_mask, right_mask, BLOCK: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr
):
    """Channels -LEFT ... 7 + RIGHT of every lane's vector. A halo load is as wide as a power of two, so aligned."""
    LEFT_WIDTH: tl.constexpr = triton.next_power_of_2(LEFT)
    RIGHT_WIDTH: tl.constexpr = triton.next_power_of_2(RIGHT)
    left = _load(pointer, offset - LEFT_WIDTH, left_mask, BLOCK, LEFT_WIDTH)
    middle = _load(pointer, offset, mask, BLOCK, 8)
    right = _load(pointer, offset + 8, right_mask, BLOCK, RIGHT_WIDTH)
    return left[LEFT_WIDTH - LEFT :] + middle + right[:RIGHT]


# --------------------------------------------------------------------------- the arithmetic, on columns in registers


@triton.jit
def _power(d, neg_beta, THREE_QUARTERS: tl.constexpr):
    """d ** -beta. The usual beta of 0.75 takes two fast instructions, and is inf at 0 and 0 at inf as it must."""
    if THREE_QUARTERS:
        r = tl.rsqrt(d)
        return r * tl.sqrt(r)
    else:
        return tl.where(neg_beta == 0.0, 1.0, tl.exp2(neg_beta * tl.log2(d)))


@triton.jit
def _reciprocal(d, THREE_QUARTERS: tl.constexpr):
    if THREE_QUARTERS:
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
    mask,
    left_mask,
    right_mask,
    alpha,
    k,
    neg_beta,
    BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    RELU: tl.constexpr,
    THREE_QUARTERS: tl.constexpr,
):
    """Eight channels of LRN (of ReLU) for every lane."""
    LEFT: tl.constexpr = SIZE // 2
    raw = _load_with_halo(x_pointer, offset, mask, left_mask, right_mask, BLOCK, LEFT, (SIZE - 1) // 2)
    x = ()
    squares = ()
    for i in tl.static_range(7 + SIZE):
        v = raw[i].to(tl.float32)
        if RELU:
            v = tl.maximum(v, 0.0, propagate_nan=tl.PropagateNan.ALL)
        x = x + (v,)
        squares = squares + (v * v,)
    y = ()
    sums = _window_sums(squares, 8, SIZE)
    for i in tl.static_range(8):
        d = k + alpha * sums[i]
        y = y + (x[LEFT + i] * _power(d, neg_beta, THREE_QUARTERS),)
    return y


@triton.jit
def _gradient(
    x_pointer,
    offset,
    mask,
    left_mask,
    right_mask,
    grad,
    alpha,
    k,
    neg_beta,
    slope,
    BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    RELU: tl.constexpr,
    THREE_QUARTERS: tl.constexpr,
):
    """Eight channels of the gradient for every lane; `grad` has channels -RIGHT ... 7 + LEFT."""
    LEFT: tl.constexpr = SIZE // 2
    RIGHT: tl.constexpr = (SIZE - 1) // 2
    HALO: tl.constexpr = SIZE - 1
    raw = _load_with_halo(x_pointer, offset, mask, left_mask, right_mask, BLOCK, HALO, HALO)
    x = ()
    squares = ()
    for i in tl.static_range(8 + 2 * HALO):
        v = raw[i].to(tl.float32)
        if RELU:
            v = tl.where(v < 0.0, 0.0, v)  # a maximum would cost registers here: see above
        x = x + (v,)
        squares = squares + (v * v,)
    scaled = ()
    ratios = ()
    sums = _window_sums(squares, 8 + HALO, SIZE)
    for j in tl.static_range(8 + HALO):
        d = k + alpha * sums[j]
        # A channel that does not exist must add nothing, and with k = 0 its d is 0.
        if j < RIGHT:
            d = tl.where(left_mask, d, 1.0)
        if j >= 8 + RIGHT:
            d = tl.where(right_mask, d, 1.0)
        w = grad[j].to(tl.float32) * _power(d, neg_beta, THREE_QUARTERS)
        scaled = scaled + (w,)
        ratios = ratios + (w * x[LEFT + j] * _reciprocal(d, THREE_QUARTERS),)
    dx = ()
    sums = _window_sums(ratios, 8, SIZE)
    for i in tl.static_range(8):
        v = x[HALO + i]
        out = scaled[RIGHT + i] - slope * v * sums[i]
        if RELU:
            out = tl.where(v == 0.0, 0.0, out)  # ReLU's gradient is 0 at 0, and NaN passes
        dx = dx + (out,)
    return dx


# --------------------------------------------------------------------------- kernels: local response normalisation


_VECTOR_CONFIGS = [
    triton.Config({"BLOCK": 256}, num_warps=8),
    triton.Config({"BLOCK": 128}, num_warps=4),
    triton.Config({"BLOCK": 256}, num_warps=4),
]


@triton.autotune(configs=_VECTOR_CONFIGS, key=["C", "SIZE", "RELU"])
@triton.jit
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
    THREE_QUARTERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    GROUPS: tl.constexpr = C // 8
    first = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    mask = lane < vectors - first
    group = ((first % GROUPS).to(tl.int32) + lane) % GROUPS
    x_pointer += first * 8
    y_pointer += first * 8
    y = _normalise(
        x_pointer, lane * 8, mask, mask & (group > 0), mask & (group < GROUPS - 1),
        alpha, k, neg_beta, BLOCK, SIZE, RELU, THREE_QUARTERS,
    )  # fmt: skip
    _store(y_pointer, lane * 8, mask, y, BLOCK, 8)


@triton.autotune(configs=_VECTOR_CONFIGS, key=["C", "SIZE", "RELU"])
@triton.jit
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
    THREE_QUARTERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    GROUPS: tl.constexpr = C // 8
    first = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    mask = lane < vectors - first
    group = ((first % GROUPS).to(tl.int32) + lane) % GROUPS
    left_mask = mask & (group > 0)
    right_mask = mask & (group < GROUPS - 1)
    x_pointer += first * 8
    grad_pointer += first * 8
    dx_pointer += first * 8
    grad = _load_with_halo(
        grad_pointer, lane * 8, mask, left_mask, right_mask, BLOCK, (SIZE - 1) // 2, SIZE // 2
    )
    dx = _gradient(
        x_pointer, lane * 8, mask, left_mask, right_mask, grad,
        alpha, k, neg_beta, slope, BLOCK, SIZE, RELU, THREE_QUARTERS,
    )  # fmt: skip
    _store(dx_pointer, lane * 8, mask, dx, BLOCK, 8)


# --------------------------------------------------------------------------- kernels: with 3x3 stride-2 max pooling


@triton.jit
def _keep_larger(best, best_tap, value, tap, step: tl.constexpr):
    """Max pooling's comparison: the first of equals stays, and NaN wins."""
    out = ()
    out_tap = ()
    for i in tl.static_range(8):
        larger = (value[i] > best[i]) | (value[i] != value[i])
        out = out + (tl.where(larger, value[i], best[i]),)
        out_tap = out_tap + (tl.where(larger, tap[i] + step, best_tap[i]),)
    return out, out_tap


@triton.jit
def _row_maximum(
    x_pointer,
    offset,
    mask,
    left_mask,
    right_mask,
    alpha,
    k,
    neg_beta,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    THREE_QUARTERS: tl.constexpr,
):
    """The largest of three neighbouring positions of a row, and which of them it is (0, 1, 2)."""
    zero = tl.zeros((BLOCK,), tl.int32)
    zeros = (zero, zero, zero, zero, zero, zero, zero, zero)
    best = _normalise(
        x_pointer, offset, mask, left_mask, right_mask,
        alpha, k, neg_beta, BLOCK, SIZE, True, THREE_QUARTERS,
    )  # fmt: skip
    best_tap = zeros
    for column in tl.static_range(1, 3):
        y = _normalise(
            x_pointer, offset + column * C, mask, left_mask, right_mask,
            alpha, k, neg_beta, BLOCK, SIZE, True, THREE_QUARTERS,
        )  # fmt: skip
        best, best_tap = _keep_larger(best, best_tap, y, zeros, column)
    return best, best_tap


@triton.autotune(
    configs=[
        triton.Config({"BLOCK": 256, "ROWS": 9}, num_warps=8),
        triton.Config({"BLOCK": 128, "ROWS": 9}, num_warps=4),
        triton.Config({"BLOCK": 256, "ROWS": 5}, num_warps=8),
        triton.Config({"BLOCK": 128, "ROWS": 14}, num_warps=4),
    ],
    key=["H", "W", "C", "SIZE"],
)
@triton.jit
def _pool_forward_kernel(
    x_pointer,
    y_pointer,
    argmax_pointer,
    batch,
    alpha,
    k,
    neg_beta,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    SIZE: tl.constexpr,
    THREE_QUARTERS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    GROUPS: tl.constexpr = C // 8
    POOLED_H: tl.constexpr = (H - 3) // 2 + 1
    POOLED_W: tl.constexpr = (W - 3) // 2 + 1
    STRIPS: tl.constexpr = (POOLED_H + ROWS - 1) // ROWS
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    group = lane % GROUPS
    column = lane // GROUPS % POOLED_W
    strip = lane // (GROUPS * POOLED_W) % STRIPS
    image = (lane // (GROUPS * POOLED_W * STRIPS)).to(tl.int64)
    inside = image < batch
    source = image * (H * W * C) + ((2 * ROWS * strip * W + 2 * column) * C + group * 8)
    target = image * (POOLED_H * POOLED_W * C) + ((ROWS * strip * POOLED_W + column) * C + group * 8)
    best, best_tap = _row_maximum(
        x_pointer, source, inside, inside & (group > 0), inside & (group < GROUPS - 1),
        alpha, k, neg_beta, C, BLOCK, SIZE, THREE_QUARTERS,
    )  # fmt: skip
    for row in range(ROWS):
        mask = inside & (strip * ROWS + row < POOLED_H)
        left_mask = mask & (group > 0)
        right_mask = mask & (group < GROUPS - 1)
        middle, middle_tap = _row_maximum(
            x_pointer, source + W * C, mask, left_mask, right_mask,
            alpha, k, neg_beta, C, BLOCK, SIZE, THREE_QUARTERS,
        )  # fmt: skip
        best, best_tap = _keep_larger(best, best_tap, middle, middle_tap, 3)
        last, last_tap = _row_maximum(
            x_pointer, source + 2 * W * C, mask, left_mask, right_mask,
            alpha, k, neg_beta, C, BLOCK, SIZE, THREE_QUARTERS,
        )  # fmt: skip
        best, best_tap = _keep_larger(best, best_tap, last, last_tap, 6)
        _store(y_pointer, target, mask, best, BLOCK, 8)
        _store(argmax_pointer, target, mask, best_tap, BLOCK, 8)
        best = last
        best_tap = last_tap
        source += 2 * W * C
        target += POOLED_W * C


@triton.jit
def _pooled_gradient(
    grad_pointer,
    argmax_pointer,
    pooled,
    qy,
    qx,
    inside,
    not_first,
    not_last,
    POOLED_H: tl.constexpr,
    POOLED_W: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    ROW: tl.constexpr,
    COLUMN: tl.constexpr,
):
    """The gradient that reaches position (ROW, COLUMN) of a quad from the windows whose maximum it was."""
    zero = tl.zeros((BLOCK,), tl.float32)
    total = ()
    for _ in tl.static_range(7 + SIZE):
        total = total + (zero,)
    for up in range(2 - ROW):
        row_mask = inside & (qy - up < POOLED_H) & (qy >= up)
        for back in range(2 - COLUMN):
            mask = row_mask & (qx >= back) & (qx - back < POOLED_W)
            offset = pooled - (up * POOLED_W + back) * C
            grad = _load_with_halo(
                grad_pointer,
                offset,
                mask,
                mask & not_first,
                mask & not_last,
                BLOCK,
                (SIZE - 1) // 2,
                SIZE // 2,
            )
            argmax = _load_with_halo(
                argmax_pointer,
                offset,
                mask,
                mask & not_first,
                mask & not_last,
                BLOCK,
                (SIZE - 1) // 2,
                SIZE // 2,
            )
            new_total = ()
            for i in tl.static_range(7 + SIZE):
                here = argmax[i] == (ROW + 2 * up) * 3 + COLUMN + 2 * back
                new_total = new_total + (tl.where(here, total[i] + grad[i].to(tl.float32), total[i]),)
            total = new_total
    return total


@triton.autotune(
    configs=[
        triton.Config({"BLOCK": 256, "ROWS": 7}, num_warps=8),
        triton.Config({"BLOCK": 128, "ROWS": 7}, num_warps=4),
        triton.Config({"BLOCK": 256, "ROWS": 4}, num_warps=8),
        triton.Config({"BLOCK": 128, "ROWS": 14}, num_warps=4),
    ],
    key=["H", "W", "C", "SIZE"],
)
@triton.jit
def _pool_backward_kernel(
    x_pointer,
    grad_pointer,
    argmax_pointer,
    dx_pointer,
    batch,
    alpha,
    k,
    neg_beta,
    slope,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    SIZE: tl.constexpr,
    THREE_QUARTERS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    GROUPS: tl.constexpr = C // 8
    POOLED_H: tl.constexpr = (H - 3) // 2 + 1
    POOLED_W: tl.constexpr = (W - 3) // 2 + 1
    QUADS_H: tl.constexpr = (H + 1) // 2
    QUADS_W: tl.constexpr = (W + 1) // 2
    STRIPS: tl.constexpr = (QUADS_H + ROWS - 1) // ROWS
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    group = lane % GROUPS
    qx = lane // GROUPS % QUADS_W
    qy = lane // (GROUPS * QUADS_W) % STRIPS * ROWS
    image = (lane // (GROUPS * QUADS_W * STRIPS)).to(tl.int64)
    inside = image < batch
    source = image * (H * W * C) + ((2 * qy * W + 2 * qx) * C + group * 8)
    pooled = image * (POOLED_H * POOLED_W * C) + ((qy * POOLED_W + qx) * C + group * 8)
    not_first = group > 0
    not_last = group < GROUPS - 1
    for _ in range(ROWS):
        for position in tl.static_range(4):
            grad = _pooled_gradient(
                grad_pointer, argmax_pointer, pooled, qy, qx, inside, not_first, not_last,
                POOLED_H, POOLED_W, C, BLOCK, SIZE, position // 2, position % 2,
            )  # fmt: skip
            mask = inside & (2 * qy + position // 2 < H)
            if position % 2 == 1:
                mask = mask & (2 * qx + 1 < W)
            offset = source + (position // 2 * W + position % 2) * C
            dx = _gradient(
                x_pointer, offset, mask, mask & not_first, mask & not_last, grad,
                alpha, k, neg_beta, slope, BLOCK, SIZE, True, THREE_QUARTERS,
            )  # fmt: skip
            _store(dx_pointer, offset, mask, dx, BLOCK, 8)
        qy += 1
        source += 2 * W * C
        pooled += POOLED_W * C


# --------------------------------------------------------------------------- plain kernels: any channels, any window


@triton.jit
def _load_relu(x_pointer, offset, mask, RELU: tl.constexpr):
    x = tl.load(x_pointer + offset, mask=mask, other=0.0).to(tl.float32)
    if RELU:
        x = tl.where(x < 0.0, 0.0, x)
    return x


@triton.jit
def _denominator(x_pointer, offset, channel, mask, C, before, after, alpha, k, RELU: tl.constexpr):
    total = tl.zeros_like(channel).to(tl.float32)
    for shift in range(-before, after + 1):
        inside = mask & (channel + shift >= 0) & (channel + shift < C)
        x = _load_relu(x_pointer, offset + shift, inside, RELU)
        total += x * x
    return k + alpha * total


@triton.jit
def _load_gradient(
    grad_pointer, argmax_pointer, offset, channel, mask, C, H, W, POOLED: tl.constexpr
):  # fmt: skip
    """The gradient of one element of the normalised activation; with pooling, from the windows that it won."""
    if POOLED:
        position = offset // C
        column = position % W
        row = position // W % H
        image = position // W // H
        pooled_h = (H - 3) // 2 + 1
        pooled_w = (W - 3) // 2 + 1
        grad = tl.zeros_like(channel).to(tl.float32)
        for up in range(2):
            for back in range(2):
                y = row // 2 - up
                x = column // 2 - back
                tap = (row - 2 * y) * 3 + column - 2 * x
                inside = mask & (y >= 0) & (y < pooled_h) & (x >= 0) & (x < pooled_w)
                inside = inside & (row - 2 * y < 3) & (column - 2 * x < 3)
                source = ((image * pooled_h + y) * pooled_w + x) * C + channel
                won = tl.load(argmax_pointer + source, mask=inside, other=9) == tap
                grad += tl.load(grad_pointer + source, mask=inside & won, other=0.0).to(tl.float32)
        return grad
    else:
        return tl.load(grad_pointer + offset, mask=mask, other=0.0).to(tl.float32)


_PLAIN_CONFIGS = [triton.Config({"BLOCK": 1024}, num_warps=8), triton.Config({"BLOCK": 256}, num_warps=4)]


@triton.autotune(configs=_PLAIN_CONFIGS, key=["C", "before", "after"])
@triton.jit
def _plain_forward_kernel(
    x_pointer,
    y_pointer,
    elements,
    C,
    before,
    after,
    alpha,
    k,
    neg_beta,
    RELU: tl.constexpr,
    THREE_QUARTERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < elements
    channel = offset % C
    d = _denominator(x_pointer, offset, channel, mask, C, before, after, alpha, k, RELU)
    y = _load_relu(x_pointer, offset, mask, RELU) * _power(d, neg_beta, THREE_QUARTERS)
    tl.store(y_pointer + offset, y.to(y_pointer.dtype.element_ty), mask=mask)


@triton.autotune(configs=_PLAIN_CONFIGS, key=["C", "before", "after"])
@triton.jit
def _plain_pool_forward_kernel(
    x_pointer,
    y_pointer,
    argmax_pointer,
    elements,
    C,
    H,
    W,
    before,
    after,
    alpha,
    k,
    neg_beta,
    THREE_QUARTERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    target = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = target < elements
    channel = target % C
    pooled_h = (H - 3) // 2 + 1
    pooled_w = (W - 3) // 2 + 1
    position = target // C
    row = position // pooled_w % pooled_h * 2
    column = position % pooled_w * 2
    image = position // pooled_w // pooled_h
    best = tl.zeros((BLOCK,), tl.float32)
    best_tap = tl.zeros((BLOCK,), tl.int32)
    for tap in range(9):
        source = ((image * H + row + tap // 3) * W + column + tap % 3) * C + channel
        d = _denominator(x_pointer, source, channel, mask, C, before, after, alpha, k, True)
        y = _load_relu(x_pointer, source, mask, True) * _power(d, neg_beta, THREE_QUARTERS)
        larger = (y > best) | (y != y) | (tap == 0)
        best = tl.where(larger, y, best)
        best_tap = tl.where(larger, tap, best_tap)
    tl.store(y_pointer + target, best.to(y_pointer.dtype.element_ty), mask=mask)
    tl.store(argmax_pointer + target, best_tap.to(tl.uint8), mask=mask)


@triton.autotune(configs=_PLAIN_CONFIGS, key=["C", "before", "after"])
@triton.jit
def _plain_ratio_kernel(
    x_pointer,
    grad_pointer,
    argmax_pointer,
    ratio_pointer,
    elements,
    C,
    H,
    W,
    before,
    after,
    alpha,
    k,
    neg_beta,
    RELU: tl.constexpr,
    POOLED: tl.constexpr,
    THREE_QUARTERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """First half of the plain backward: G * x * d^(-beta - 1), in fp32, so that the second has one loop, not two."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < elements
    channel = offset % C
    d = _denominator(x_pointer, offset, channel, mask, C, before, after, alpha, k, RELU)
    grad = _load_gradient(grad_pointer, argmax_pointer, offset, channel, mask, C, H, W, POOLED)
    x = _load_relu(x_pointer, offset, mask, RELU)
    ratio = grad * _power(d, neg_beta, THREE_QUARTERS) * x * _reciprocal(d, THREE_QUARTERS)
    tl.store(ratio_pointer + offset, ratio, mask=mask)


@triton.autotune(configs=_PLAIN_CONFIGS, key=["C", "before", "after"])
@triton.jit
def _plain_backward_kernel(
    x_pointer,
    grad_pointer,
    argmax_pointer,
    ratio_pointer,
    dx_pointer,
    elements,
    C,
    H,
    W,
    before,
    after,
    alpha,
    k,
    neg_beta,
    slope,
    RELU: tl.constexpr,
    POOLED: tl.constexpr,
    THREE_QUARTERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offset < elements
    channel = offset % C
    total = tl.zeros((BLOCK,), tl.float32)
    for shift in range(-after, before + 1):
        inside = mask & (channel + shift >= 0) & (channel + shift < C)
        total += tl.load(ratio_pointer + offset + shift, mask=inside, other=0.0)
    d = _denominator(x_pointer, offset, channel, mask, C, before, after, alpha, k, RELU)
    grad = _load_gradient(grad_pointer, argmax_pointer, offset, channel, mask, C, H, W, POOLED)
    x = _load_relu(x_pointer, offset, mask, RELU)
    dx = grad * _power(d, neg_beta, THREE_QUARTERS) - slope * x * total
    if RELU:
        dx = tl.where(x == 0.0, 0.0, dx)
    tl.store(dx_pointer + offset, dx.to(dx_pointer.dtype.element_ty), mask=mask)


# --------------------------------------------------------------------------- what to launch, on channels-last tensors


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _over(count: int) -> Grid:
    """A flat grid over `count` lanes."""
    return lambda constants: (_cdiv(count, constants["BLOCK"]),)


def _over_strips(batch: int, rows: int, width: int, groups: int) -> Grid:
    """A flat grid over strips of ROWS rows: one lane for each image, strip, column and vector of channels."""
    return lambda constants: (
        _cdiv(batch * _cdiv(rows, constants["ROWS"]) * width * groups, constants["BLOCK"]),
    )


def _is_fast(rows: Tensor, size: int) -> bool:
    image = rows[0].numel()
    return rows.shape[-1] % 8 == 0 and 2 <= size <= 5 and image < 2**31  # 32-bit offsets within an image


def _scalars(size: int, alpha: float, beta: float, k: float) -> dict[str, float | bool]:
    return {"alpha": alpha / size, "k": float(k), "neg_beta": -float(beta), "THREE_QUARTERS": beta == 0.75}


def _slope(size: int, alpha: float, beta: float) -> float:
    return 2 * alpha * beta / size


def _reach(size: int, channels: int) -> dict[str, int]:
    """How far the window reaches either way; channels that do not exist need no loop."""
    return {"before": min(size // 2, channels - 1), "after": min((size - 1) // 2, channels - 1)}


def _forward(x: Tensor, y: Tensor, size: int, alpha: float, beta: float, k: float, relu: bool) -> Launch:
    channels = x.shape[-1]
    common = {"x_pointer": x, "y_pointer": y, "C": channels, "RELU": relu, **_scalars(size, alpha, beta, k)}
    if _is_fast(x, size):
        vectors = x.numel() // 8
        return Launch(_forward_kernel, _over(vectors), {**common, "vectors": vectors, "SIZE": size})
    arguments = {**common, "elements": x.numel(), **_reach(size, channels)}
    return Launch(_plain_forward_kernel, _over(x.numel()), arguments)


def _backward(
    grad: Tensor, x: Tensor, dx: Tensor, size: int, alpha: float, beta: float, k: float, relu: bool
) -> list[Launch]:
    if not _is_fast(x, size):
        return _plain_backward(grad, None, x, dx, size, alpha, beta, k, relu)
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
    return [Launch(_backward_kernel, _over(vectors), arguments)]


def _pool_forward(
    x: Tensor, y: Tensor, argmax: Tensor, size: int, alpha: float, beta: float, k: float
) -> Launch:
    batch, height, width, channels = x.shape
    common = {
        "x_pointer": x,
        "y_pointer": y,
        "argmax_pointer": argmax,
        "H": height,
        "W": width,
        "C": channels,
        **_scalars(size, alpha, beta, k),
    }
    if _is_fast(x, size):
        grid = _over_strips(batch, y.shape[1], y.shape[2], channels // 8)
        return Launch(_pool_forward_kernel, grid, {**common, "batch": batch, "SIZE": size})
    arguments = {**common, "elements": y.numel(), **_reach(size, channels)}
    return Launch(_plain_pool_forward_kernel, _over(y.numel()), arguments)


def _pool_backward(
    grad: Tensor, argmax: Tensor, x: Tensor, dx: Tensor, size: int, alpha: float, beta: float, k: float
) -> list[Launch]:
    if not _is_fast(x, size):
        return _plain_backward(grad, argmax, x, dx, size, alpha, beta, k, True)
    batch, height, width, channels = x.shape
    arguments = {
        "x_pointer": x,
        "grad_pointer": grad,
        "argmax_pointer": argmax,
        "dx_pointer": dx,
        "batch": batch,
        "slope": _slope(size, alpha, beta),
        "H": height,
        "W": width,
        "C": channels,
        "SIZE": size,
        **_scalars(size, alpha, beta, k),
    }
    grid = _over_strips(batch, (height + 1) // 2, (width + 1) // 2, channels // 8)
    return [Launch(_pool_backward_kernel, grid, arguments)]


def _plain_backward(
    grad: Tensor,
    argmax: Tensor | None,
    x: Tensor,
    dx: Tensor,
    size: int,
    alpha: float,
    beta: float,
    k: float,
    relu: bool,
) -> list[Launch]:
    channels = x.shape[-1]
    common = {
        "x_pointer": x,
        "grad_pointer": grad,
        "argmax_pointer": grad if argmax is None else argmax,  # not read without pooling
        "ratio_pointer": torch.empty(x.shape, dtype=torch.float32, device=x.device),
        "elements": x.numel(),
        "C": channels,
        "H": x.shape[1],
        "W": x.shape[2],
        "RELU": relu,
        "POOLED": argmax is not None,
        **_reach(size, channels),
        **_scalars(size, alpha, beta, k),
    }
    grid = _over(x.numel())
    return [
        Launch(_plain_ratio_kernel, grid, common),
        Launch(
            _plain_backward_kernel, grid, {**common, "dx_pointer": dx, "slope": _slope(size, alpha, beta)}
        ),
    ]


# --------------------------------------------------------------------------- the four functions


def _rows(x: Tensor) -> Tensor:
    """`x` as (N, ..., C) with the channels contiguous: a view of a channels-last tensor, a copy of any other."""
    return x.movedim(1, -1).contiguous()


def _empty_rows(out: Tensor) -> Tensor:
    """Where a kernel writes `out` in channels-last order: `out` itself if it is channels-last, else a buffer."""
    rows = out.movedim(1, -1)
    return rows if rows.is_contiguous() else torch.empty(rows.shape, dtype=out.dtype, device=out.device)


def _finish(out: Tensor, rows: Tensor) -> Tensor:
    if rows.data_ptr() != out.data_ptr():
        out.copy_(rows.movedim(-1, 1))
    return out


def lrn_forward(x: Tensor, size: int, alpha: float, beta: float, k: float, relu: bool) -> Tensor:
    """Local response normalisation of `x`, or of relu(x).

    x: (N, C, ...), 3-D to 5-D, fp32, bf16 or fp16, any strides. alpha is divided by `size`, as PyTorch does.
    Returns a tensor like `torch.empty_like(x)`.
    """
    out = torch.empty_like(x)
    if x.numel():
        rows = _empty_rows(out)
        _forward(_rows(x), rows, size, alpha, beta, k, relu).run()
        _finish(out, rows)
    return out


def lrn_backward(
    grad: Tensor, x: Tensor, size: int, alpha: float, beta: float, k: float, relu: bool
) -> Tensor:
    """Gradient of `lrn_forward` with respect to `x`, given that of its result, `grad` (the shape of `x`)."""
    out = torch.empty_like(x)
    if x.numel():
        rows = _empty_rows(out)
        for launch in _backward(_rows(grad), _rows(x), rows, size, alpha, beta, k, relu):
            launch.run()
        _finish(out, rows)
    return out


def lrn_max_pool_forward(x: Tensor, size: int, alpha: float, beta: float, k: float) -> tuple[Tensor, Tensor]:
    """`max_pool2d(lrn(relu(x)), kernel_size=3, stride=2)`.

    x: (N, C, H, W) with H and W at least 3. Returns the pooled result and a uint8 tensor of the same shape and
    strides: which of the window's nine positions won, 3 * row + column; the first of equals, as in PyTorch.
    """
    like = x[:, :, : (x.shape[2] - 3) // 2 + 1, : (x.shape[3] - 3) // 2 + 1]
    out = torch.empty_like(like)
    argmax = torch.empty_like(like, dtype=torch.uint8)
    if x.numel():
        rows = _empty_rows(out)
        argmax_rows = _empty_rows(argmax)
        _pool_forward(_rows(x), rows, argmax_rows, size, alpha, beta, k).run()
        _finish(out, rows)
        _finish(argmax, argmax_rows)
    return out, argmax


def lrn_max_pool_backward(
    grad: Tensor, argmax: Tensor, x: Tensor, size: int, alpha: float, beta: float, k: float
) -> Tensor:
    """Gradient of `lrn_max_pool_forward` with respect to `x`, given that of its result and its argmax."""
    out = torch.empty_like(x)
    if x.numel():
        rows = _empty_rows(out)
        for launch in _pool_backward(_rows(grad), _rows(argmax), _rows(x), rows, size, alpha, beta, k):
            launch.run()
        _finish(out, rows)
    return out


# --------------------------------------------------------------------------- for `python -m fastalex.kernels.inspect`

_PAPER = {"size": 5, "alpha": 5e-4, "beta": 0.75, "k": 2.0}
_HEIGHT, _CHANNELS = 55, 96  # AlexNet's first normalisation
_POOLED = (_HEIGHT - 3) // 2 + 1


def inspect_cases() -> list[KernelCase]:
    """The fast kernels at the shape of AlexNet's first normalisation."""

    def activation(dtype: torch.dtype, batch: int, device: torch.device, size: int = _HEIGHT) -> Tensor:
        if device.type == "meta":
            return torch.empty(batch, size, size, _CHANNELS, dtype=dtype, device=device)
        return torch.randn(batch, size, size, _CHANNELS).to(dtype)

    def forward(dtype: torch.dtype, batch: int, device: torch.device) -> Launch:
        x = activation(dtype, batch, device)
        return _forward(x, torch.empty_like(x), **_PAPER, relu=True)

    def backward(dtype: torch.dtype, batch: int, device: torch.device) -> Launch:
        x = activation(dtype, batch, device)
        return _backward(torch.empty_like(x), x, torch.empty_like(x), **_PAPER, relu=True)[0]

    def pool_forward(dtype: torch.dtype, batch: int, device: torch.device) -> Launch:
        y = activation(dtype, batch, device, _POOLED)
        return _pool_forward(
            activation(dtype, batch, device), y, torch.zeros_like(y, dtype=torch.uint8), **_PAPER
        )

    def pool_backward(dtype: torch.dtype, batch: int, device: torch.device) -> Launch:
        x = activation(dtype, batch, device)
        grad = activation(dtype, batch, device, _POOLED)
        argmax = torch.zeros_like(grad, dtype=torch.uint8)
        return _pool_backward(grad, argmax, x, torch.empty_like(x), **_PAPER)[0]

    def eager(pooled: bool, backwards: bool) -> Callable[[torch.dtype, int], Callable[[], object]]:
        def prepare(dtype: torch.dtype, batch: int) -> Callable[[], object]:
            x = torch.empty(batch, _CHANNELS, _HEIGHT, _HEIGHT, dtype=dtype, device="meta")
            x = x.to(memory_format=torch.channels_last).requires_grad_()

            def run() -> Tensor:
                y = F.local_response_norm(F.relu(x), **_PAPER)
                return F.max_pool2d(y, 3, 2) if pooled else y

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
            eager=eager("pool" in name, "backward" in name),
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
    ]  # fmt: skip
