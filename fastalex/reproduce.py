"""``python -m fastalex.reproduce``: run the rows of the study's table, and compare their errors with it."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import hydra
import torch

from fastalex.cli import command
from fastalex.config import Budget, Config, DataConfig, Flip, ReproduceConfig
from fastalex.config.plain import from_plain, load_config, model_options, plain, to_dataclass
from fastalex.data import Views, build_loader, load_splits, resolve_loader
from fastalex.errors import ConfigError, DivergedError
from fastalex.models import create_model
from fastalex.runs.launch import train
from fastalex.runtime import choose_runtime
from fastalex.study.report import write
from fastalex.study.results import NOT_RUN, load_run
from fastalex.study.rows import ROWS, run_folder
from fastalex.training.limits import explained
from fastalex.training.memory import room_for_images
from fastalex.training.timing import WARMUP_STEPS
from fastalex.training.trainer import Trainer

QUICK = (
    "data=digits",
    "data.resize=72",
    "data.crop=64",
    "data.flip=none",
    "train.epochs=2",
    "train.stages=[]",
)
PROBE_STEPS = WARMUP_STEPS + 2
TEST_VIEWS = 11  # of each test image: the centre crop, and ten
# A forward pass is a third of the arithmetic of a training step.
EVALUATION_COST = 1 / 3
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


def plan(config: ReproduceConfig, results: Path) -> list[Job]:
    """Return the runs of the requested rows.

    Raises:
        ConfigError: for a row that does not exist, or a folder that holds a run of other settings.
    """
    for name in config.rows:
        if name not in ROWS:
            raise ConfigError(f"rows={name}: there is no such row; choose from {', '.join(ROWS)}")
    jobs = []
    for name in dict.fromkeys(config.rows or ROWS):
        for seed in ROWS[name].seeds:
            overrides = [f"seed={seed}", *(QUICK if config.budget is Budget.quick else ())]
            run = to_dataclass(hydra.compose(f"row/{name}", overrides), Config)
            run.runtime.device = config.runtime.device
            if config.data.root is not None:
                run.data.root = config.data.root
            folder = run_folder(results, name, seed)
            jobs.append(Job(name, run, folder, _status(run, folder, name, results)))
    return jobs


def _status(config: Config, folder: Path, name: str, results: Path) -> str:
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
    return COMPLETE if load_run(results, name, config.seed) else INTERRUPTED


def estimate(config: Config, rates: dict[tuple, float]) -> float:
    """Estimate the seconds of a run from its number of images and a probe of a few steps.

    Args:
        config: of the run.
        rates: training images/s of the probes made so far, by network, crop and batch; added to.
    """
    training, validation, test = _numbers_of_images(config)
    views = 2 if config.data.flip is Flip.both else 1
    train = config.train
    before = sum(stage.epochs for stage in train.stages)
    parts = [*((s.epochs, s.crop) for s in train.stages), (train.epochs - before, config.data.crop)]
    seconds = sum(epochs * views * training / _rate(config, crop, rates) for epochs, crop in parts)
    evaluated = train.epochs * validation + 2 * TEST_VIEWS * test
    return seconds + EVALUATION_COST * evaluated / _rate(config, config.data.crop, rates)


def _numbers_of_images(config: Config) -> tuple[int, int, int]:
    """Training, validation and test images; CIFAR-10's own numbers where it has still to be downloaded."""
    data = config.data
    if data.name == "cifar10" and data.download and not Path(data.root).expanduser().exists():
        validation = math.ceil(50_000 * data.validation_fraction)
        return 50_000 - validation, validation, 10_000
    splits = load_splits(replace(data, download=False), config.seed, progress=False)
    return len(splits.train), len(splits.validation), len(splits.test)


def _rate(config: Config, crop: int, rates: dict[tuple, float]) -> float:
    """Training images/s on random pixels."""
    options = model_options(config.model)
    key = (config.model.name, *options.values(), crop, config.train.batch_size)
    if key in rates:
        return rates[key]
    with explained(config):
        runtime = choose_runtime(config.runtime)
        images = PROBE_STEPS * config.train.batch_size
        data = DataConfig("synthetic", resize=crop, crop=crop, images=images)
        splits = load_splits(data, 0, progress=False)
        torch.manual_seed(0)
        model = create_model(config.model.name, len(splits.classes), **options)
        room = room_for_images(model, replace(config, data=data), runtime)
        loader = build_loader(
            splits.train,
            data,
            resolve_loader(config.loader, splits, room),
            views=Views.random,
            batch_size=config.train.batch_size,
            runtime=runtime,
        )
        runtime.place(model)
        # A rate at which no network diverges.
        recipe = replace(config.train, epochs=1, stages=[], lr=1e-6)
        rates[key] = Trainer(model, recipe, loader, None, runtime).run_epoch().images_per_second
    return rates[key]


def _overrides(config: ReproduceConfig) -> dict[str, str]:
    """Settings beside the rows' own: an interrupted run takes them, or refuses them."""
    overrides = {} if config.data.root is None else {"data.root": config.data.root}
    return (
        overrides
        if config.runtime.device == "auto"
        else overrides | {"runtime.device": config.runtime.device}
    )


def print_plan(jobs: list[Job]) -> None:
    """Print what would run, and an estimate of its time from a probe of a few steps."""
    rates: dict[tuple, float] = {}
    total = 0.0
    print(f"{'run':<38}  {'epochs':>6}  {'crop':>4}  {'hours':>7}  status")
    for job in jobs:
        hours = 0.0 if job.status == COMPLETE else estimate(job.config, rates) / 3600
        total += hours
        config = job.config
        print(
            f"{job!s:<38}  {config.train.epochs:>6}  {config.data.crop:>4}  {hours:7.2f}  {job.status}",
            flush=True,
        )
    print(
        f"{'together':<38}  {'':>6}  {'':>4}  {total:7.2f}\n"
        f"an estimate from {PROBE_STEPS - WARMUP_STEPS} steps of each network on random pixels; "
        "an interrupted run counts in full"
    )


def run(config: ReproduceConfig) -> None:
    """Run every row that is not complete, and write the tables and figures after each run.

    Raises:
        FastalexError: for input that has to be corrected; DivergedError after the other rows have been run.
    """
    quick = config.budget is Budget.quick
    results = Path(config.folder) / "quick" if quick else Path(config.folder)
    jobs = plan(config, results)
    if config.dry_run:
        print_plan(jobs)
        return
    readme = None if quick else Path(config.readme)
    diverged: list[str] = []
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
        write(results, quick, readme)
    write(results, quick, readme)
    print(f"reproduction.md, reproduction.json and the loss figures are in {results}")
    if diverged:
        raise DivergedError("; ".join(diverged))


@command("reproduce", ReproduceConfig)
def _reproduce(config: ReproduceConfig, run_dir: Path) -> None:
    run(config)


def main() -> None:
    """Reproduce the study's table."""
    sys.argv[1:] = [_as_hydra(argument) for argument in sys.argv[1:]]
    _reproduce()


def _as_hydra(argument: str) -> str:
    """Allow ``rows=a,b``, which Hydra would take for two runs, and ``--dry-run``."""
    if argument == "--dry-run":
        return "dry_run=true"
    key, _, value = argument.partition("=")
    return f"rows=[{value}]" if key == "rows" and not value.startswith("[") else argument


if __name__ == "__main__":
    main()
