"""The phases of ``python -m benchmarks.card``: their commands and time limits."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.card.place import Place
from fastalex.study.rows import CLAIMS, select

Command = list[str]
PYTHON = [sys.executable, "-m"]
# Settings of a rehearsal, with which a CPU trains in seconds.
TOY = ["data.resize=80", "data.crop=72", "train.epochs=2", "train.batch_size=16", "loader=resident"]
# The files that have gpu tests.
GPU_TESTS = [
    "tests/test_graphs.py",
    "tests/test_waits.py",
    "tests/data/test_resident.py",
    "tests/benchmarks/test_parts.py",
    "tests/benchmarks/test_hardware.py",
    "tests/kernels",
]
CLAIM_PROCESSES = 6  # which share the card: a network at a crop of 64 does not fill it


@dataclass(frozen=True)
class Phase:
    """A part of the harvest.

    Attributes:
        seconds: time limit, after which it is killed.
        commands: run one after another until one fails, or in parallel.
        together: whether they run in parallel, which makes their timings meaningless.
        cold: whether the compiler caches start empty, as on a machine that is new to fastalex.
        eager: whether nothing is compiled by torch.compile, for runs that are shorter than that takes.
    """

    seconds: float
    commands: Callable[[Place], list[Command]]
    together: bool = False
    cold: bool = False
    eager: bool = False


def module(name: str) -> Callable[[Place], list[Command]]:
    """The command of a module of this package, which writes ``NAME.json``."""

    def commands(place: Place) -> list[Command]:
        toy = ["--toy"] if place.toy else []
        return [[*PYTHON, f"benchmarks.card.{name}", str(place.folder), str(place.root), *toy]]

    return commands


def training(
    place: Place, run: str, *settings: str, row: str | None = None, rehearsed: bool = False
) -> Command:
    """A run of ``fastalex.train`` in the folder ``run``, with a checkpoint every ten minutes.

    A rehearsal trains in two of the runs; of the others it only composes the configurations.
    """
    config = [f"--config-name=row/{row}"] if row else []
    places = [f"data.root={place.root}", f"hydra.run.dir={place.folder}/runs/{run}"]
    toy = [*TOY, "train.stages=[]"] if place.toy and rehearsed else []
    return [*PYTHON, "fastalex.train", *config, *places, "checkpoint.every_seconds=600", *settings, *toy]


def not_rehearsed(place: Place, trainings: list[Command]) -> list[Command]:
    """Trainings; in a rehearsal, one process that composes their configurations, to find wrong settings."""
    if not place.toy:
        return trainings
    return [[*PYTHON, "benchmarks.card.composed", *(json.dumps(command[3:]) for command in trainings)]]


def row(name: str, rehearsed: bool = False) -> Callable[[Place], list[Command]]:
    """A row of the study's table."""

    def commands(place: Place) -> list[Command]:
        trainings = [training(place, name, row=name, rehearsed=rehearsed)]
        return trainings if rehearsed else not_rehearsed(place, trainings)

    return commands


def fast(place: Place) -> list[Command]:
    """The default recipe, and the same without its epochs at half the size.

    On a card those may take longer to compile than they save.
    """
    return not_rehearsed(
        place,
        [
            training(place, "alexnet_fast", row="alexnet_fast"),
            training(place, "one_size", "train.progressive_resizing=0", row="alexnet_fast"),
        ],
    )


def seeds(name: str, *numbers: int) -> Callable[[Place], list[Command]]:
    """A row with other seeds."""
    return lambda place: not_rehearsed(
        place, [training(place, f"{name}_seed{n}", f"seed={n}", row=name) for n in numbers]
    )


def tests(place: Place) -> list[Command]:
    """The gpu tests; a rehearsal collects and skips them."""
    workers = "0" if place.toy else str(min(os.cpu_count() or 1, 14))
    command = [*PYTHON, "pytest", "-m", "gpu", "-n", workers, "--dist", "load", "-q", "-v"]
    return [[*command, *GPU_TESTS, f"--junitxml={place.folder}/tests.xml"]]


def kernels(place: Place) -> list[Command]:
    """The kernels' benchmarks, which write ``benchmarks/results/*_cuda.csv``."""
    files = ["benchmarks/test_augment.py", "benchmarks/test_lrn.py"]
    # On a CPU they take minutes, so they are only collected.
    options = ["--collect-only", "-q"] if place.toy else ["--benchmark-enable", "-s", "-q"]
    return [[*PYTHON, "pytest", *files, *options]]


def profile(place: Place) -> list[Command]:
    return [training(place, "profile", "profile=true", rehearsed=True)]


def variants(place: Place) -> list[Command]:
    """Training in other ways: in fp16, with batch normalisation, accumulated, eager, with another loader."""
    short = ["train.epochs=2", "data.resize=128", "data.crop=112"]
    return not_rehearsed(
        place,
        [
            training(place, "fp16", *short, "runtime.precision=fp16"),
            training(place, "batch_norm", *short, "model=alexnet_bn"),
            training(place, "accumulate", *short, "train.accumulate=4"),
            training(place, "eager", *short, "runtime.compile=false"),
            training(place, "torchvision", *short, "loader=torchvision"),
        ],
    )


def claims(place: Place) -> list[Command]:
    """The rows of the claims, with all their seeds, in processes that have several rows each."""
    rows = select([CLAIMS])
    if place.toy:
        return not_rehearsed(place, [training(place, name, row=name) for name in rows])
    where = [f"data.root={place.root}", f"folder={place.folder}/runs/claims"]
    parts = [rows[first::CLAIM_PROCESSES] for first in range(CLAIM_PROCESSES)]
    return [[*PYTHON, "fastalex.reproduce", f"rows={','.join(part)}", *where] for part in parts]


def recipe(place: Place) -> list[Command]:
    """The study's recipe to its end."""
    return not_rehearsed(
        place, [training(place, "alexnet_study_recipe", "train.epochs=90", row="alexnet_study_recipe")]
    )


# Most important first. A phase gets its seconds, or those that are left of the total.
PHASES = {
    "facts": Phase(40, module("facts")),
    "tiling": Phase(90, module("tiling")),  # compiles the kernels that the next phases use, in parallel
    "agreement": Phase(150, module("agreement")),
    "throughput": Phase(220, module("throughput")),
    "alexnet": Phase(240, row("alexnet", rehearsed=True), cold=True),
    "alexnet_fast": Phase(240, fast),
    "kernels": Phase(150, kernels),
    "profile": Phase(60, profile),
    "recipe": Phase(300, recipe),
    "claims": Phase(360, claims, together=True, eager=True),
    "seeds": Phase(240, seeds("alexnet", 1, 2), together=True),
    "long": Phase(300, seeds("alexnet_long", 0, 1, 2, 3, 4), together=True),
    "batches": Phase(120, module("batches")),
    "resnet18": Phase(240, row("resnet18")),
    "tests": Phase(200, tests),
    "variants": Phase(150, variants, together=True),
}
