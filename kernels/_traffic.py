"""Count the bytes that a Triton kernel loads and stores, by running it in Triton's interpreter.

With TRITON_INTERPRET=1 set before Triton is imported, `@triton.jit` functions run on CPU tensors, one program
after the other, in NumPy. Every load and store then calls one of two methods with its addresses and its mask;
`count` records those. `mended` corrects the interpreter where it differs from a GPU for these kernels.

`python -m fastalex.kernels._traffic --modules NAME ...` prints the counts of these modules' cases as JSON.
`inspect` runs that in a separate process, because one process cannot both interpret and compile.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter

from ._triton_launch import FLOAT_DTYPES, KernelCase, Launch, dtype_name, is_interpreted

_SECTOR = 32  # bytes, the unit in which a GPU accesses memory
_BATCH = 1


@dataclass(frozen=True)
class Traffic:
    """Bytes and faults of one launch.

    moved: bytes in the 32-byte sectors that a program touches, each sector once per program (or per wave of
        programs, see `KernelCase`), summed over the programs. That is the memory traffic if the L1 cache
        serves everything that a program touches again, and the L2 cache serves nothing that another program
        (of another wave) has touched.
    floor: bytes read by any program, and bytes written by any, each once.
    elements: number of elements of the tensor that the case names.
    out_of_bounds: lanes that accessed memory outside every tensor, stored to an input, or loaded from an
        output.
    unwritten, rewritten: elements of the outputs that were never stored, or more than once.
    """

    moved: int
    floor: int
    elements: int
    out_of_bounds: int
    unwritten: int
    rewritten: int


class _Recorder:
    def __init__(self, tensors: dict[str, Tensor], case: KernelCase) -> None:
        self.spans = {
            name: (t.data_ptr(), t.data_ptr() + t.numel() * t.element_size(), t.element_size())
            for name, t in tensors.items()
        }
        self.stored = {*case.writes, *case.updates}
        self.loaded = tensors.keys() - set(case.writes)
        self.touched = {
            (name, stores): np.zeros(tensors[name].numel(), np.int64)
            for stores, names in ((True, self.stored), (False, self.loaded))
            for name in names & tensors.keys()
        }
        self.wave = case.wave
        self.sectors: list[np.ndarray] = []  # of the wave that is running
        self.running: int | None = None
        self.moved = 0
        self.out_of_bounds = 0

    def record(self, program: tuple[int, ...], pointers: np.ndarray, mask: Any, stores: bool) -> Any:
        """Record an access; returns its mask without the lanes that are out of bounds."""
        if program[0] // self.wave != self.running:
            self.finish_wave()
            self.running = program[0] // self.wave
        lanes = mask.data.astype(bool)
        addresses = np.broadcast_to(pointers, lanes.shape)[lanes].astype(np.int64)
        known = np.zeros(addresses.shape, bool)
        for name, (start, end, width) in self.spans.items():
            touched = self.touched.get((name, stores))
            if touched is None:
                continue
            inside = (addresses >= start) & (addresses + width <= end)
            known |= inside
            np.add.at(touched, (addresses[inside] - start) // width, 1)
        self.out_of_bounds += int((~known).sum())
        self.sectors.append(np.unique(addresses[known] // _SECTOR) * 2 + stores)
        lanes[lanes] = known
        return interpreter.TensorHandle(lanes, mask.dtype)

    def finish_wave(self) -> None:
        if self.sectors:
            self.moved += _SECTOR * len(np.unique(np.concatenate(self.sectors)))
        self.sectors = []


@contextlib.contextmanager
def _replaced(where: Any, **functions: Callable[..., Any]) -> Iterator[None]:
    """Replace functions of a class or module of the interpreter within a `with` block."""
    originals = {name: getattr(where, name) for name in functions}
    for name, function in functions.items():
        setattr(where, name, function)
    try:
        yield
    finally:
        for name, function in originals.items():
            setattr(where, name, function)


def patch_language_once() -> None:
    """Patch Triton's language once, not at each call of a device function (`tl.sum` is one too).

    Patching inspects every attribute of the language, which takes half of the time. The language stays
    patched, so this is for a process that only interprets.
    """
    interpreter._LangPatchScope.restore = lambda scope: None
    interpreter._patch_lang = functools.cache(interpreter._patch_lang)
    # This one makes its table at each call. A pointer, which has no hash, is never looked up in it.
    uncached = interpreter._get_np_dtype
    cached = functools.cache(uncached)
    interpreter._get_np_dtype = lambda dtype: (
        uncached(dtype) if dtype.scalar.is_ptr() else cached(dtype.scalar)
    )


@contextlib.contextmanager
def mended() -> Iterator[None]:
    """Make the interpreter round fp32 to bf16 to nearest even, as GPUs do, and multiply matrices of bf16.

    It holds bf16 as 16-bit integers, and multiplies those. Before Triton 3.8 it also converts a tensor to an
    index in a way that NumPy 2.5 no longer supports.
    """
    original = interpreter.InterpreterBuilder.cast_impl
    multiply = interpreter.InterpreterBuilder.create_dot
    patch_tensor = interpreter._patch_lang_tensor

    def cast(builder: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
            return original(builder, source, target)
        rounded = torch.from_numpy(np.array(source.data, np.float32)).bfloat16()
        return interpreter.TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def dot(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
        return multiply(builder, widened(a), widened(b), *rest)

    def patch_tensor_and_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    with (
        _replaced(interpreter.InterpreterBuilder, cast_impl=cast, create_dot=dot),
        _replaced(interpreter, _patch_lang_tensor=patch_tensor_and_index),
    ):
        yield


def count(case: KernelCase, launch: Launch) -> Traffic:
    """Run a launch on CPU tensors in the interpreter, and count.

    Raises:
        RuntimeError: TRITON_INTERPRET was not set when Triton was imported.
    """
    if not is_interpreted():
        raise RuntimeError("counting needs TRITON_INTERPRET=1 in the environment before Triton is imported")
    recorder = _Recorder(launch.tensors, case)
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def counted_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        mask = recorder.record(tuple(self.grid_idx), pointers.data, mask, stores=False)
        return load(self, pointers, mask, *rest)

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        mask = recorder.record(tuple(self.grid_idx), pointers.data, mask, stores=True)
        return store(self, pointers, value, mask, *rest)

    with mended(), _replaced(builder, create_masked_load=counted_load, create_masked_store=counted_store):
        launch.run()
    recorder.finish_wave()
    written = np.concatenate([times for (_, stores), times in recorder.touched.items() if stores])
    return Traffic(
        moved=recorder.moved,
        floor=sum(
            int((times > 0).sum()) * recorder.spans[name][2] for (name, _), times in recorder.touched.items()
        ),
        elements=launch.tensors[case.elements].numel(),
        out_of_bounds=recorder.out_of_bounds,
        unwritten=int((written == 0).sum()),
        rewritten=int((written > 1).sum()),
    )


def problems(case: KernelCase, traffic: Traffic) -> list[str]:
    """The promises of the case that the counts break, one line each."""
    found = []
    if traffic.out_of_bounds:
        found.append(f"{traffic.out_of_bounds} accesses out of bounds")
    if traffic.unwritten or traffic.rewritten:
        found.append(f"{traffic.unwritten} output elements not written, {traffic.rewritten} more than once")
    if traffic.moved > case.traffic_limit * traffic.floor:
        ratio = traffic.moved / traffic.floor
        found.append(f"moves {ratio:.3f} times the floor, more than {case.traffic_limit}")
    return found


class _EagerBytes(TorchDispatchMode):
    """Add up the bytes that every operator reads and writes, except views and empty tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in str(func) and func.namespace != "prim":
            written = result
            if result is None:  # an operator on lists of tensors does not return what it changes
                parameters = zip(args, func._schema.arguments, strict=False)
                # _fused_sgd_ declares that it changes the gradients, but does so only with a loss scaler.
                written = [
                    a for a, p in parameters if p.alias_info and p.alias_info.is_write and p.name != "grads"
                ]
            for values in ((args, kwargs), written):
                distinct = {id(v): v for v in tree_leaves(values) if isinstance(v, Tensor)}.values()
                self.total += sum(
                    min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in distinct
                )
        return result


def eager_bytes(case: KernelCase, dtype: torch.dtype, batch: int) -> int | None:
    """Bytes that plain PyTorch's operators would read and write for the same result."""
    if case.eager is None:
        return None
    run = case.eager(dtype, batch)
    with _EagerBytes() as counter:
        run()
    return counter.total


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fastalex.kernels._traffic")
    parser.add_argument("--modules", nargs="+", required=True)
    parser.add_argument("--dtype", nargs="+", default=[dtype_name(dtype) for dtype in FLOAT_DTYPES])
    parser.add_argument("--kernel", default="")
    arguments = parser.parse_args()
    patch_language_once()
    rows = []
    for name in arguments.modules:
        for case in importlib.import_module(name).inspect_cases():
            for dtype in case.dtypes:
                if arguments.kernel not in case.name or dtype_name(dtype) not in arguments.dtype:
                    continue
                traffic = count(case, case.launch(dtype, _BATCH, torch.device("cpu")))
                rows.append(
                    {
                        "kernel": case.name,
                        "dtype": dtype_name(dtype),
                        **asdict(traffic),
                        "step_elements": case.step_elements,
                        "eager": eager_bytes(case, dtype, _BATCH),
                        "problems": problems(case, traffic),
                    }
                )
                print(case.name, dtype, file=sys.stderr, flush=True)
    json.dump(rows, sys.stdout)


if __name__ == "__main__":
    main()
