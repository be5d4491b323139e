"""Images/s of training and of ten-crop evaluation, AlexNet at 224x224: three programs by turns.

    python -m pytest benchmarks/test_step.py --benchmark-enable -s [--data-root ROOT] [--rounds N]

- reference: `benchmarks/reference.py`, plain eager PyTorch in fp32, with its own DataLoader;
- stock: the same network and data as a careful user of stock PyTorch runs them: torch.compile, bf16 autocast
  where the machine computes in bf16, channels-last, fused SGD;
- fastalex: what `python -m fastalex.train recipe=one_cycle` runs, from its loader to its optimizer, which is
  SGD as in the other two.

Each has a process of its own (`contenders.py`), is stopped between its turns (`turns.py`), and is warmed up
untimed. In every round the machine's matrix products and copies are timed as well, in a process of their own.
A ratio is the median of the ratios within the rounds. FLOPs are those of convolutions and matrix products,
counted by PyTorch, forward and backward. Memory is the process's high-water mark since the warm-up (VmHWM),
which includes PyTorch itself, plus the private memory of the processes it started, a DataLoader's or
torch.compile's; on a GPU also PyTorch's peak of allocated and of reserved memory, which includes the pools of
CUDA graphs. The time by part is torch.profiler's, from separate steps; a part's share is its share of the
profiled step. Writes results/step_KIND.csv (`hardware.py`), and the operators that `python -m fastalex.train
recipe=one_cycle profile=true` prints, profile_KIND.txt.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from benchmarks.hardware import DEVICE, KIND
from benchmarks.report import RESULTS, write_csv
from benchmarks.step import StepBench
from fastalex.files import write_text

BATCH = 128
PROGRAMS = ("reference", "stock", "fastalex")
MEASUREMENTS = {"training", "hardware", "peak memory", "ten-crop evaluation", "step by part"}


@pytest.fixture(scope="module")
def bench(request: pytest.FixtureRequest, root: Path) -> Iterator[StepBench]:
    """The processes; writes the results only if all measurements were taken."""
    rounds = request.config.getoption("rounds")
    with closing(StepBench(root, rounds, BATCH, PROGRAMS)) as bench:
        yield bench
    for m in bench.measurements:
        times = m["times_reference"]
        of = f", {times:.2f} times the reference" if times else ""
        print(f"\n{m['measurement']}: {m['program']} {m['part']} {m.median:,.1f} {m.unit}{of}", end="")
    if {m["measurement"] for m in bench.measurements} >= MEASUREMENTS:
        write_csv(bench.measurements, RESULTS / f"step_{KIND}.csv", DEVICE)


def test_training(bench: StepBench, benchmark: Any) -> None:
    bench.training(benchmark)


def test_evaluation(bench: StepBench, benchmark: Any) -> None:
    bench.evaluation(benchmark)


def test_parts(bench: StepBench, benchmark: Any) -> None:
    bench.parts(benchmark)


def test_profile(root: Path, tmp_path: Path, benchmark: Any) -> None:
    program = [sys.executable, "-m", "fastalex.train", "recipe=one_cycle", "profile=true"]
    program += [f"data.root={root}", f"hydra.run.dir={tmp_path / 'run'}"]
    benchmark.pedantic(subprocess.run, args=(program,), kwargs={"check": True}, rounds=1)
    write_text(RESULTS / f"profile_{KIND}.txt", (tmp_path / "run" / "profile.txt").read_text())
