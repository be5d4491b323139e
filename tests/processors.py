"""Run numeric tests as on processors with fewer instructions: ``python -m tests.processors [ARGUMENT...]``.

oneDNN, PyTorch's own kernels and MKL choose their instructions by the processor, and with them the order of
their sums; environment variables limit the choice. The kernels in Numba add in one order everywhere, so they
need no limit, which would compile them anew.

Arguments are those of pytest; they name the tests, or these are :data:`TESTS`. Prints which processors are
imitated, and which are not because this one has no more instructions. Exits with the status of the first run
that fails.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

# Whole networks and several steps, where errors of convolutions and matrix products meet jumps of the
# derivative; the other numeric tests are of single operators.
TESTS = (
    "tests/test_same_mathematics.py",
    "tests/test_models.py::test_biases_added_by_the_kernels_give_the_same_logits_and_gradients",
    "tests/test_models.py::test_winograd_in_fp32_is_as_accurate_as_fp32",
    "tests/test_models.py::test_winograd_serves_resnet18_and_does_not_change_its_weights",
    "tests/kernels/test_lazy_batch.py::test_gradients_of_lazy_and_materialized_batches_agree",
    "tests/kernels/test_lrn_module.py::test_the_example_computes_and_trains_as_with_the_layers_of_torch",
    "--deselect=tests/test_same_mathematics.py::test_fp32_compiled",  # seconds of compiling
)

# What a processor must have more than the imitated one, and the variables that hide it
IMITATED: dict[str, tuple[str, dict[str, str]]] = {
    "AVX2": (
        "avx512f",
        {
            "ONEDNN_MAX_CPU_ISA": "AVX2",
            "ATEN_CPU_CAPABILITY": "avx2",
            "MKL_CBWR": "AVX2",
        },
    ),
    "AVX-512 without bf16": (
        "avx512_bf16",
        {
            "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
            "ATEN_CPU_CAPABILITY": "avx512",
            "MKL_CBWR": "AVX512",
        },
    ),
}


def processor_flags() -> set[str]:
    """Return the instruction sets of this processor, in Linux's names."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {flag for line in lines if line.startswith("flags") for flag in line.split(":")[1].split()}


def choose(flags: Collection[str]) -> dict[str, dict[str, str]]:
    """Return the environments of the processors to imitate on one with the given instruction sets."""
    return {name: variables for name, (more, variables) in IMITATED.items() if more in flags}


def main(arguments: list[str]) -> int:
    chosen = choose(processor_flags())
    for name, (more, _) in IMITATED.items():
        if name not in chosen:
            print(f"not imitated: a processor with {name}, as this one has no {more}", flush=True)
    if not any(argument.startswith("tests/") for argument in arguments):
        arguments = [*arguments, *TESTS]
    for name, variables in chosen.items():
        print(f"as on a processor with {name}:", flush=True)
        command = [sys.executable, "-m", "pytest", *arguments]
        status = subprocess.run(command, env={**os.environ, **variables}, check=False).returncode
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
