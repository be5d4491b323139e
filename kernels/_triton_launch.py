"""How fastalex launches a Triton kernel, and how it describes one to `python -m fastalex.kernels.inspect`.

A kernel file (`*_triton.py`) builds a `Launch` - the kernel, its grid and its arguments by name - and runs
it. Because a launch is described before it happens, `inspect` can take the very same description and
compile it for a GPU that is not there, or run it in Triton's interpreter and count the bytes. Nothing is
written down twice.

To have its kernels inspected, a kernel file defines `inspect_cases() -> list[KernelCase]` and is named in
`inspect.KERNEL_MODULES`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

# Names of arguments of which one compiled kernel serves every value (`do_not_specialize`). Triton would
# otherwise compile it anew, which takes seconds, for values that 16 divides, for 1, and for all others: for
# the last batch of an epoch, and for another crop. The price is a few divisions a lane.
SIZES = ["elements", "vectors", "batch", "height", "width", "rows", "image_count"]
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1, set before Triton was imported)."""
    return bool(triton.knobs.runtime.interpret)


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    kernel: a `@triton.jit` function.
    programs: how many of it, in one dimension.
    arguments: every argument by parameter name.
    warps: of 32 threads, to a program.
    maxnreg: registers that a thread has at most; None leaves it to the compiler.
    """

    kernel: Any
    programs: int
    arguments: Mapping[str, Tensor | int | float | bool]
    warps: int
    maxnreg: int | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.arguments.items() if isinstance(value, Tensor)}

    @property
    def options(self) -> dict[str, int]:
        """What the compiler is told beside the arguments."""
        return {"num_warps": self.warps, **({"maxnreg": self.maxnreg} if self.maxnreg else {})}

    def run(self) -> None:
        if is_interpreted():
            self.kernel[(self.programs,)](**self.arguments)
            return
        device = next(iter(self.tensors.values())).device
        # Triton launches on the current device, which need not be the one the tensors are on.
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            self.kernel[(self.programs,)](**self.arguments, **self.options)


@dataclass(frozen=True)
class KernelCase:
    """A kernel at the shape AlexNet gives it, and what is promised about it.

    name: the row's name in the table.
    launch: from (dtype, batch, device) to a `Launch`. Called with the meta device to compile (no memory is
        touched) and with the CPU to count bytes.
    writes: the names of the tensor arguments that the kernel writes; it reads the others.
    elements: the name of the tensor argument whose elements the byte counts are divided by.
    traffic_limit: bytes moved over the floor, at most.
    vector_loads, vector_stores: how many accesses of eight channels (128 bits in bf16 and fp16, two times 128
        in fp32) the kernel's text has, at least.
    narrowest_store: bits of the narrowest global store allowed (a one-byte argmax of eight channels is 64).
    eager: from (dtype, batch) to a function that does on meta tensors what plain PyTorch would, or None.
    dtypes: what to compile for.
    """

    name: str
    launch: Callable[[torch.dtype, int, torch.device], Launch]
    writes: tuple[str, ...]
    elements: str
    traffic_limit: float
    vector_loads: int
    vector_stores: int
    narrowest_store: int = 128
    eager: Callable[[torch.dtype, int], Callable[[], object]] | None = None
    dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES
