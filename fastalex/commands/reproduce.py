"""``python -m fastalex.reproduce``: run the rows of the study's table, and compare their errors.

The runs go to a folder of the user's. Their errors are compared with those of the committed runs in
``results/``, which ``publish=true`` replaces.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra

from fastalex.config import Budget, Config, ReproduceConfig
from fastalex.config.plain import from_plain, load_config, plain, to_dataclass
from fastalex.errors import ConfigError, DivergedError
from fastalex.runs.launch import train
from fastalex.runs.setup import resize_progressively
from fastalex.study import committed, comparison, report
from fastalex.study.estimate import Estimator
from fastalex.study.results import NOT_RUN, read_run
from fastalex.study.rows import ROWS, run_folder, select

QUICK = (
    "data=digits",
    "data.resize=72",
    "data.crop=64",
    "data.flip=none",
    "train.epochs=2",
    "train.stages=[]",
    "train.progressive_resizing=0",
)
COMPLETE, INTERRUPTED = "complete", "interrupted"


@dataclass
class Job:
    """A run of a row: its configuration, its folder, and how far it is."""

    row: str
    config: Config
    folder: Path
    status: str

    def __str__(self) -> str:
        return f"{self.row}, seed {self.config.seed}"


def plan(config: ReproduceConfig, runs: Path) -> list[Job]:
    """Return the runs of the requested rows.

    Args:
        config: of the command.
        runs: the folder that the rows' folders are in.

    Raises:
        ConfigError: for a row that does not exist, or a folder that holds a run of other settings.
    """
    jobs = []
    for name in select(config.rows):
        composed = hydra.compose(f"row/{name}", list(QUICK) if config.budget is Budget.quick else [])
        for seed in ROWS[name].seeds:
            run = to_dataclass(composed, Config)
            run.seed = seed
            resize_progressively(run)
            run.runtime.device = config.runtime.device
            if config.data.root is not None:
                run.data.root = config.data.root
            folder = run_folder(runs, name, seed)
            jobs.append(Job(name, run, folder, _status(run, folder, name)))
    return jobs


def _status(config: Config, folder: Path, name: str) -> str:
    """Return how far a run is; refuse a folder whose network, data or recipe differ from the row's."""
    if not (folder / "config.yaml").is_file():
        return NOT_RUN
    remedy = "move the folder away, or name another with folder="
    try:
        theirs = plain(from_plain(load_config(folder)))
    except ConfigError as error:
        raise ConfigError(
            f"{folder}: holds a run of another version of fastalex ({error}); {remedy}"
        ) from error
    ours = plain(config)
    for section in ("model", "data", "train"):
        for key, wanted in ours[section].items():
            found = theirs[section].get(key)
            is_computed = key in ("color_eigenvalues", "color_eigenvectors") and not wanted
            if key not in ("root", "download") and not is_computed and found != wanted:
                raise ConfigError(
                    f"{folder}: holds a run of {section}.{key}={found}, and the row {name} has {wanted}; "
                    f"{remedy}"
                )
    return COMPLETE if read_run(folder) else INTERRUPTED


def _overrides(config: ReproduceConfig) -> dict[str, str]:
    """Settings beside the rows' own: an interrupted run takes them, or refuses them."""
    overrides = {} if config.data.root is None else {"data.root": config.data.root}
    return (
        overrides
        if config.runtime.device == "auto"
        else overrides | {"runtime.device": config.runtime.device}
    )


def print_plan(jobs: list[Job]) -> None:
    """Print what would run, and an estimate of its time from a few steps of each network."""
    estimator = Estimator()
    total = 0.0
    print(f"{'run':<38}  {'epochs':>6}  {'crop':>4}  {'h:min':>7}  status")
    for job in jobs:
        seconds = None if job.status == COMPLETE else estimator.seconds(job.config)
        total += seconds or 0.0
        config = job.config
        time = "" if seconds is None else _hours(seconds)
        print(
            f"{job!s:<38}  {config.train.epochs:>6}  {config.data.crop:>4}  {time:>7}  {job.status}",
            flush=True,
        )
    print(f"{'together':<38}  {'':>6}  {'':>4}  {_hours(total):>7}")
    if total:
        print(f"The times are estimates:\n{estimator.assumptions()}")


def _hours(seconds: float) -> str:
    """Hours and minutes, rounded up to a minute."""
    hours, minutes = divmod(math.ceil(seconds / 60), 60)
    return f"{hours}:{minutes:02}"


def run(config: ReproduceConfig) -> None:
    """Run every row that is not complete, and write the tables and figures after each run.

    Raises:
        FastalexError: for input that has to be corrected; DivergedError after the other rows have been run.
    """
    quick = config.budget is Budget.quick
    results = committed.find(config.results)
    _check(config, results)
    folder = Path(config.folder) / "quick" if quick else Path(config.folder)
    jobs = plan(config, folder)
    if config.dry_run:
        print_plan(jobs)
        return
    requested = {job.row for job in jobs}
    ours = report.collect(results, False) if results and not quick else None
    diverged: list[str] = []
    comparisons: list[comparison.Comparison] | None = None
    for job in jobs:
        print(f"== {job}: {job.status}", flush=True)
        if job.status == COMPLETE:
            continue
        job.config.resume = "auto"  # where it was interrupted, if it was
        try:
            train(job.config, job.folder, overrides=_overrides(config))
        except DivergedError as error:
            diverged.append(f"{job}: {error}")
            print(diverged[-1], file=sys.stderr)
            continue
        comparisons = _write(folder, quick, ours, requested)
    if comparisons is None:
        comparisons = _write(folder, quick, ours, requested)
    print(f"\n{comparison.printed(comparisons)}\n")
    print(f"comparison.md says how the intervals are computed; it and reproduction.md are in {folder}")
    if config.publish:
        _publish(jobs, committed.check_publishable(results))
    if diverged:
        raise DivergedError("; ".join(diverged))


def _check(config: ReproduceConfig, results: Path | None) -> None:
    """Refuse folders that cannot be used, before anything is trained."""
    folder = Path(config.folder)
    if any(path.exists() and not path.is_dir() for path in (folder, *folder.parents)):
        raise ConfigError(f"folder={folder}: is not a folder; name another")
    if results is not None and folder.resolve() == results.resolve():
        raise ConfigError(
            f"folder={folder}: holds the committed runs, which yours are compared with; name another folder"
        )
    if config.publish:
        if config.budget is Budget.quick:
            raise ConfigError("publish=true: runs of budget=quick are not the rows; leave one of them out")
        committed.check_publishable(results)


def _write(
    folder: Path, quick: bool, ours: dict[str, Any] | None, requested: set[str]
) -> list[comparison.Comparison]:
    """Write everything about the runs so far into the user's folder."""
    theirs = report.write(folder, quick, None)
    comparisons = comparison.compare(theirs, ours, requested)
    comparison.write(folder, comparisons, comparison.note(theirs, ours, quick=quick))
    return comparisons


def _publish(jobs: list[Job], results: Path) -> None:
    """Put the complete runs among the committed ones, and write ``results/`` and the README's table anew."""
    complete = [job for job in jobs if read_run(job.folder)]
    committed.replace_runs(results, [(job.row, job.config.seed, job.folder) for job in complete])
    report.write(results, False, results.parent / "README.md")
    print(f"published in {results}: {'; '.join(map(str, complete)) or 'nothing'}")
