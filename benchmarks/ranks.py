"""One process, and two that share its cores: the programs that `test_ranks.py` lets train by turns.

python -m benchmarks.ranks ROOT BATCH_SIZE PROCESSES [KEY=VALUE ...]       answers requests on standard input
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.contenders import Fastalex
from benchmarks.hardware import seconds
from benchmarks.report import Measurement
from benchmarks.scaling import network_bytes
from benchmarks.step import ratio
from benchmarks.turns import Programs, serve
from fastalex.distributed.processes import ALONE, World

STEPS, WARM_UP = 4, 2
IDLE = 3600.0  # seconds that a rank waits for another, while all are stopped for other programs' turns
LOOPBACK = Path("/sys/class/net/lo/statistics/tx_bytes")  # bytes that this machine has sent to itself
PROCESSES = {"one process": 1, "ddp": 2, "ddp, bf16": 2, "hybrid": 2}
OPTIONS = {
    "ddp, bf16": ["distributed.compression=bf16"],
    "hybrid": ["distributed.strategy=hybrid"],
}


class RanksBench(Programs):
    """The programs' processes, and the measurements so far.

    Args:
        root: of CIFAR-10.
        rounds: number of turns of each program.
        batch_size: of a program's processes together.
        programs: names of `PROCESSES`, "one process" first.
        overrides: KEY=VALUE for all of them.
    """

    def __init__(
        self,
        root: Path,
        rounds: int,
        batch_size: int,
        programs: tuple[str, ...] = tuple(PROCESSES),
        overrides: tuple[str, ...] = (),
    ) -> None:
        command = ["-m", "benchmarks.ranks", str(root), str(batch_size)]
        options = {name: [str(PROCESSES[name]), *OPTIONS.get(name, []), *overrides] for name in programs}
        super().__init__({name: [*command, *options[name]] for name in programs}, rounds)
        self.batch_size = batch_size
        self.measurements: list[Measurement] = []

    def training(self, benchmark: Any) -> None:
        rates: dict[str, list[float]] = {name: [] for name in self.workers}
        sent: dict[str, list[float]] = {name: [] for name in self.workers}

        def train(name: str) -> None:
            before = int(LOOPBACK.read_text())
            taken = self.workers[name].ask("train", steps=STEPS)
            each = (int(LOOPBACK.read_text()) - before) / STEPS / PROCESSES[name]
            rates[name].append(STEPS * self.batch_size / taken)
            sent[name].append(each / 1e6)

        for name in self.workers:
            self.workers[name].ask("train", steps=WARM_UP)
        self.by_turns(benchmark, {name: partial(train, name) for name in self.workers})
        for name, values in rates.items():
            self.add("training", name, "images/s", values, ratio(values, rates["one process"]), None)
            if PROCESSES[name] > 1:
                computed = computed_bytes(name, self.batch_size // PROCESSES[name]) / 1e6
                self.add("bytes a process sends in a step", name, "MB", sent[name], None, computed)

    def add(
        self,
        measurement: str,
        program: str,
        unit: str,
        values: list[float],
        times_one_process: float | None,
        computed: float | None,
    ) -> None:
        """Add a measurement; `computed` is its value by `scaling.py`."""
        subject = {
            "measurement": measurement,
            "program": program,
            "processes": PROCESSES[program],
            "batch": self.batch_size,
        }
        derived = {"times_one_process": times_one_process, "computed": computed}
        self.measurements.append(Measurement.of(subject, unit, values, **derived))


def computed_bytes(program: str, batch: int) -> float:
    """Bytes that a process with `batch` images sends per step, by the formulas of `docs/scaling.md`."""
    ddp, hybrid = network_bytes(PROCESSES[program], batch)
    return {"ddp": ddp, "ddp, bf16": ddp / 2, "hybrid": hybrid}[program]


def start(root: str, batch_size: str, processes: str, *overrides: str) -> dict[str, Callable[..., Any]]:
    """The functions that rank 0 of a program offers; the other ranks train whenever it does."""
    torch.manual_seed(0)
    size, rank = int(processes), int(os.environ.get("RANK", "0"))
    world = ALONE
    if size > 1:
        if not rank:
            os.environ["MEETING"] = f"file://{tempfile.mkdtemp()}/meeting"
            for other in range(1, size):
                command = [sys.executable, "-m", "benchmarks.ranks", *sys.argv[1:]]
                subprocess.Popen(command, stdin=subprocess.DEVNULL, env=os.environ | {"RANK": str(other)})
        dist.init_process_group(
            "gloo",
            init_method=os.environ["MEETING"],
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=IDLE),
        )
        world = World(rank, size, rank, size, IDLE)
    options = ["runtime.device=cpu", *overrides]
    program = Fastalex(Path(root), int(batch_size), options, world)

    while rank:
        try:
            steps = world.on_main(lambda: 0)  # the number that rank 0 is asked for
        except RuntimeError:  # rank 0 has ended
            os._exit(0)
        program.train(steps)

    def train(steps: int) -> float:
        world.on_main(lambda: steps)
        return seconds(lambda: program.train(steps))

    return {"train": train}


if __name__ == "__main__":
    serve(lambda: start(*sys.argv[1:]))
