"""Two processes that share the cores of one: what `test_ranks.py` lets train by turns.

python -m benchmarks.ranks ROOT BATCH_SIZE PROCESSES [KEY=VALUE ...]       answers requests on standard input
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.contenders import Fastalex
from benchmarks.hardware import seconds
from benchmarks.report import spread
from benchmarks.scaling import network_bytes
from benchmarks.step import ratio
from benchmarks.turns import Programs, serve
from fastalex.distributed.processes import ALONE, World

STEPS, WARM_UP = 4, 2
IDLE = 3600.0  # seconds that a process waits for the other, while both are stopped for the others' turns
LOOPBACK = Path("/sys/class/net/lo/statistics/tx_bytes")  # of all that is sent on this machine to itself
PROCESSES = {"one process": 1, "ddp": 2, "ddp, bf16": 2, "hybrid": 2}
OPTIONS = {
    "ddp, bf16": ["distributed.compression=bf16"],
    "hybrid": ["distributed.strategy=hybrid"],
}


@dataclass(frozen=True)
class Row:
    """A figure of one way to divide the work; the cores and the batch are the same for all."""

    measurement: str
    program: str
    processes: int
    batch: int
    unit: str
    median: float
    p20: float
    p80: float
    rounds: int
    times_one_process: float | None = None
    computed: float | None = None  # by `scaling.py`


class Bench(Programs):
    """The processes of all programs, and the rows so far.

    Args:
        root: of CIFAR-10.
        rounds: turns of each program.
        batch_size: of a program's processes together.
        programs: names of `PROCESSES`, one process first.
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
        self.rows: list[Row] = []

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
            figures = spread(values)
            times = ratio(values, rates["one process"])
            count = PROCESSES[name]
            self.rows.append(
                Row("training", name, count, self.batch_size, "images/s", *figures, self.rounds, times)
            )
            if count > 1:
                self.rows.append(
                    Row(
                        *("bytes a process sends in a step", name, count, self.batch_size, "MB"),
                        *spread(sent[name]),
                        self.rounds,
                        computed=computed_bytes(name, self.batch_size // count) / 1e6,
                    )
                )


def computed_bytes(program: str, batch: int) -> float:
    """What a process sends a step, as `docs/scaling.md` computes it, for as many images in each process."""
    ddp, hybrid = network_bytes(PROCESSES[program], batch)
    return {"ddp": ddp, "ddp, bf16": ddp / 2, "hybrid": hybrid}[program]


def start(root: str, batch_size: str, processes: str, *overrides: str) -> dict[str, Callable[..., Any]]:
    """The functions that the first process of a program offers; the others train whenever it does."""
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
            steps = world.on_main(lambda: 0)  # as many as the first process is asked for
        except RuntimeError:  # it has ended
            os._exit(0)
        program.train(steps)

    def train(steps: int) -> float:
        world.on_main(lambda: steps)
        return seconds(lambda: program.train(steps))

    return {"train": train}


if __name__ == "__main__":
    serve(lambda: start(*sys.argv[1:]))
