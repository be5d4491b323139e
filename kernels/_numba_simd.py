# mypy: disallow-untyped-defs=False
"""Vectors of 16 floats for Numba: one cache line of fp32, one AVX-512 register, two of AVX2, four of NEON.

Numba leaves vectorising to LLVM, which does well on a simple loop and badly on one with a window, a tail
and a 16-bit type. With this module a kernel is written block by block, as a Triton kernel is; LLVM still
chooses the instructions and splits the vectors for machines with narrower registers.

    x = pointer(array)
    v = load(x, i)          16 elements from index i, as fp32
    store(x, i, v)          rounded to nearest even
    a + b, a - b, a * b, a / b, fma(a, b, c), where(mask, a, b), a > b, a == b, ...

NumPy has no bf16, so an array's dtype says what its bits mean: float32 for fp32, uint16 for bf16, int16 for
fp16 (`bits` returns such a view of a tensor). Nothing is checked: an index out of range crashes the process.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, models, overload, register_model

LANES = 16

# Prefer the OpenMP pool that PyTorch uses too: two pools would compete for the same cores. Where there is
# none, Numba falls back to the next layer; the environment variable NUMBA_THREADING_LAYER takes precedence.
numba.config.THREADING_LAYER_PRIORITY = ["omp", "tbb", "workqueue"]


def digest(folder: Path) -> str:
    """A hash of the Python files in a folder."""
    content = blake2b(digest_size=16)
    for path in sorted(folder.glob("*.py")):
        content.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return content.hexdigest()


SOURCES = digest(Path(__file__).parent)


def jit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`numba.njit` that caches compiled code on disk, where a folder for it is writable."""

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            compiled = numba.njit(cache=True, nogil=True, **options)(function)
        except RuntimeError:  # neither the package's folder nor the user's cache is writable
            return numba.njit(nogil=True, **options)(function)
        # Numba compiles again when the function's own file has changed. Functions of other files in this
        # folder are compiled into it too, and there is no public way to declare them. Compiled code names
        # their modules, so it is of no use to a program that imports this folder under another name.
        index: Any = getattr(getattr(compiled, "_cache", None), "_cache_file", None)
        if hasattr(index, "_source_stamp"):
            index._source_stamp = index._source_stamp, SOURCES, __name__
        return compiled

    return decorate


inline = numba.njit(forceinline=True)
"""For helpers that only other kernels call: compiled into their caller, and cached with it."""


def bits(x: torch.Tensor) -> np.ndarray[Any, Any]:
    """A flat NumPy view of a contiguous tensor: fp32 and uint8 as they are, bf16 as uint16, fp16 as int16."""
    views = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}
    return x.detach().view(-1).view(views.get(x.dtype, x.dtype)).numpy()


_one_caller = threading.Lock()  # Numba's fallback threading layer aborts the process on a second caller


def run(serial: Any, parallel: Any, count: int, *args: Any) -> None:
    """Run a kernel on work items 0 .. count - 1, with as many threads as PyTorch uses.

    With one thread, as in a forked data-loading worker, no thread pool is used.

    Args:
        serial: called as serial(start, stop, *args).
        parallel: called as parallel(tasks, count, *args), where each task is a range for `serial`.
        count: number of work items.
        args: further arguments of both.
    """
    threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS, count)
    if threads <= 1:
        serial(0, count, *args)
        return
    with _one_caller:
        before = numba.get_num_threads()
        numba.set_num_threads(threads)
        try:
            parallel(threads, count, *args)
        finally:
            numba.set_num_threads(before)


# --- types ------------------------------------------------------------------------------------------------

_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_WORDS = ir.VectorType(ir.IntType(32), LANES)
_BOOLS = ir.VectorType(ir.IntType(1), LANES)


class _BFloat(ir.Type):
    """LLVM's bf16, which llvmlite does not know."""

    def __str__(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


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


@intrinsic
def pointer(typing_context, array):
    """A pointer to an array's elements. It does not keep the array alive: take it from a function's argument.

    Passing arrays themselves from function to function would count references, atomically, in every call.
    """

    def codegen(context, builder, signature, args):
        return context.make_array(array)(context, builder, args[0]).data

    return types.CPointer(array.dtype)(array), codegen  # type: ignore[attr-defined]


_STORED: dict[types.Type, ir.Type] = {
    types.float32: ir.FloatType(),
    types.uint16: ir.IntType(16),
    types.int16: ir.IntType(16),
    types.uint8: ir.IntType(8),
}
_ALIGNMENT: dict[types.Type, int] = {types.float32: 4, types.uint16: 2, types.int16: 2, types.uint8: 1}


def _address(builder: ir.IRBuilder, start: Any, index: Any, vector: ir.VectorType) -> Any:
    return builder.bitcast(builder.gep(start, [index]), vector.as_pointer())


def _copy(builder: ir.IRBuilder, source: Any, target: Any, count: Any) -> None:
    """Copy `count` elements one at a time; used only for the last, partial block of a row."""
    with cgutils.for_range(builder, count) as loop:
        builder.store(builder.load(builder.gep(source, [loop.index])), builder.gep(target, [loop.index]))


def _to_float(builder: ir.IRBuilder, raw: Any, dtype: types.Type) -> Any:
    if dtype == types.float32:
        return raw
    if dtype == types.uint8:
        return builder.uitofp(raw, _FLOATS)
    if dtype == types.int16:
        return builder.fpext(builder.bitcast(raw, ir.VectorType(ir.HalfType(), LANES)), _FLOATS)
    return builder.bitcast(builder.shl(builder.zext(raw, _WORDS), _words(16)), _FLOATS)


def _from_float(context: Any, builder: ir.IRBuilder, value: Any, dtype: types.Type) -> Any:
    if dtype == types.float32:
        return value
    if dtype == types.uint8:
        return builder.fptoui(value, ir.VectorType(ir.IntType(8), LANES))
    shorts = ir.VectorType(ir.IntType(16), LANES)
    if dtype == types.int16:
        return builder.bitcast(builder.fptrunc(value, ir.VectorType(ir.HalfType(), LANES)), shorts)
    if _has(context, "avx512bf16"):  # one instruction instead of eight
        return builder.bitcast(builder.fptrunc(value, ir.VectorType(_BFloat(), LANES)), shorts)
    # bf16 is the upper half of fp32. To round to nearest even, add 0x7FFF to the lower half, and one more if
    # the upper half is odd. That could carry a NaN over to zero, so NaN is selected separately.
    word = builder.bitcast(value, _WORDS)
    odd = builder.and_(builder.lshr(word, _words(16)), _words(1))
    rounded = builder.add(word, builder.add(odd, _words(0x7FFF)))
    upper = builder.trunc(builder.lshr(rounded, _words(16)), shorts)
    is_nan = builder.fcmp_unordered("uno", value, value)
    return builder.select(is_nan, _every(ir.IntType(16), 0x7FC0), upper)


def emit_load(builder: ir.IRBuilder, start: Any, index: Any, dtype: types.Type) -> Any:
    """Emit what `load` does, for other intrinsics."""
    vector = ir.VectorType(_STORED[dtype], LANES)
    raw = builder.load(_address(builder, start, index, vector), align=_ALIGNMENT[dtype])
    return _to_float(builder, raw, dtype)


@intrinsic
def load(typing_context, start, index):
    """The 16 elements start[index:], as fp32."""

    def codegen(context, builder, signature, args):
        return emit_load(builder, args[0], args[1], start.dtype)

    return _vector(start, types.intp), codegen


@intrinsic
def load_partial(typing_context, start, index, count):
    """The `count` < 16 elements start[index:], as fp32; the lanes after them are 0."""
    element = _STORED[start.dtype]

    def codegen(context, builder, signature, args):
        block = cgutils.alloca_once_value(builder, _every(element, 0))
        source = builder.gep(args[0], [args[1]])
        _copy(builder, source, builder.bitcast(block, source.type), args[2])
        return _to_float(builder, builder.load(block), start.dtype)

    return _vector(start, types.intp, types.intp), codegen


def emit_store(
    context: Any, builder: ir.IRBuilder, start: Any, index: Any, value: Any, dtype: types.Type
) -> None:
    """Emit what `store` does, for other intrinsics."""
    vector = ir.VectorType(_STORED[dtype], LANES)
    stored = _from_float(context, builder, value, dtype)
    builder.store(stored, _address(builder, start, index, vector), align=_ALIGNMENT[dtype])


@intrinsic
def store(typing_context, start, index, value):
    """Store `value` in the 16 elements start[index:], rounded to their dtype."""

    def codegen(context, builder, signature, args):
        emit_store(context, builder, args[0], args[1], args[2], start.dtype)
        return context.get_dummy_value()

    return types.void(start, types.intp, _vector), codegen


@intrinsic
def store_partial(typing_context, start, index, value, count):
    """Store the first `count` < 16 lanes of `value` in start[index:], rounded to their dtype."""

    def codegen(context, builder, signature, args):
        stored = _from_float(context, builder, args[2], start.dtype)
        target = builder.gep(args[0], [args[1]])
        block = cgutils.alloca_once_value(builder, stored)
        _copy(builder, builder.bitcast(block, target.type), target, args[3])
        return context.get_dummy_value()

    return types.void(start, types.intp, _vector, types.intp), codegen


@intrinsic
def bytes_equal(typing_context, start, index, byte):
    """A mask of the lanes whose uint8 element, of the 16 in start[index:], equals `byte`."""
    vector = ir.VectorType(ir.IntType(8), LANES)

    def codegen(context, builder, signature, args):
        raw = builder.load(_address(builder, args[0], args[1], vector), align=1)
        return builder.icmp_unsigned("==", raw, _splat(builder, builder.trunc(args[2], ir.IntType(8))))

    return _mask(start, types.intp, types.intp), codegen


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
def absolute(typing_context, v):
    """|v|, with the sign bit cleared, also of NaN and -0."""
    return _vector(v), lambda context, builder, signature, args: _call(
        builder, f"llvm.fabs.v{LANES}f32", *args
    )


@intrinsic
def exceeds(typing_context, a, b):
    """a > b compared as bits: for positive numbers the same as a > b, except that NaN exceeds infinity."""

    def codegen(context, builder, signature, args):
        return builder.icmp_signed(">", *(builder.bitcast(v, _WORDS) for v in args))

    return _mask(a, b), codegen


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


def _has(context: Any, feature: str) -> bool:
    """Whether the code is generated for a processor with this LLVM feature."""
    return f"+{feature}" in context.codegen().magic_tuple()[2].split(",")


@intrinsic
def estimates_suffice(typing_context, start):
    """Whether results are bf16 and the processor has AVX-512, whose estimates are exact enough for bf16.

    A compile-time constant, so LLVM drops the branch that is not taken.
    """

    def codegen(context, builder, signature, args):
        return ir.Constant(ir.IntType(1), int(start.dtype == types.uint16 and _has(context, "avx512f")))

    return types.boolean(start), codegen


@intrinsic
def estimate_inverse_square_root(typing_context, v):
    """v^(-1/2) to a relative 2^-14: one instruction with AVX-512, else a square root and a division."""

    def codegen(context, builder, signature, args):
        if not _has(context, "avx512f"):
            root = _call(builder, f"llvm.sqrt.v{LANES}f32", args[0])
            return builder.fdiv(_every(ir.FloatType(), 1.0), root)
        all_lanes = ir.IntType(LANES)
        function = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(_FLOATS, [_FLOATS, _FLOATS, all_lanes]),
            "llvm.x86.avx512.rsqrt14.ps.512",
        )
        return builder.call(function, [args[0], args[0], ir.Constant(all_lanes, -1)])

    return _vector(v), codegen


@intrinsic
def guess_inverse_fourth_root(typing_context, v):
    """v^(-1/4) within 4.3% for positive normal v: the bits of a float are nearly its logarithm."""

    def codegen(context, builder, signature, args):
        # The constant was found by search: 1 - v * guess^4 has its smallest range, -0.171 to 0.095.
        quarter = builder.lshr(builder.bitcast(args[0], _WORDS), _words(2))
        return builder.bitcast(builder.sub(_words(0x4F59E580), quarter), _FLOATS)

    return _vector(v), codegen
