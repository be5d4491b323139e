"""A description of a Triton kernel launch, used both to run it and to inspect it.

A kernel file (`*_triton.py`) builds a `Launch` - the kernel, its grid and its arguments by name - and runs
it. `python -m fastalex.kernels.inspect` takes the same description and compiles it for a GPU that is not
present, or runs it in Triton's interpreter and counts the bytes.

To have its kernels inspected, a kernel file defines `inspect_cases(quick: bool = False) -> list[KernelCase]`
and is named in `inspect.KERNEL_MODULES`. With `quick` the largest tensors are smaller, so that the
interpreter takes less time; the promises are the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

# Arguments for which a kernel is not specialised (`do_not_specialize`). Triton would otherwise compile one
# kernel for multiples of 16, one for 1 and one for all other values, each in seconds: for the last batch of
# an epoch, or for another crop. The price is a few divisions per lane.
SIZES = ["vectors", "batch", "height", "width", "rows", "image_count"]
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
    programs: the size of the one-dimensional grid.
    arguments: every argument by parameter name; None for a tensor that a launch does without.
    warps: warps (of 32 threads) per program.
    maxnreg: registers per thread, at most; None leaves it to the compiler.
    stages: stages of a software pipeline over a loop's loads; None leaves it to the compiler.
    """

    kernel: Any
    programs: int
    arguments: Mapping[str, Tensor | int | float | bool | None]
    warps: int
    maxnreg: int | None = None
    stages: int | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.arguments.items() if isinstance(value, Tensor)}

    @property
    def options(self) -> dict[str, int]:
        """The options for the compiler."""
        chosen = {"maxnreg": self.maxnreg, "num_stages": self.stages}
        return {"num_warps": self.warps, **{name: value for name, value in chosen.items() if value}}

    def run(self) -> None:
        if is_interpreted():
            self.kernel[(self.programs,)](**self.arguments)
            return
        device = next(iter(self.tensors.values())).device
        # Triton launches on the current device, which need not be the tensors' device.
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            self.kernel[(self.programs,)](**self.arguments, **self.options)


@dataclass(frozen=True)
class KernelCase:
    """A kernel at AlexNet's shape, and what its file promises about it.

    name: the row's name in the table.
    launch: from (dtype, batch, device) to a `Launch`. Called with the meta device to compile (no memory is
        touched) and with the CPU to count bytes.
    writes: the names of the tensor arguments that the kernel writes; it reads the others.
    updates: those that it reads and writes.
    step_elements: the elements that a training step has, where that is not a number for each image; None to
        multiply those of the counted image by the images of a batch.
    wave: programs, consecutive in the grid, that read a sector from memory once between them, since they run
        at the same time and the L2 cache serves all but the first.
    elements: the name of the tensor argument whose number of elements divides the byte counts.
    traffic_limit: the ratio of bytes moved to the floor, at most.
    vector_loads, vector_stores: how many accesses of eight channels (128 bits in bf16 and fp16, two times 128
        in fp32) the kernel's code has, at least.
    narrowest_store: bits of the narrowest global store allowed (a one-byte argmax of eight channels is 64).
    eager: from (dtype, batch) to a function that runs plain PyTorch's operators on meta tensors, or None.
    dtypes: the dtypes to compile for.
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
    updates: tuple[str, ...] = ()
    step_elements: int | None = None
    wave: int = 1
