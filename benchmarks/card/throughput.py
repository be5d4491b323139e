"""The training step on a GPU: its speed beside plain PyTorch's, and where its time goes.

    python -m benchmarks.card.throughput FOLDER ROOT [--toy]

The programs of ``benchmarks/test_step.py``, and fastalex without CUDA graphs and without compilation, take
turns of 200 steps each. For fastalex it also measures Python's time to enqueue a step, how often the host
waits for the GPU, and the kernels of a step. Then fastalex takes turns with itself under each of the options
that are not its default on a GPU; one that fails is left out. Rewrites ``throughput.json`` after each part,
and writes ``benchmarks/results/step_cuda.csv`` without the options.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from benchmarks.card.place import given_place
from benchmarks.contenders import CONTENDERS
from benchmarks.hardware import DEVICE, KIND
from benchmarks.report import RESULTS, Measurement, write_csv
from benchmarks.step import GPU_TURN, StepBench
from benchmarks.turns import RoundRunner
from fastalex.files import write_text

BATCH = 128
OPTIONS = ("fastalex fused bias", "fastalex factored", "fastalex step graph")
PROGRAMS = ("reference", "stock", "fastalex", "fastalex without graphs", "fastalex eager")
TURNS = 3
PROFILED = 20  # steps


def measure(folder: Path, root: Path, toy: bool) -> None:
    programs, batch = (("reference", "fastalex"), 4) if toy else (PROGRAMS, BATCH)
    rounds = RoundRunner()
    turns = 1 if toy else TURNS
    steps = 1 if toy else GPU_TURN
    result: dict[str, Any] = {}

    def write(**parts: Any) -> None:
        result.update(parts)
        write_text(folder / "throughput.json", json.dumps(result, indent=1) + "\n")

    with closing(StepBench(root, turns, batch, programs, toy)) as bench:
        bench.training(rounds)
        write(rows=[m.record for m in bench.measurements])
        fastalex = bench.workers["fastalex"]
        write(host_seconds=fastalex.ask("host seconds", steps=steps))
        if DEVICE == "cuda":
            write(waits_a_step=fastalex.ask("waits", steps=GPU_TURN) / GPU_TURN)
            write(kernels=fastalex.ask("kernels", steps=PROFILED))
            write(kernels_stock=bench.workers["stock"].ask("kernels", steps=PROFILED))
        if not toy:
            bench.evaluation(rounds)
            bench.parts(rounds)
            write(rows=[m.record for m in bench.measurements])
            write_csv(bench.measurements, RESULTS / f"step_{KIND}.csv", DEVICE)
    show(bench.measurements)
    options = OPTIONS[:1] if toy else OPTIONS
    with closing(StepBench(root, turns, batch, ("fastalex", *options), toy)) as bench:
        for name in options:
            if not works(bench, name):
                del bench.workers[name]  # which would end the turns of the others
        bench.training(rounds)
        write(options=[m.record for m in bench.measurements])
        if DEVICE == "cuda":
            for name in bench.workers.keys() & set(options):
                write(**{f"kernels_{name}": bench.workers[name].ask("kernels", steps=PROFILED)})
    show(bench.measurements)


def works(bench: StepBench, name: str) -> bool:
    """Whether a program warms up without an error."""
    try:
        bench.workers[name].ask("train", steps=bench.warm_up)
    except RuntimeError as error:
        print(error, flush=True)
        return False
    return True


def show(measurements: Sequence[Measurement]) -> None:
    for m in measurements:
        print(f"{m['measurement']}: {m['program']} {m['part']} {m.median:,.1f} {m.unit}", flush=True)


def main() -> None:
    given = given_place("throughput")
    assert {*PROGRAMS, *OPTIONS} <= set(CONTENDERS)
    measure(given.folder, given.root, given.toy)


if __name__ == "__main__":
    main()
