"""Compile a Triton kernel ahead of time, for a GPU that need not be present, and read its machine code.

Triton compiles to PTX, and the `ptxas` that it ships compiles that to the GPU's machine code; neither needs a
GPU. `cuobjdump`, which it ships too, prints the registers and the instructions. This does not work in a
process that runs the interpreter (TRITON_INTERPRET=1), where `@triton.jit` does not return a function that
compiles.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ._triton_launch import KernelCase, Launch

_POINTER = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class Sm:
    """The limits of one streaming multiprocessor."""

    warps: int
    blocks: int
    shared: int  # bytes


# CUDA C++ Programming Guide, "Compute Capabilities", table "Technical Specifications per Compute Capability".
# Each has 65,536 registers, in four partitions of 16,384, allocated to a warp in units of 256 (the rules of
# the occupancy calculator in Nsight Compute).
ARCHITECTURES = {
    80: Sm(64, 32, 164 * 1024),  # A100
    86: Sm(48, 16, 100 * 1024),  # RTX 30
    89: Sm(48, 24, 100 * 1024),  # RTX 40, L4
    90: Sm(64, 32, 228 * 1024),  # H100, H200
    100: Sm(64, 32, 228 * 1024),  # B200
    120: Sm(48, 24, 100 * 1024),  # RTX 50
}


@dataclass(frozen=True)
class MachineCode:
    """A compiled kernel in numbers. `loads` and `stores` count instructions by width in bits."""

    registers: int  # per thread
    stack: int  # bytes per thread
    shared: int  # bytes per program; requested at the launch, so the machine code does not tell them
    local_accesses: int  # instructions that spill, or access an array in local memory
    loads: dict[int, int]
    stores: dict[int, int]
    instructions: int


def _signature(
    launch: Launch,
) -> tuple[dict[str, str], dict[str, object], dict[tuple[int], list[list[object]]]]:
    """Types, constants and alignments, as Triton's launcher would derive them from the arguments."""
    kernel = launch.kernel
    constants = {p.name for p in kernel.params if p.is_constexpr}
    serves_all = {p.name for p in kernel.params if p.do_not_specialize}
    types: dict[str, str] = {}
    values: dict[str, object] = {}
    attributes: dict[tuple[int], list[list[object]]] = {}
    for i, name in enumerate(kernel.arg_names):
        value = launch.arguments.get(name)
        divisible = False
        is_one = isinstance(value, int) and value == 1 and name not in serves_all
        is_none = value is None and name in launch.arguments
        if name in constants or is_one or is_none:
            types[name] = "constexpr"
            if name in launch.arguments:
                values[name] = value
        elif isinstance(value, Tensor):
            types[name] = _POINTER[value.dtype]
            divisible = True  # PyTorch's allocator aligns to 512 bytes
        elif isinstance(value, float):
            types[name] = "fp32"
        elif isinstance(value, int):
            types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible = value % 16 == 0 and name not in serves_all
        else:
            raise ValueError(f"{kernel.__name__}: no tensor or number for the argument {name!r}")
        if divisible:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return types, values, attributes


def compile_kernel(launch: Launch, arch: int) -> Any:
    """Compile a launch's kernel for compute capability arch / 10."""
    source = ASTSource(launch.kernel, *_signature(launch))
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)


def compile_launch(launch: Launch, arch: int) -> MachineCode:
    """Compile a launch's kernel for compute capability arch / 10, and read its machine code."""
    compiled = compile_kernel(launch, arch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage, sass = _dump("--dump-resource-usage", cubin.name), _dump("-sass", cubin.name)
    return _read(usage, sass, compiled.metadata.shared)


def _dump(option: str, path: str) -> str:
    command = [knobs.nvidia.cuobjdump.path, option, path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _read(resources: str, sass: str, shared: int) -> MachineCode:
    usage = {name: int(value) for name, value in re.findall(r"\b(REG|STACK):(\d+)", resources)}
    # A line is `/*0590*/  @P0 LDG.E.128 R4, ... ;`: address, perhaps a predicate, the instruction.
    pattern = r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.a-z]*)"
    instructions = Counter(re.findall(pattern, sass, re.MULTILINE))
    loads: Counter[int] = Counter()
    stores: Counter[int] = Counter()
    for name, count in instructions.items():
        width = re.search(r"\.[US]?(8|16|64|128|256)\b", name)
        if name.startswith(("LDG", "STG")):
            (loads if name.startswith("LDG") else stores)[int(width.group(1)) if width else 32] += count
    return MachineCode(
        registers=usage["REG"],
        stack=usage["STACK"],
        shared=shared,
        local_accesses=sum(n for name, n in instructions.items() if name.startswith(("LDL", "STL"))),
        loads=dict(sorted(loads.items(), reverse=True)),
        stores=dict(sorted(stores.items(), reverse=True)),
        instructions=sum(n for name, n in instructions.items() if name != "NOP"),
    )


def occupancy(arch: int, registers: int, shared: int, warps: int) -> float:
    """The fraction of an SM's warps that can be in flight.

    Args:
        arch: a key of `ARCHITECTURES`.
        registers: per thread.
        shared: bytes per program.
        warps: per program.
    """
    sm = ARCHITECTURES[arch]
    registers_per_warp = -(-registers * 32 // 256) * 256
    blocks = min(sm.blocks, sm.warps // warps, 16384 // registers_per_warp * 4 // warps)
    if shared:
        blocks = min(blocks, sm.shared // (shared + 1024))  # CUDA reserves 1 KB per block
    return blocks * warps / sm.warps


def problems(case: KernelCase, dtype: torch.dtype, code: MachineCode) -> list[str]:
    """The promises of the case that the machine code breaks, one line each."""
    wide = 2 if dtype == torch.float32 else 1  # accesses of 128 bits for eight channels
    found = []
    if code.stack or code.local_accesses:
        found.append(f"spills: {code.stack} bytes of stack, {code.local_accesses} accesses to local memory")
    for kind, counts, wanted in (
        ("load", code.loads, case.vector_loads * wide),
        ("store", code.stores, case.vector_stores * wide),
    ):
        if counts.get(128, 0) + counts.get(256, 0) < wanted:
            found.append(f"{counts.get(128, 0)} {kind}s of 128 bits, fewer than {wanted}")
    narrowest = min(code.stores, default=0)
    if narrowest < case.narrowest_store:
        found.append(f"a store of {narrowest} bits, narrower than {case.narrowest_store}")
    return found
