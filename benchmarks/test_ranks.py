"""Two processes of one thread each beside one of two, AlexNet at 224x224, the same batch: by turns.

    python -m pytest benchmarks/test_ranks.py --benchmark-enable -s [--data-root ROOT] [--rounds N]

Each way to divide the work is what `torchrun ... -m fastalex.train` runs: trainers in one or two processes
that share the machine's cores (`ranks.py`). The programs are warmed up untimed, and stopped between their
turns. The bytes are those that the machine sent to itself during the steps, as Linux counts them, headers
included, divided by steps and processes; beside them stand those that `docs/scaling.md` computes. Writes
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
from benchmarks.ranks import RanksBench
from benchmarks.report import write_csv
from benchmarks.test_step import BATCH


@pytest.fixture(scope="module")
def bench(request: pytest.FixtureRequest, root: Path) -> Iterator[RanksBench]:
    """The processes, ended after the tests; then the results are written."""
    if sys.platform != "linux":
        pytest.skip("reads byte counts that only Linux has")
    with closing(RanksBench(root, request.config.getoption("rounds"), BATCH)) as bench:
        yield bench
    for m in bench.measurements:
        times = m["times_one_process"]
        of = f", {times:.2f} times one process" if times else ""
        print(f"\n{m['measurement']}: {m['program']} {m.median:,.1f} {m.unit}{of}", end="")
    if bench.measurements:  # all were taken
        write_csv(bench.measurements, scaling.MEASURED, "cpu")
        scaling.write()


def test_training(bench: RanksBench, benchmark: Any) -> None:
    bench.training(benchmark)
