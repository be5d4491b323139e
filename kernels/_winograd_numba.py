"""What Winograd's Numba kernels with constant matrices share: one side of a transform, and the gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
from llvmlite import ir
from numba.core import types
from torch import Tensor

from . import winograd_reference as reference
from ._column_sums import column_sums
from ._numba_simd import LANES, _call, _every


def literal_matrix(name: Any, outputs: Any, taps: Any) -> list[list[float]]:
    """The matrix that the constants in a kernel's source name: B^T "input", A^T "output" or A "gradient"."""
    for constant in (name, outputs, taps):
        if not isinstance(constant, types.Literal):
            raise numba.errors.RequireLiteralValue("the transform's name and sizes")
    outputs, taps = outputs.literal_value, taps.literal_value
    input, _, output = reference.matrices(outputs, taps)
    matrix = {"input": input, "output": output, "gradient": output.T}[name.literal_value]
    return [[float(value) for value in row] for row in matrix]


def combination(builder: ir.IRBuilder, factors: list[float], values: list[Any]) -> Any:
    """The sum of factor * value. Factors of 1 and -1 come first, so that every product is part of an FMA."""
    terms = sorted(zip(factors, values, strict=True), key=lambda term: (term[0] != 1, term[0] != -1))
    total = None
    for factor, value in terms:
        if factor == 0:
            continue
        if total is None:
            total = value if factor == 1 else builder.fmul(value, _every(ir.FloatType(), factor))
        elif factor == 1:
            total = builder.fadd(total, value)
        elif factor == -1:
            total = builder.fsub(total, value)
        else:
            scale = _every(ir.FloatType(), factor)
            total = _call(builder, f"llvm.fmuladd.v{LANES}f32", value, scale, total)
    return total


def gradients(
    convolve: Callable[[Tensor, Tensor, Tensor], Tensor],
    weight_gradient: Callable[[Tensor, Tensor, Tensor], Tensor],
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    of_x: bool,
    of_weight: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """As `winograd_reference.winograd_conv2d_backward`, from a kernel's convolution and weight's gradient.

    The gradient of x is a convolution too, of `grad` and the weight turned by 180 degrees.
    """
    d_x = None
    if of_x:
        rotated = weight.flip(2, 3).transpose(0, 1)
        d_x = convolve(grad, rotated, rotated.new_zeros(len(rotated)))
    d_weight = weight_gradient(grad, x, weight) if of_weight else None
    return d_x, d_weight, column_sums(reference.pixels(grad))
