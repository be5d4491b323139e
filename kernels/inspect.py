"""Inspect the Triton kernels without a GPU: `python -m fastalex.kernels.inspect`.

Compiles every kernel for six GPU architectures and reads registers, spills and the width of memory accesses
from the machine code (`_aot`). Runs every kernel in Triton's interpreter and counts the bytes that it moves,
beside the fewest that it could move and those that plain PyTorch moves (`_traffic`). Prints both tables,
writes them to `benchmarks/results/kernels_inspect.md` and `.json`, and exits with 1 if a kernel breaks what
its file promises. `docs/gpu.md` explains how to read them. Takes some minutes; kernels are cached.

    python -m fastalex.kernels.inspect                           everything
    python -m fastalex.kernels.inspect --arch 89 --dtype bfloat16 --kernel pool --no-write

**A new kernel file** joins with an `inspect_cases(quick: bool = False) -> list[KernelCase]` (see
`_triton_launch`) and its name in `KERNEL_MODULES`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton

from . import _aot
from ._triton_launch import FLOAT_DTYPES, KernelCase, dtype_name, is_interpreted

KERNEL_MODULES = (
    "fastalex.kernels.lrn_triton",
    "fastalex.kernels.augment_triton",
    "fastalex.kernels.factored_sgd_triton",
)
RESULTS = Path("benchmarks/results")
BATCH = 128
BANDWIDTH = {"RTX 4070 Ti SUPER": 672e9, "H100": 3350e9}  # bytes per second, from NVIDIA's data sheets
_BYTES = ("moved", "floor", "eager")


@dataclass(frozen=True)
class _Job:
    module: str
    case: int
    dtype: torch.dtype
    arch: int


def _cases(module: str) -> list[KernelCase]:
    return importlib.import_module(module).inspect_cases()


def _compile(job: _Job) -> dict[str, Any]:
    case = _cases(job.module)[job.case]
    launch = case.launch(job.dtype, BATCH, torch.device("meta"))
    code = _aot.compile_launch(launch, job.arch)
    tiling = {
        name: launch.arguments[name] for name in ("BLOCK", "ROWS", "rows", "TILE") if name in launch.arguments
    }
    return {
        "kernel": case.name,
        "dtype": dtype_name(job.dtype),
        "arch": job.arch,
        "config": {**tiling, **launch.options},
        **asdict(code),
        "occupancy": _aot.occupancy(job.arch, code.registers, code.shared, launch.warps),
        "problems": _aot.problems(case, job.dtype, code),
    }


def _jobs(archs: list[int], dtypes: list[str], kernel: str) -> list[_Job]:
    jobs = []
    for module in KERNEL_MODULES:
        for i, case in enumerate(_cases(module)):
            for dtype in case.dtypes:
                if kernel not in case.name or dtype_name(dtype) not in dtypes:
                    continue
                jobs += [_Job(module, i, dtype, arch) for arch in archs]
    return jobs


def _count(dtypes: list[str], kernel: str) -> list[dict[str, Any]]:
    """Byte counts of every case, from a separate process that runs the interpreter."""
    command = [sys.executable, "-m", "fastalex.kernels._traffic", "--modules", *KERNEL_MODULES]
    command += ["--dtype", *dtypes, "--kernel", kernel]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    process = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(process.stdout)


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _traffic_table(traffic: list[dict[str, Any]]) -> str:
    rows = []
    for row in traffic:
        elements, eager = row["elements"], row["eager"]
        moved, floor = row["moved"] / elements, row["floor"] / elements
        rows.append(
            [
                row["kernel"],
                row["dtype"],
                f"{floor:.2f}",
                f"{moved:.2f}",
                f"{moved / floor:.3f}",
                "" if eager is None else f"{eager / elements:.1f}",
                "" if eager is None else f"{eager / row['moved']:.1f}",
            ]
        )
    return _table(["kernel", "dtype", "floor", "moved", "moved / floor", "eager", "eager / moved"], rows)


def _time_table(traffic: list[dict[str, Any]]) -> str:
    """Microseconds for the bytes at the full memory bandwidth, at batch 128."""
    header = ["kernel", "dtype", *(f"{gpu}, {key}" for gpu in BANDWIDTH for key in _BYTES)]
    rows = []
    for row in traffic:
        repeats = row["step_elements"] / row["elements"] if row["step_elements"] else BATCH
        times = [
            "" if row[key] is None else f"{row[key] * repeats / bandwidth * 1e6:,.0f}"
            for bandwidth in BANDWIDTH.values()
            for key in _BYTES
        ]
        rows.append([row["kernel"], row["dtype"], *times])
    return _table(header, rows)


def _code_table(codes: list[dict[str, Any]]) -> str:
    def widths(counts: dict[int, int]) -> str:
        return ", ".join(f"{n} x {bits}" for bits, n in counts.items())

    rows = [
        [
            row["kernel"],
            row["dtype"],
            f"sm_{row['arch']}",
            " ".join(f"{key}={value}" for key, value in row["config"].items()),
            str(row["registers"]),
            str(row["stack"]),
            str(row["shared"]),
            widths(row["loads"]),
            widths(row["stores"]),
            f"{row['occupancy']:.0%}",
            str(row["instructions"]),
        ]
        for row in codes
    ]
    header = ["kernel", "dtype", "arch", "configuration", "registers", "stack", "shared"]
    header += ["loads (bits)", "stores (bits)", "occupancy", "instructions"]
    return _table(header, rows)


def report(traffic: list[dict[str, Any]], codes: list[dict[str, Any]]) -> str:
    """The Markdown that the command prints and writes."""
    return f"""# The Triton kernels, seen without a GPU

Written by `python -m fastalex.kernels.inspect` (triton {triton.__version__}, torch {torch.__version__}).
How to read it: [docs/gpu.md](../../docs/gpu.md). No GPU took part.

## Bytes an element

Counted in Triton's interpreter, one image; for `factored_sgd` a weight of 1024x1024 and 128 images.

{_traffic_table(traffic)}
## Time these bytes take (computed, not measured)

Microseconds at batch {BATCH} (for `factored_sgd`: of AlexNet's two hidden layers), bytes over the data
sheet's bandwidth:
{", ".join(f"{gpu} {bandwidth / 1e9:,.0f} GB/s" for gpu, bandwidth in BANDWIDTH.items())}.

{_time_table(traffic)}
## Machine code

{_code_table(codes)}"""


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fastalex.kernels.inspect", description=__doc__.splitlines()[0]
    )
    dtypes = [dtype_name(dtype) for dtype in FLOAT_DTYPES]
    parser.add_argument(
        "--arch", type=int, nargs="+", choices=_aot.ARCHITECTURES, default=list(_aot.ARCHITECTURES)
    )
    parser.add_argument("--dtype", nargs="+", choices=dtypes, default=dtypes)
    parser.add_argument("--kernel", default="", help="only kernels with this in their name")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder to write to")
    parser.add_argument("--no-write", action="store_true", help="print only")
    return parser.parse_args()


def main() -> int:
    arguments = _arguments()
    if is_interpreted():
        print(
            "error: unset TRITON_INTERPRET: this command compiles, which the interpreter cannot",
            file=sys.stderr,
        )
        return 2
    if not arguments.no_write and not arguments.out.is_dir():
        print(f"error: no folder {arguments.out}: run from the repository, or give --out", file=sys.stderr)
        return 2
    jobs = _jobs(arguments.arch, arguments.dtype, arguments.kernel)
    if not jobs:
        print(f"error: no kernel has {arguments.kernel!r} in its name", file=sys.stderr)
        return 2
    with ProcessPoolExecutor(arguments.jobs) as pool:
        codes = []
        for row in pool.map(_compile, jobs):
            codes.append(row)
            if sys.stderr.isatty():
                print(f"\r{len(codes)} of {len(jobs)} compiled", end="", file=sys.stderr, flush=True)
    traffic = _count(arguments.dtype, arguments.kernel)
    text = report(traffic, codes)
    print(text)
    if not arguments.no_write:
        (arguments.out / "kernels_inspect.md").write_text(text)
        data = {"triton": triton.__version__, "torch": torch.__version__, "traffic": traffic, "code": codes}
        (arguments.out / "kernels_inspect.json").write_text(json.dumps(data, indent=1) + "\n")
    broken = [(row, problem) for row in codes + traffic for problem in row["problems"]]
    for row, problem in broken:
        where = f"sm_{row['arch']} {row['config']}" if "arch" in row else "bytes"
        print(f"broken: {row['kernel']}, {row['dtype']}, {where}: {problem}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
