# mypy: disallow-untyped-defs=False
"""A step of momentum SGD from the factors of a gradient on the CPU: PyTorch's products, the rest in one pass.

A few rows of the gradient at a time are multiplied out, in the factors' dtype. While they are in the cache,
one pass over the same rows of the weight widens and scales them, adds weight decay and momentum, and writes
the weight and the momentum: 16 bytes a weight through memory. With PyTorch's operators the widened gradient
is written and read besides. It writes no copy of the weight for the next step's products; the reference does.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from ._numba_simd import (
    LANES,
    bits,
    fma,
    inline,
    jit,
    load,
    load_partial,
    pointer,
    run,
    splat,
    store,
    store_partial,
)
from .factored_sgd_reference import product_rows

f32 = np.float32
# Bytes of a column of the product that is made at a time: 128 rows in fp32 and 256 in bf16, 5 MB in AlexNet's
# largest layer. About the fastest number in benchmarks/test_factored_sgd.py.
COLUMN_BYTES = 512
ITEM = 64 * LANES  # weights; what a thread takes at a time
NONE = torch.empty(0, dtype=torch.float32)


@inline
def _stepped(w, before, gradient, scale, rate, momentum, weight_decay):
    """The weights and the velocity after a step, of 16 weights."""
    velocity = fma(momentum, before, fma(weight_decay, w, scale * gradient))
    return fma(rate, velocity, w), velocity


@jit()
def _serial(start, stop, weight, velocity, gradient, scale, rate, momentum, weight_decay):
    end = min(stop * ITEM, len(weight))
    whole = start * ITEM + (end - start * ITEM) // LANES * LANES
    rest = end - whole
    has_velocity = len(velocity) > 0
    weight, velocity, gradient = pointer(weight), pointer(velocity), pointer(gradient)
    numbers = splat(scale), splat(-rate), splat(momentum), splat(weight_decay)
    zero = splat(f32(0))
    for i in range(start * ITEM, whole, LANES):
        before = load(velocity, i) if has_velocity else zero
        w, v = _stepped(load(weight, i), before, load(gradient, i), *numbers)
        store(weight, i, w)
        if has_velocity:
            store(velocity, i, v)
    if rest:
        before = load_partial(velocity, whole, rest) if has_velocity else zero
        w, v = _stepped(
            load_partial(weight, whole, rest), before, load_partial(gradient, whole, rest), *numbers
        )
        store_partial(weight, whole, w, rest)
        if has_velocity:
            store_partial(velocity, whole, v, rest)


@jit(parallel=True)
def _parallel(tasks, count, weight, velocity, gradient, scale, rate, momentum, weight_decay):
    for task in numba.prange(tasks):
        _serial(
            task * count // tasks,
            (task + 1) * count // tasks,
            weight,
            velocity,
            gradient,
            scale,
            rate,
            momentum,
            weight_decay,
        )


def takes(weight: Tensor, copy: Tensor | None) -> bool:
    """Whether the kernel updates this weight: fp32, without a copy."""
    return weight.dtype == torch.float32 and copy is None


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
    """As `fastalex.kernels.factored_sgd`, for what `takes` takes."""
    if skip is not None and skip.item():
        return
    factor = 1.0 if scale is None else scale.item()
    numbers = f32(factor), f32(rate.item()), f32(momentum), f32(weight_decay)
    height = COLUMN_BYTES // output.element_size()
    for start in range(0, len(weight), height):
        rows = slice(start, start + height)
        gradient = product_rows(output, input, pooling, start, start + height)
        some = weight[rows]
        run(
            _serial,
            _parallel,
            -(-some.numel() // ITEM),
            bits(some),
            bits(NONE if velocity is None else velocity[rows]),
            bits(gradient),
            *numbers,
        )
