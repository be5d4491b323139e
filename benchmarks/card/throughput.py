"""The training step on a GPU: its speed beside plain PyTorch's, and where its time goes.

    python -m benchmarks.card.throughput FOLDER ROOT [--toy]

The programs of ``benchmarks/test_step.py`` and fastalex without CUDA graphs, without compilation, and with
each of the options that are not its default on a GPU, take turns of 200 steps each. For fastalex it also
measures Python's time to enqueue a step, how often the host waits for the GPU, and the kernels of a step.
Rewrites ``throughput.json`` after each part, and writes ``benchmarks/results/step_cuda.csv``.
"""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

from benchmarks.card.place import given_place
from benchmarks.contenders import CONTENDERS
from benchmarks.hardware import DEVICE, KIND
from benchmarks.report import RESULTS, write_csv
from benchmarks.step import GPU_TURN, StepBench
from benchmarks.turns import RoundRunner
from fastalex.files import write_text

BATCH = 128
OPTIONS = ("fastalex factored", "fastalex fused bias", "fastalex step graph")
PROGRAMS = ("reference", "stock", "fastalex", "fastalex without graphs", "fastalex eager", *OPTIONS)
PROFILED = 20  # steps


def measure(folder: Path, root: Path, toy: bool) -> None:
    programs, batch = (("reference", "fastalex"), 4) if toy else (PROGRAMS, BATCH)
    result: dict[str, Any] = {}

    def write(**parts: Any) -> None:
        result.update(parts)
        write_text(folder / "throughput.json", json.dumps(result, indent=1) + "\n")

    with closing(StepBench(root, 1 if toy else 3, batch, programs, toy)) as bench:
        rounds = RoundRunner()
        bench.training(rounds)
        write(rows=[m.record for m in bench.measurements])
        fastalex = bench.workers["fastalex"]
        steps = 1 if toy else GPU_TURN
        write(host_seconds=fastalex.ask("host seconds", steps=steps))
        if DEVICE == "cuda":
            write(waits_a_step=fastalex.ask("waits", steps=GPU_TURN) / GPU_TURN)
            write(kernels=fastalex.ask("kernels", steps=PROFILED))
            write(kernels_stock=bench.workers["stock"].ask("kernels", steps=PROFILED))
            for name in OPTIONS:
                write(**{f"kernels_{name}": bench.workers[name].ask("kernels", steps=PROFILED)})
        if not toy:
            bench.evaluation(rounds)
            bench.parts(rounds)
            write(rows=[m.record for m in bench.measurements])
            write_csv(bench.measurements, RESULTS / f"step_{KIND}.csv", DEVICE)
    for m in bench.measurements:
        print(f"{m['measurement']}: {m['program']} {m['part']} {m.median:,.1f} {m.unit}")


def main() -> None:
    given = given_place("throughput")
    assert set(PROGRAMS) <= set(CONTENDERS)
    measure(given.folder, given.root, given.toy)


if __name__ == "__main__":
    main()
