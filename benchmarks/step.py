"""Measures training steps and evaluation of several programs by turns; `test_step.py` describes how."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contenders import evaluation_batch
from benchmarks.hardware import DEVICE
from benchmarks.memory import DEVICE_PEAKS
from benchmarks.parts import PARTS
from benchmarks.report import Measurement
from benchmarks.turns import Programs
from fastalex.models import create_model
from fastalex.training.flops import training_flops

CROP = 224
# Steps and batches per turn, chosen so that all turns take about as long. On a GPU a turn has to be long
# compared with its first and last steps, and with the batches that a DataLoader has prefetched by its start.
STEPS = {"reference": 1, "stock": 2, "fastalex": 4}
BATCHES = {"reference": 1, "fastalex": 4}
GPU_TURN = 200
WARM_UP = 20 if DEVICE == "cuda" else 2
PROFILED = 20 if DEVICE == "cuda" else 1  # steps: on a GPU one is too short to be timed
DERIVED = ("times_reference", "times_stock", "gflop_per_s", "fraction_of_matmul", "share_of_step")


class StepBench(Programs):
    """The programs' processes, and the measurements so far.

    Args:
        root: of CIFAR-10.
        rounds: number of turns of each program.
        batch_size: in training; an evaluation batch has a tenth of it, in ten views each.
        programs: names of `CONTENDERS`.
        toy: whether turns and measurements of the machine are as short as possible, so that figures mean
            nothing.
    """

    def __init__(
        self, root: Path, rounds: int, batch_size: int, programs: tuple[str, ...], toy: bool = False
    ) -> None:
        contender = ["-m", "benchmarks.contenders"]
        commands = {name: [*contender, name, str(root), str(batch_size)] for name in programs}
        commands["hardware"] = ["-m", "benchmarks.hardware", *(["--toy"] if toy else [])]
        super().__init__(commands, rounds)
        self.batch_size = batch_size
        self.toy = toy
        self.warm_up = 1 if toy else WARM_UP
        self.measurements: list[Measurement] = []

    def add(
        self, measurement: str, program: str, unit: str, values: list[float], part: str = "", **derived: Any
    ) -> None:
        subject = {"measurement": measurement, "program": program, "part": part, "batch": self.batch_size}
        derived = {**dict.fromkeys(DERIVED), **derived}
        self.measurements.append(Measurement.of(subject, unit, values, **derived))

    def turn_length(self, lengths: dict[str, int], name: str) -> int:
        """Steps or batches in a turn of a program."""
        if self.toy:
            return 1
        return GPU_TURN if DEVICE == "cuda" else lengths[name]

    def training(self, benchmark: Any) -> None:
        rates: dict[str, list[float]] = {}
        limits: dict[str, list[float]] = {"matmul": [], "copy": []}

        def train(name: str) -> None:
            steps = self.turn_length(STEPS, name)
            seconds = self.workers[name].ask("train", steps=steps)
            rates.setdefault(name, []).append(steps * self.batch_size / seconds)

        def measure_limits() -> None:
            for limit, values in limits.items():
                values.append(self.workers["hardware"].ask(limit) / 1e9)

        programs = [name for name in self.workers if name != "hardware"]
        for name in programs:
            self.workers[name].ask("train", steps=self.warm_up)
            self.workers[name].ask("forget peak memory")
            self.workers[name].ask("train", steps=1)  # allocates the memory again, untimed
        turns = {name: partial(train, name) for name in programs}
        self.by_turns(benchmark, {"hardware": measure_limits, **turns})
        gflop = training_flops(create_model("alexnet"), (self.batch_size, 3, CROP, CROP)) / 1e9
        for name, values in rates.items():
            speeds = [rate * gflop / self.batch_size for rate in values]
            self.add(
                "training",
                name,
                "images/s",
                values,
                times_reference=ratio(values, rates.get("reference")),
                times_stock=ratio(values, rates.get("stock")),
                gflop_per_s=float(np.median(speeds)),
                fraction_of_matmul=ratio(speeds, limits["matmul"]),
            )
        self.add("hardware", "matrix product", "GFLOP/s", limits["matmul"])
        self.add("hardware", "copy", "GB/s", limits["copy"])
        for question in ["peak memory", *(DEVICE_PEAKS if DEVICE == "cuda" else ())]:
            peaks = {name: self.workers[name].ask(question) / 1e6 for name in programs}
            for name, peak in peaks.items():
                times = peak / peaks["reference"] if "reference" in peaks else None
                self.add(question, name, "MB", [peak], times_reference=times)

    def evaluation(self, benchmark: Any) -> None:
        rates: dict[str, list[float]] = {}

        def evaluate(name: str) -> None:
            batches = self.turn_length(BATCHES, name)
            seconds = self.workers[name].ask("evaluate", batches=batches)
            rates.setdefault(name, []).append(batches * evaluation_batch(self.batch_size) / seconds)

        for name in BATCHES:
            self.workers[name].ask("evaluate", batches=self.warm_up)
        self.by_turns(benchmark, {name: partial(evaluate, name) for name in BATCHES})
        for name, values in rates.items():
            times = ratio(values, rates["reference"])
            self.add("ten-crop evaluation", name, "images/s", values, times_reference=times)

    def parts(self, benchmark: Any) -> None:
        steps: dict[str, list[dict[str, float]]] = {name: [] for name in BATCHES}

        def profile(name: str) -> None:
            steps[name].append(self.workers[name].ask("profile", steps=PROFILED))

        self.by_turns(benchmark, {name: partial(profile, name) for name in steps})
        for name, measured in steps.items():
            for part in PARTS:
                times = [1e3 * step[part] for step in measured]
                share = float(np.median([step[part] / sum(step.values()) for step in measured]))
                self.add("step by part", name, "ms", times, part=part, share_of_step=share)


def ratio(values: list[float], others: list[float] | None) -> float | None:
    """The median of the ratios within the rounds."""
    if others is None:
        return None
    return float(np.median([value / other for value, other in zip(values, others, strict=True)]))
