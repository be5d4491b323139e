"""The kernels' times under several launch configurations.

    python -m benchmarks.card.tiling FOLDER ROOT [--toy]

Times the pooled kernels at AlexNet's two shapes with several block sizes, strip heights and register caps,
and every kernel with the configuration in use. Rewrites ``tiling.json`` after each figure. Without a GPU it
describes every launch, on meta tensors, and runs none.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.card.place import given_place
from benchmarks.hardware import DEVICE, seconds_of
from fastalex.files import write_text
from fastalex.kernels import augment_triton, factored_sgd_triton, lrn_triton
from fastalex.kernels._triton_launch import Launch, dtype_name

BATCH = 128
SHAPES = (
    (55, 96),
    (27, 256),
)  # pixels per side and channels of the activations that AlexNet normalises and pools
POOL_FORWARD, POOL_BACKWARD = "relu_lrn_max_pool forward", "relu_lrn_max_pool backward"
# Lanes per block, with one warp per 32 of them, and the most registers per thread.
BLOCKS: dict[str, tuple[tuple[int, int | None], ...]] = {
    POOL_FORWARD: ((128, None), (64, None), (256, None)),
    POOL_BACKWARD: (
        *((128, registers) for registers in (64, 72, 80, 96, None)),
        *((block, registers) for registers in (64, 80) for block in (64, 256)),
    ),
}
ROWS = {POOL_FORWARD: (3, 5, 9, 14, 27), POOL_BACKWARD: (2, 4, 7, 14)}  # per strip
DTYPES = (torch.bfloat16, torch.float32)
COMPILERS = 12  # processes; compiling a kernel takes seconds
SOURCE = (
    "python -m benchmarks.card.tiling: times by benchmarks.hardware.seconds_of, with the L2 cache flushed "
    "before each call"
)


UPDATED = ("weight_pointer", "velocity_pointer")  # arguments that a kernel reads and writes


@dataclass(frozen=True)
class Tiling:
    """A kernel with one launch configuration, and its time.

    Attributes:
        kernel: as `fastalex.kernels.inspect` calls it.
        shape: of the activation, of the batch that `augment` writes, or of the weight, as it lies in memory.
        dtype: of the activation, the batch or the gradient's factors.
        block: lanes per program, or weights on each side of its tile.
        warps: of 32 threads, per program.
        maxnreg: the most registers per thread; None leaves it to the compiler.
        rows: height of the strip that one lane works on; None if there are no strips, or it was not recorded.
        microseconds: of one call; None if it was not timed.
        bytes: of all tensors that the kernel reads or writes, once, and of those that it updates, twice.
    """

    kernel: str
    shape: str
    dtype: str
    block: int
    warps: int
    maxnreg: int | None
    rows: int | None
    microseconds: float | None
    bytes: int


def configuration(launch: Launch) -> dict[str, Any]:
    """The launch configuration, by the names of `Tiling`."""
    rows = launch.arguments.get("rows", launch.arguments.get("ROWS"))
    return {
        "block": launch.arguments.get("BLOCK", launch.arguments.get("TILE")),
        "warps": launch.warps,
        "maxnreg": launch.maxnreg,
        "rows": rows,
    }


def described(kernel: str, launch: Launch, microseconds: float | None = None) -> Tiling:
    """Describe a launch."""
    tensors = launch.tensors
    if "weight_pointer" in tensors:
        main, dtype = tensors["weight_pointer"], tensors["output_pointer"].dtype
    else:
        main = tensors["x_pointer"] if "x_pointer" in tensors else tensors["out_pointer"].movedim(1, -1)
        dtype = main.dtype
    return Tiling(
        kernel,
        "x".join(map(str, main.shape)),
        dtype_name(dtype),
        **configuration(launch),
        microseconds=microseconds,
        bytes=sum(
            prod(tensor.shape) * tensor.element_size() * (2 if name in UPDATED else 1)
            for name, tensor in tensors.items()
        ),
    )


def pooled(kernel: str, height: int, channels: int, batch: int, device: str) -> Callable[..., Launch]:
    """A function from block, register cap and strip height to the launch of a pooled kernel in bf16."""
    side = (height - 3) // 2 + 1
    whole, small = (batch, height, height, channels), (batch, side, side, channels)
    x = torch.randn(whole, dtype=torch.bfloat16, device=device)
    y, grad = (torch.randn(small, dtype=torch.bfloat16, device=device) for _ in range(2))
    argmax = torch.randint(9, small, dtype=torch.uint8, device=device)
    dx = torch.empty_like(x)

    def launch(block: int, registers: int | None, rows: int) -> Launch:
        cut: dict[str, Any] = {"_BLOCK": block, "_WARPS": block // 32}
        cut |= {"_FORWARD_ROWS": rows, "_BACKWARD_ROWS": rows, "_POOL_BACKWARD_REGISTERS": registers}
        with mock.patch.multiple(lrn_triton, **cut):
            if kernel == POOL_FORWARD:
                return lrn_triton._pool_forward(x, y, argmax, **lrn_triton._PAPER)
            return lrn_triton._pool_backward(grad, argmax, x, dx, **lrn_triton._PAPER)[0]

    return launch


def launches_in_use(batch: int, device: str) -> Iterator[tuple[str, Launch]]:
    """Every kernel's name and its launch as fastalex makes it, at the shape that `inspect` uses."""
    for module in (lrn_triton, augment_triton, factored_sgd_triton):
        for case in module.inspect_cases():
            for dtype in DTYPES:
                if device == "meta":
                    yield case.name, case.launch(dtype, batch, torch.device("meta"))
                    continue
                launch = case.launch(dtype, batch, torch.device("cpu"))
                there = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in launch.arguments.items()}
                yield case.name, replace(launch, arguments=there)


def launches(batch: int, device: str) -> Iterator[tuple[str, Launch]]:
    """Every launch to be timed, with its kernel's name."""
    yield from launches_in_use(batch, device)
    for shape in SHAPES:
        for kernel, cuts in BLOCKS.items():
            launch = pooled(kernel, *shape, batch, device)
            for block, registers in cuts:
                for rows in ROWS[kernel]:
                    yield kernel, launch(block, registers, rows)


def compile_some(worker: int, workers: int) -> None:
    """Compile one worker's share of the kernels into Triton's cache, which all processes share."""
    seen: set[tuple[Any, ...]] = set()
    for name, launch in launches(1, DEVICE):  # neither batch nor strip height changes the kernel
        row = described(name, launch)
        key = (name, row.shape, row.dtype, row.block, row.warps, row.maxnreg)
        if key not in seen and len(seen) % workers == worker:
            launch.run()
        seen.add(key)
    torch.cuda.synchronize()


def compile_all() -> None:
    """Compile the kernels in parallel: one after another they take minutes."""
    workers = min(COMPILERS, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for done in [pool.submit(compile_some, worker, workers) for worker in range(workers)]:
            done.result()


def write(folder: Path, rows: Sequence[Tiling], source: str = SOURCE) -> None:
    """Write ``tiling.json``, one launch per line."""
    lines = ",\n  ".join(json.dumps(asdict(row)) for row in rows)
    write_text(
        folder / "tiling.json", f'{{\n "source": {json.dumps(source)},\n "rows": [\n  {lines}\n ]\n}}\n'
    )


def measure(folder: Path, batch: int, timed: bool) -> None:
    """Describe every launch and, if `timed`, run and time it."""
    found: list[Tiling] = []
    for name, launch in launches(batch, DEVICE if timed else "meta"):
        spent = 1e6 * seconds_of(launch.run)[0] if timed else None
        found.append(described(name, launch, spent))
        if timed:
            print(found[-1], flush=True)
            write(folder, found)
    write(folder, found)


def main() -> None:
    given = given_place("tiling")
    timed = DEVICE == "cuda"
    if timed:
        compile_all()
    measure(given.folder, 1 if given.toy else BATCH, timed)


if __name__ == "__main__":
    main()
