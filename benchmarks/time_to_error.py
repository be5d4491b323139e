"""Wall time from a cold start to the study's validation error: of a finished run, and of the plain program.

    python -m benchmarks.time_to_error results/alexnet [--error 0.1397] [--study results/alexnet_study_recipe]

fastalex's time is measured: it is read from the run's ``metrics.jsonl`` and ``summary.json``, and includes
validation. The reference's is extrapolated, without validation: the images that the study's recipe took to
the same error in a run of that recipe (``--study``), divided by the images/s of ``benchmarks/reference.py``
(``benchmarks/results/step_KIND.csv``). A run of the recipe that ended above the error gives a lower bound. A
time for which a measurement is missing is marked "not measured". Writes
``benchmarks/results/time_to_error.json``.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.hardware import KIND
from benchmarks.report import RESULTS, aligned, read_measurements
from fastalex.errors import ConfigError, FastalexError
from fastalex.files import write_text
from fastalex.study.results import FinishedRun, read_run
from fastalex.study.rows import ROWS

PUBLISHED = ROWS["alexnet"].published
MEASURED, EXTRAPOLATED, NOT_MEASURED = "measured", "extrapolated", "not measured"
LOWER_BOUND = "extrapolated lower bound"


@dataclass(frozen=True)
class TimeToError:
    """A program's time to a validation error.

    Attributes:
        program: its name.
        kind: measured, extrapolated, an extrapolated lower bound, or not measured.
        epochs: until the error was reached; for a lower bound, epochs after which it was not yet reached.
        images: training images seen in these epochs.
        startup_seconds: from the configuration to the first step, including reading the data, but not
            Python's imports, which take some seconds.
        warmup_seconds: of the steps that compile kernels; a part of ``training_seconds``.
        training_seconds: of these epochs, including validation if it was measured.
        seconds: from the cold start to the error.
        hardware: on which it was measured.
        note: what is missing, or what the figure leaves out.
    """

    program: str
    kind: str
    epochs: int | None = None
    images: int | None = None
    startup_seconds: float | None = None
    warmup_seconds: float | None = None
    training_seconds: float | None = None
    seconds: float | None = None
    hardware: str = ""
    note: str = ""


def measured(run: FinishedRun, error: float) -> TimeToError:
    """Read the time of a finished run."""
    hardware = run.summary["hardware"]
    epochs = run.epochs_to(error)
    if epochs is None:
        best = run.summary["best_on_validation"]["validation_top1_error"]
        note = f"the run's best validation error is {best:.4f}: {error:.4f} was not reached"
        return TimeToError("fastalex", NOT_MEASURED, hardware=hardware, note=note)
    training = sum(epoch["seconds"] for epoch in run.epochs[:epochs])
    startup = run.summary["startup_seconds"]
    return TimeToError(
        "fastalex",
        MEASURED,
        epochs=epochs,
        images=_images(run, epochs),
        startup_seconds=startup,
        warmup_seconds=sum(epoch["warmup_seconds"] for epoch in run.epochs[:epochs]),
        training_seconds=training,
        seconds=startup + training,
        hardware=hardware,
    )


def extrapolated(study: FinishedRun | None, steps: Path, error: float) -> TimeToError:
    """Extrapolate the reference's time from its rate and the study's recipe."""
    rate, hardware, missing = None, "", []
    if steps.is_file():
        for measurement in read_measurements(steps.read_text()):
            if list(measurement.subject.values())[:2] == ["training", "reference"]:
                rate, hardware = measurement.median, measurement["hardware"]
    if rate is None:
        missing.append(f"the reference's images/s are not in {steps}: make bench")
    if study is None:
        missing.append(
            "the study's recipe has not been run: python -m fastalex.reproduce rows=alexnet_study_recipe, "
            "then --study outputs/reproduction/alexnet_study_recipe"
        )
    if rate is None or study is None:
        return TimeToError("reference", NOT_MEASURED, hardware=hardware, note="; ".join(missing))
    reached = study.epochs_to(error)
    epochs = reached or study.summary["epochs"]
    images = _images(study, epochs)
    seconds = images / rate
    note = f"{images:,} images at {rate:.1f} a second, without start and validation"
    if reached is None:
        note += f"; the study's recipe had not reached {error:.4f} by then, so the time is longer"
    return TimeToError(
        "reference",
        EXTRAPOLATED if reached else LOWER_BOUND,
        epochs,
        images,
        training_seconds=seconds,
        seconds=seconds,
        hardware=hardware,
        note=note,
    )


def _images(run: FinishedRun, epochs: int) -> int:
    return int(run.epochs[epochs - 1]["step"] * run.config["train"]["batch_size"])


def report(results: list[TimeToError], error: float) -> str:
    """Return the times as text."""
    lines = [f"to a validation error of {error:.4f}"]
    heads = ("program", "", "epochs", "images", "start", "warm-up", "training", "together")
    cells: list[tuple[str, ...]] = [heads]
    for result in results:
        counts = ["" if n is None else f"{n:,}" for n in (result.epochs, result.images)]
        times = (result.startup_seconds, result.warmup_seconds, result.training_seconds, result.seconds)
        cells.append((result.program, result.kind, *counts, *map(_duration, times)))
    lines.append(aligned(cells))
    lines += [f"{result.program}: {result.note}" for result in results if result.note]
    fast, reference = results
    if fast.seconds and reference.seconds:
        ratio = reference.seconds / fast.seconds
        factor = f"{ratio:.1f}"
        if reference.kind == LOWER_BOUND:
            factor = f"more than {math.floor(10 * ratio) / 10:.1f}"  # rounding up would overstate a bound
        lines.append(f"the reference takes {factor} times as long, extrapolated")
        if fast.hardware != reference.hardware:
            lines.append(f"of two machines: {fast.hardware} and {reference.hardware}")
    return "\n".join(lines)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds:,.1f} s" if seconds < 600 else f"{seconds / 3600:,.2f} h"


def main(arguments: list[str] | None = None) -> int:
    """Print and write the times; return the exit status."""
    assert PUBLISHED is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("--error", type=float, default=PUBLISHED[0], help="on validation images")
    parser.add_argument("--study", type=Path, default=Path("results/alexnet_study_recipe"))
    parser.add_argument(
        "--steps", type=Path, default=RESULTS / f"step_{KIND}.csv", help="of benchmarks/test_step.py"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "time_to_error.json")
    given = parser.parse_args(arguments)
    try:
        run = read_run(given.run)
        if run is None:
            raise ConfigError(f"{given.run}: holds no finished run; name a folder with summary.json")
        results = [measured(run, given.error), extrapolated(read_run(given.study), given.steps, given.error)]
        content: dict[str, Any] = {"validation_error": given.error, "programs": [asdict(r) for r in results]}
        write_text(given.out, json.dumps(content, indent=2) + "\n")
    except (FastalexError, ValueError) as error:
        print(f"fastalex: error: {error}", file=sys.stderr)
        return 2
    print(report(results, given.error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
