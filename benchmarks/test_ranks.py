"""Two processes of one thread each beside one of two, AlexNet at 224x224, the same batch: by turns.

    python -m pytest benchmarks/test_ranks.py --benchmark-enable -s [--data-root ROOT] [--rounds N]

Each way to divide the work is what `torchrun ... -m fastalex.train` runs: a trainer, in as many processes, on
as many threads as the machine has cores between them (`ranks.py`). They are warmed up outside the clock, and
stopped while it is not their turn. The bytes are those that the machine sent to itself meanwhile, as Linux
counts them, headers included, over steps and processes; beside them what `docs/scaling.md` computes. Writes
results/ranks_cpu.csv and docs/scaling.md.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from benchmarks import scaling
from benchmarks.ranks import Bench
from benchmarks.report import write_csv
from benchmarks.test_step import BATCH


@pytest.fixture(scope="module")
def bench(request: pytest.FixtureRequest, root: Path) -> Iterator[Bench]:
    """Its processes, stopped at the end."""
    if sys.platform != "linux":
        pytest.skip("counts the bytes as Linux does")
    with closing(Bench(root, request.config.getoption("rounds"), BATCH)) as bench:
        yield bench
    for row in bench.rows:
        of = f", {row.times_one_process:.2f} times one process" if row.times_one_process else ""
        print(f"\n{row.measurement}: {row.program} {row.median:,.1f} {row.unit}{of}", end="")
    if bench.rows:  # of a measurement that came to its end
        write_csv(bench.rows, scaling.MEASURED, "cpu")
        scaling.write()


def test_training(bench: Bench, benchmark: Any) -> None:
    bench.training(benchmark)
