# mypy: disallow-untyped-defs=False
"""Vectors of 16 floats for Numba: one cache line of fp32, one AVX-512 register, two of AVX2, four of NEON.

Numba leaves vectorising to LLVM, which does well on a simple loop and badly on one with a window, a tail
and a 16-bit type. Here the kernel says what it means, block by block, as a Triton kernel does; LLVM still
chooses the instructions and splits the vectors for machines with narrower registers.

    v = load(array, i, count)      16 elements from flat index i, as fp32; lanes from `count` on are 0
    store(array, i, v, count)      the first `count` lanes, rounded to nearest even
    a + b, a - b, a * b, a / b, fma(a, b, c), maximum(a, b), where(mask, a, b), a > b, a == b, ...

NumPy has no bf16, so an array's dtype stands for what its bits are: float32, uint16 for bf16, int16 for
fp16 (`bits` makes such a view of a tensor). Nothing is checked: an index out of range is a crash.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, models, overload, register_model

LANES = 16

# The threads of PyTorch's own OpenMP pool, where there is one: two pools would fight over the same cores.
# A preference, not a demand: Numba falls back to the next layer, and NUMBA_THREADING_LAYER still decides.
numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]


def jit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`numba.njit` that keeps compiled code on disk where a folder for it can be written."""

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(cache=True, nogil=True, **options)(function)
        except RuntimeError:  # neither the package's folder nor the user's cache is writable
            return numba.njit(nogil=True, **options)(function)

    return decorate


inline = numba.njit(forceinline=True)
"""For helpers that only other kernels call: they become part of their caller, and of its cache."""


def bits(x: torch.Tensor) -> np.ndarray[Any, Any]:
    """A flat NumPy view of a contiguous tensor: fp32 and uint8 as they are, bf16 as uint16, fp16 as int16."""
    views = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}
    return x.detach().view(-1).view(views.get(x.dtype, x.dtype)).numpy()


# --- types ------------------------------------------------------------------------------------------------

_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_WORDS = ir.VectorType(ir.IntType(32), LANES)
_SHORTS = ir.VectorType(ir.IntType(16), LANES)
_BYTES = ir.VectorType(ir.IntType(8), LANES)
_BOOLS = ir.VectorType(ir.IntType(1), LANES)


class _Vector(types.Type):
    pass


class _Mask(types.Type):
    pass


_vector = _Vector(name=f"float32x{LANES}")
_mask = _Mask(name=f"boolx{LANES}")


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, numba_type: Any) -> None:
        super().__init__(manager, numba_type, _FLOATS)


@register_model(_Mask)
class _MaskModel(models.PrimitiveModel):
    def __init__(self, manager: Any, numba_type: Any) -> None:
        super().__init__(manager, numba_type, _BOOLS)


def _splat(builder: ir.IRBuilder, scalar: Any) -> Any:
    undefined = ir.Constant(ir.VectorType(scalar.type, LANES), ir.Undefined)
    single = builder.insert_element(undefined, scalar, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(single, undefined, ir.Constant(_WORDS, [0] * LANES))


def _every(lane_type: ir.Type, value: int | float) -> ir.Constant:
    return ir.Constant(ir.VectorType(lane_type, LANES), [value] * LANES)


def _words(value: int) -> ir.Constant:
    return _every(ir.IntType(32), value)


# --- memory -----------------------------------------------------------------------------------------------


def _pointer(context: Any, builder: ir.IRBuilder, array_type: Any, array: Any, index: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(data, [index])


def _read(builder: ir.IRBuilder, pointer: Any, vector: ir.VectorType) -> Any:
    size = vector.element.width // 8 if isinstance(vector.element, ir.IntType) else 4
    return builder.load(builder.bitcast(pointer, vector.as_pointer()), align=size)


def _write(builder: ir.IRBuilder, value: Any, pointer: Any) -> None:
    element = value.type.element
    size = element.width // 8 if isinstance(element, ir.IntType) else 4
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer()), align=size)


def _copy(builder: ir.IRBuilder, source: Any, target: Any, count: Any) -> None:
    """`count` elements one at a time: only the last, partial block of a row comes this way."""
    with cgutils.for_range(builder, count) as loop:
        builder.store(builder.load(builder.gep(source, [loop.index])), builder.gep(target, [loop.index]))


def _stored_type(array_type: Any) -> ir.VectorType:
    if array_type.dtype == types.float32:
        return _FLOATS
    if array_type.dtype in (types.uint16, types.int16):
        return _SHORTS
    if array_type.dtype == types.uint8:
        return _BYTES
    raise TypeError(f"no vector of {array_type.dtype}")


def _to_float(builder: ir.IRBuilder, raw: Any, array_type: Any) -> Any:
    if array_type.dtype == types.float32:
        return raw
    if array_type.dtype == types.uint8:
        return builder.uitofp(raw, _FLOATS)
    if array_type.dtype == types.int16:
        return builder.fpext(builder.bitcast(raw, ir.VectorType(ir.HalfType(), LANES)), _FLOATS)
    return builder.bitcast(builder.shl(builder.zext(raw, _WORDS), _words(16)), _FLOATS)


def _from_float(builder: ir.IRBuilder, value: Any, array_type: Any) -> Any:
    if array_type.dtype == types.float32:
        return value
    if array_type.dtype == types.uint8:
        return builder.fptoui(value, _BYTES)
    if array_type.dtype == types.int16:
        return builder.bitcast(builder.fptrunc(value, ir.VectorType(ir.HalfType(), LANES)), _SHORTS)
    # bf16 is the upper half of fp32. Adding just under half of the lower one, and one more if the upper is
    # odd, rounds to nearest even; it would carry a NaN over to zero, so a NaN is written as one.
    word = builder.bitcast(value, _WORDS)
    odd = builder.and_(builder.lshr(word, _words(16)), _words(1))
    rounded = builder.add(word, builder.add(odd, _words(0x7FFF)))
    upper = builder.trunc(builder.lshr(rounded, _words(16)), _SHORTS)
    is_nan = builder.fcmp_unordered("uno", value, value)
    return builder.select(is_nan, _every(ir.IntType(16), 0x7FC0), upper)


@intrinsic
def _load(typing_context, array, index):
    def codegen(context, builder, signature, args):
        pointer = _pointer(context, builder, array, *args)
        return _to_float(builder, _read(builder, pointer, _stored_type(array)), array)

    return _vector(array, types.intp), codegen


@intrinsic
def _load_partial(typing_context, array, index, count):
    def codegen(context, builder, signature, args):
        pointer = _pointer(context, builder, array, *args[:2])
        stored = _stored_type(array)
        block = cgutils.alloca_once_value(builder, _every(stored.element, 0))
        _copy(builder, pointer, builder.bitcast(block, pointer.type), args[2])
        return _to_float(builder, _read(builder, block, stored), array)

    return _vector(array, types.intp, types.intp), codegen


@intrinsic
def _store(typing_context, array, index, value):
    def codegen(context, builder, signature, args):
        pointer = _pointer(context, builder, array, *args[:2])
        _write(builder, _from_float(builder, args[2], array), pointer)
        return context.get_dummy_value()

    return types.void(array, types.intp, _vector), codegen


@intrinsic
def _store_partial(typing_context, array, index, value, count):
    def codegen(context, builder, signature, args):
        pointer = _pointer(context, builder, array, *args[:2])
        block = cgutils.alloca_once_value(builder, _from_float(builder, args[2], array))
        _copy(builder, builder.bitcast(block, pointer.type), pointer, args[3])
        return context.get_dummy_value()

    return types.void(array, types.intp, _vector, types.intp), codegen


@inline
def load(array, index, count):
    """16 elements of a flat array from `index` as fp32; lanes from `count` on are 0 and are not read."""
    if count >= LANES:
        return _load(array, index)
    if count > 0:
        return _load_partial(array, index, count)
    return splat(np.float32(0))


@inline
def store(array, index, value, count):
    """The first `count` lanes of `value` to a flat array from `index`, rounded to its dtype."""
    if count >= LANES:
        _store(array, index, value)
    else:
        _store_partial(array, index, value, count)


# --- arithmetic -------------------------------------------------------------------------------------------


@intrinsic
def splat(typing_context, scalar):
    """A vector whose 16 lanes all hold `scalar`."""
    return _vector(types.float32), lambda context, builder, signature, args: _splat(builder, args[0])


def _binary(symbol: Callable[..., Any], result: Any, emit: Callable[[ir.IRBuilder, Any, Any], Any]) -> None:
    @intrinsic
    def operation(typing_context, a, b):
        return result(a, b), lambda context, builder, signature, args: emit(builder, *args)

    @overload(symbol)
    def typed(a, b):
        if (a is result and b is result) or (a is _vector and b is _vector):
            return lambda a, b: operation(a, b)


_binary(operator.add, _vector, lambda builder, a, b: builder.fadd(a, b))
_binary(operator.sub, _vector, lambda builder, a, b: builder.fsub(a, b))
_binary(operator.mul, _vector, lambda builder, a, b: builder.fmul(a, b))
_binary(operator.truediv, _vector, lambda builder, a, b: builder.fdiv(a, b))
_binary(operator.gt, _mask, lambda builder, a, b: builder.fcmp_ordered(">", a, b))
_binary(operator.eq, _mask, lambda builder, a, b: builder.fcmp_ordered("==", a, b))
_binary(operator.ne, _mask, lambda builder, a, b: builder.fcmp_unordered("!=", a, b))
_binary(operator.or_, _mask, lambda builder, a, b: builder.or_(a, b))


def _call(builder: ir.IRBuilder, name: str, *args: Any) -> Any:
    signature = ir.FunctionType(_FLOATS, [_FLOATS] * len(args))
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), args)


@intrinsic
def fma(typing_context, a, b, c):
    """a * b + c, rounded once where the machine has an instruction for it."""
    return _vector(a, b, c), lambda context, builder, signature, args: _call(
        builder, f"llvm.fmuladd.v{LANES}f32", *args
    )


@intrinsic
def power(typing_context, a, b):
    """a to the power of b, through the C library, lane by lane: slow."""
    return _vector(a, b), lambda context, builder, signature, args: _call(
        builder, f"llvm.pow.v{LANES}f32", *args
    )


@intrinsic
def first_lanes(typing_context, count):
    """The mask of lanes 0 .. count - 1."""

    def codegen(context, builder, signature, args):
        lanes = ir.Constant(_WORDS, list(range(LANES)))
        return builder.icmp_signed("<", lanes, _splat(builder, builder.trunc(args[0], ir.IntType(32))))

    return _mask(types.intp), codegen


@intrinsic
def where(typing_context, mask, a, b):
    """`a` where the mask is set, `b` elsewhere."""
    return _vector(mask, a, b), lambda context, builder, signature, args: builder.select(*args)


@intrinsic
def concatenated(typing_context, a, b, start):
    """Lanes start .. start + 15 of the 32 lanes of `a` followed by `b`; `start` is a constant."""
    if not isinstance(start, types.IntegerLiteral):
        raise numba.errors.RequireLiteralValue("start")
    lanes = ir.Constant(_WORDS, list(range(start.literal_value, start.literal_value + LANES)))

    def codegen(context, builder, signature, args):
        return builder.shuffle_vector(args[0], args[1], lanes)

    return _vector(a, b, start), codegen


@intrinsic
def guess_inverse_fourth_root(typing_context, v):
    """v^(-1/4) within 4.3% for positive normal v: the bits of a float are nearly its logarithm."""

    def codegen(context, builder, signature, args):
        # The constant that makes 1 - v * guess^4 span the least, found by trying: -0.171 to 0.095.
        quarter = builder.lshr(builder.bitcast(args[0], _WORDS), _words(2))
        return builder.bitcast(builder.sub(_words(0x4F59E580), quarter), _FLOATS)

    return _vector(v), codegen
