"""All measurements on a GPU, in phases.

    python -m benchmarks.card [--minutes M] [--data-root ROOT] [--out FOLDER] [--rehearse] [PHASE ...]

Needs no network, and only a Python with fastalex's requirements. Each phase has a process group and a time
limit of its own: one that fails or hangs costs only its own time. Its results are in the folder, by default
``benchmarks/results/card/CARD-DATE``, as soon as it ends, so that a harvest that is cut off keeps the phases
before: ``phases.json`` has the status of each phase, ``NAME.log`` its output, ``NAME.json`` its figures, and
``runs/`` the training runs, without weights. The benchmarks' ``*_cuda.csv`` are in their usual place.

``--rehearse`` runs the same phases on a CPU at toy size, into a folder that is deleted, to find errors before
a GPU is used. ``python -m benchmarks.docs`` writes the results into docs/gpu.md.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks.card.phases import PHASES, Command, Phase
from benchmarks.card.place import Place
from benchmarks.hardware import DEVICE
from benchmarks.images import generate
from benchmarks.report import RESULTS
from fastalex.files import write_text

ROOT = Path(__file__).parents[2]
LEFT_OUT = ("*.pt", "*.safetensors", "tensorboard", "*.tmp")  # large files of the runs
LEAST = 10  # seconds that must be left for a phase to begin
REHEARSED_TOGETHER = 2  # phases


class Group:
    """Commands in a process group of their own.

    Args:
        commands: see :class:`Phase`.
        together: see :class:`Phase`.
        log: file of their output.
        environment: their environment variables.
    """

    def __init__(
        self, commands: list[Command], together: bool, log: Path, environment: dict[str, str]
    ) -> None:
        lines = [shlex.join(command) for command in commands]
        separator = " & " if together else " && "
        script = separator.join(lines)
        if together:  # wait for all, and fail if one fails
            waits = "; ".join("wait -n || failed=1" for _ in lines)
            script = f"{script} & {waits}; exit $((failed))"
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                ["bash", "-c", script],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self, seconds: float) -> str:
        """Wait for at most these seconds, then kill the group; return how it ended."""
        try:
            status = f"status {self._process.wait(seconds)}"
        except subprocess.TimeoutExpired:
            status = "out of time"
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        return status


def environment(phase: Phase, scratch: Path, toy: bool) -> dict[str, str]:
    """The environment variables of a phase's processes."""
    found = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if phase.cold:
        found["TRITON_CACHE_DIR"] = str(scratch / "triton")
        found["TORCHINDUCTOR_CACHE_DIR"] = str(scratch / "inductor")
    if toy or phase.eager:  # on a CPU compilation would take longer than all the rest
        found["TORCHDYNAMO_DISABLE"] = "1"
    if toy:
        found["OMP_NUM_THREADS"] = "1"  # threads of parallel phases would wait for each other
    return found


def harvest(place: Place, names: list[str], seconds: float) -> list[dict[str, Any]]:
    """Run the phases of these names within these seconds; return how each ended."""
    deadline = time.monotonic() + seconds
    ended: list[dict[str, Any]] = []
    # Timed phases have the machine to themselves; a rehearsal times nothing.
    with ThreadPoolExecutor(REHEARSED_TOGETHER if place.toy else 1) as pool:
        for one in pool.map(lambda name: run(name, place, deadline), names):
            ended.append(one)
            write_text(place.folder / "phases.json", json.dumps(ended, indent=1) + "\n")
            print(f"{one['phase']}: {one['status']}, {one['seconds']} s", flush=True)
    return ended


def run(name: str, place: Place, deadline: float) -> dict[str, Any]:
    """Run a phase if there is time for it; return how it ended."""
    began = time.monotonic()
    status = "not begun"
    if deadline - began >= LEAST:
        try:
            status = run_commands(name, place, deadline - began)
        except Exception as error:  # the other phases still run
            status = f"{type(error).__name__}: {error}"
    return {"phase": name, "status": status, "seconds": round(time.monotonic() - began, 1)}


def run_commands(name: str, place: Place, left: float) -> str:
    """Run a phase's commands within the seconds that are left; return how they ended."""
    phase = PHASES[name]
    # What was killed may still be writing when the folder is deleted.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        around = environment(phase, Path(scratch), place.toy)
        group = Group(phase.commands(place), phase.together, place.folder / f"{name}.log", around)
        status = group.wait(left if place.toy else min(phase.seconds, left))
    if not place.toy:
        slim(place.folder / "runs")
    return status


def slim(runs: Path) -> None:
    """Delete large files of the runs, and compress traces."""
    for pattern in LEFT_OUT:
        for path in list(runs.rglob(pattern)):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
    for trace in runs.rglob("trace.json"):  # ui.perfetto.dev opens compressed traces
        with trace.open("rb") as plain, gzip.open(f"{trace}.gz", "wb") as packed:
            shutil.copyfileobj(plain, packed)
        trace.unlink()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.card", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "phases", nargs="*", metavar="PHASE", help=f"of {', '.join(PHASES)}; all if none is given"
    )
    parser.add_argument("--minutes", type=float, help="for all phases together: 8; 30 in a rehearsal")
    parser.add_argument("--data-root", type=Path, help="of CIFAR-10; generated images if not given")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, at toy size, keeping nothing")
    given = parser.parse_args()
    unknown = [name for name in given.phases if name not in PHASES]
    if unknown:
        parser.error(f"no phase {unknown[0]!r}: choose from {', '.join(PHASES)}")
    if given.data_root is not None and not given.data_root.is_dir():
        parser.error(f"--data-root {given.data_root}: is not a folder")
    if DEVICE == "cpu" and not given.rehearse:
        parser.error("PyTorch sees no GPU here; --rehearse runs the phases on the CPU, at toy size")
    return given


def main() -> int:
    given = arguments()
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if given.rehearse:
            root, folder = generate(scratch / "images", train=16, test=4), scratch / "results"
        else:
            card = torch.cuda.get_device_name().lower().replace(" ", "-")
            root = given.data_root or generate(scratch / "images")
            folder = RESULTS / "card" / f"{card}-{date.today().isoformat()}"
        folder = (given.out or folder).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        place = Place(folder, root.absolute(), given.rehearse)
        ended = harvest(
            place, given.phases or list(PHASES), 60 * (given.minutes or (30 if given.rehearse else 8))
        )
        failed = [phase["phase"] for phase in ended if phase["status"] != "status 0"]
        for name in failed:
            log = folder / f"{name}.log"
            tail = log.read_text(errors="replace").splitlines()[-15:] if log.exists() else []
            print(f"\n{name}:", *tail, sep="\n    ", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
