"""Triton's compile time for all kernels of AlexNet's training and evaluation, in bf16, without a GPU.

    python -m benchmarks.compile_time [--arch 90] [--rounds 3]

Cold: with an empty cache, one kernel after another, as in the first steps of a run. Warm: in a new process,
from the cache that the cold one left. Writes ``results/compile_time.csv``; its hardware is the machine that
compiled, not the target.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.report import RESULTS, Measurement, write_csv

PAPER = {"size": 5, "alpha": 5e-4, "beta": 0.75, "k": 2.0}
BLOCKS = ((55, 96), (27, 256))  # pixels per side and channels of the two activations that are normalised
INPUT = ("augment", "ten_crop")
BATCH = 128


def launches() -> Iterator[Any]:
    """One launch of each kernel, on meta tensors."""
    from fastalex.kernels import augment_triton, lrn_triton

    for case in augment_triton.inspect_cases():
        if case.name in INPUT:
            yield case.launch(torch.bfloat16, BATCH, torch.device("meta"))
    for side, channels in BLOCKS:
        pooled = (side - 3) // 2 + 1
        with torch.device("meta"):
            x = torch.empty(BATCH, side, side, channels, dtype=torch.bfloat16)
            y = torch.empty(BATCH, pooled, pooled, channels, dtype=torch.bfloat16)
            argmax = torch.empty_like(y, dtype=torch.uint8)
        yield lrn_triton._pool_forward(x, y, argmax, **PAPER)
        yield from lrn_triton._pool_backward(y, argmax, x, torch.empty_like(x), **PAPER)


def compile_all(arch: int) -> float:
    """Compile all kernels in this process; return the seconds, without Triton's import."""
    from fastalex.kernels import _aot

    wanted = list(launches())
    began = time.perf_counter()
    for launch in wanted:
        _aot.compile_kernel(launch, arch)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile_time")
    parser.add_argument("--arch", type=int, default=90, help="compute capability times ten")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)  # what each process runs
    given = parser.parse_args()
    if given.once:
        print(json.dumps(compile_all(given.arch)))
        return
    command = [sys.executable, "-m", "benchmarks.compile_time", "--once", "--arch", str(given.arch)]
    found: dict[str, list[float]] = {"cold": [], "warm": []}
    for _ in range(given.rounds):
        with tempfile.TemporaryDirectory() as cache:
            for values in found.values():
                environment = {**os.environ, "TRITON_CACHE_DIR": cache}
                done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
                values.append(json.loads(done.stdout))
    subject = {"measurement": "AlexNet's Triton kernels, bf16"}
    measurements = [
        Measurement.of({**subject, "cache": cache, "arch": f"sm_{given.arch}"}, "s", values)
        for cache, values in found.items()
    ]
    write_csv(measurements, RESULTS / "compile_time.csv", "cpu")
    for m in measurements:
        print(f"{m['measurement']}, {m['arch']}, {m['cache']}: {m.median:.1f} s")


if __name__ == "__main__":
    main()
