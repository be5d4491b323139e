"""The folders and the size of a harvest, ``python -m benchmarks.card``."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Place:
    """The folders and the size of a harvest.

    Attributes:
        folder: of the results.
        root: of CIFAR-10.
        toy: whether it is a rehearsal on a CPU, at a size whose figures mean nothing.
    """

    folder: Path
    root: Path
    toy: bool


def given_place(module: str) -> Place:
    """Parse the command line of a phase's module: ``FOLDER ROOT [--toy]``."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.card.{module}")
    parser.add_argument("folder", type=Path, help="of the results")
    parser.add_argument("root", type=Path, help="of CIFAR-10")
    parser.add_argument("--toy", action="store_true", help="at a size whose figures mean nothing")
    return Place(**vars(parser.parse_args()))
