# mypy: disallow-untyped-defs=False
"""The sums of a matrix's columns in fp32 on the CPU, for gradients of biases.

PyTorch's `sum(dtype=torch.float32)` of a bf16 tensor first makes a copy in fp32, which takes longer than
the sum.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from ._numba_simd import LANES, bits, jit, load, pointer, run, store


@jit()
def _serial(start, stop, matrix, columns, sums):
    matrix, sums = pointer(matrix), pointer(sums)
    for row in range(start, stop):
        for c in range(0, columns, LANES):
            store(sums, c, load(sums, c) + load(matrix, row * columns + c))


@jit(parallel=True)
def _parallel(tasks, count, matrix, columns, sums):
    partial = np.zeros((tasks, columns), np.float32)
    for task in numba.prange(tasks):
        _serial(task * count // tasks, (task + 1) * count // tasks, matrix, columns, partial[task])
    for task in range(tasks):
        sums += partial[task]


def column_sums(matrix: Tensor) -> Tensor:
    """The sums over all dimensions but the last, fp32 (columns,).

    Args:
        matrix: contiguous, fp32 or bf16, on the CPU; its last dimension is a multiple of `LANES`.
    """
    columns = matrix.shape[-1]
    sums = torch.zeros(columns, dtype=torch.float32)
    run(_serial, _parallel, matrix.numel() // columns, bits(matrix), columns, bits(sums))
    return sums
