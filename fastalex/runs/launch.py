"""One training, from a configuration to ``summary.json``: of a new run, or of one that is resumed."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastalex.config import Config
from fastalex.config.checks import validate
from fastalex.distributed import processes
from fastalex.distributed.processes import World
from fastalex.kernels import LazyBatch
from fastalex.runs import setup
from fastalex.runs.checkpoint import Checkpoint
from fastalex.runs.folder import RunFolder, check_free
from fastalex.runs.initial_weights import InitialWeights
from fastalex.runs.progress import by_crop
from fastalex.runs.recorder import FolderRecorder, Recorder
from fastalex.runs.resume import UnfinishedRun, find, resume_again
from fastalex.runs.run import Run
from fastalex.runs.signals import StopSignals
from fastalex.training.limits import explained
from fastalex.training.profiling import STEPS, profile_steps, take_steps
from fastalex.training.trainer import Trainer


@dataclass
class Request:
    """A request for a training.

    Attributes:
        config: the settings. On resume the checkpoint's settings win, except ``overrides`` whose keys are in
            :data:`fastalex.runs.resume.CHANGEABLE`.
        run_dir: the folder for the run's files.
        run_dir_given: whether the user named that folder; if not, a neighbour is taken where it is in use.
        overrides: the values that were given explicitly, by their dotted keys.
    """

    config: Config
    run_dir: Path
    run_dir_given: bool
    overrides: Mapping[str, Any]


def train(
    config: Config,
    run_dir: Path,
    *,
    run_dir_given: bool = True,
    overrides: Mapping[str, Any] | None = None,
) -> Path:
    """Run one training, as each of the processes that torchrun has started, or alone.

    Args:
        config: the settings; this and the other arguments are those of :class:`Request`.
        run_dir: the folder for the run's files.
        run_dir_given: whether the user named it.
        overrides: the values that were given explicitly, by their dotted keys.

    Returns:
        The run's folder; on other ranks than 0, ``run_dir``.

    Raises:
        FastalexError: for input that has to be corrected, before anything is written; DivergedError later.
        StoppedError: after SIGTERM or SIGINT.
    """
    started = time.perf_counter()
    request = Request(config, run_dir, run_dir_given, overrides or {})

    def prepare() -> None:
        validate(config)
        setup.resize_progressively(config)

    processes.alike(prepare)  # before the processes wait for each other
    with StopSignals() as signals, processes.joined(config.distributed.timeout) as world, world.watched():
        # In a function of its own: what it made is out of reach when the processes part.
        return train_on(world, request, signals, started)


def train_on(world: World, request: Request, signals: StopSignals, started: float) -> Path:
    """Do what :func:`train` does, as one of the connected processes."""
    if world.restarted:
        request.config.resume = resume_again(request.config.resume, request.run_dir_given)
    resumed: UnfinishedRun | None = None
    initial: InitialWeights | None = None

    def begin() -> tuple[Config, Checkpoint | None]:
        nonlocal resumed, initial
        resumed = find(request.config.resume, request.run_dir, request.run_dir_given, request.overrides)
        config = resumed.configuration(request.overrides) if resumed else request.config
        setup.check(config, world)
        if resumed is None and request.run_dir_given:
            check_free(request.run_dir, restart=config.resume == "auto")
        if resumed is not None:
            before, now = resumed.checkpoint.restore_config().train.epochs, config.train.epochs
            longer = f", now to {now} epochs in place of {before}" if now != before else ""
            print(f"resuming the run in {resumed.folder} from step {resumed.checkpoint.step}{longer}")
            return config, resumed.checkpoint
        initial = setup.initial_weights(config)
        if config.resume:
            print("resume=auto: there is no unfinished run with a checkpoint; starting a new one")
        return config, None

    try:
        config, checkpoint = world.on_main(begin)
        with explained(config):
            trainer, splits = setup.build(config, signals, world, initial)
            if checkpoint is not None:
                setup.restore(trainer, checkpoint, splits)
            recorder, folder = Recorder(request.run_dir), None
            if world.main:
                folder = _open_folder(request, config, resumed, trainer)
                parts = [("", STEPS)] if config.profile else by_crop(config, trainer.steps)
                classes = list(splits.classes)
                recorder = FolderRecorder(
                    folder, config, classes, splits.digest, resumed, trainer.step, parts
                )
            try:
                if config.profile:
                    _profile(trainer, recorder, folder)
                else:
                    before = checkpoint.training if checkpoint is not None else {}
                    Run(config, splits, trainer, recorder, signals, started, before).execute()
            finally:
                recorder.close()
            return request.run_dir if folder is None else folder.path
    finally:
        if resumed is not None:
            resumed.lock.release()


def _open_folder(
    request: Request, config: Config, resumed: UnfinishedRun | None, trainer: Trainer
) -> RunFolder:
    """Open the run's folder: a new one, or that of the run that is resumed."""
    if resumed is not None:
        return RunFolder.resumed(resumed.folder, resumed.lock, config, resumed.history(), trainer.step)
    folder = RunFolder.new(request.run_dir, request.run_dir_given, config, restart=config.resume == "auto")
    trainer.train_loader.set_epoch(0)
    images = next(iter(trainer.train_loader))[0]
    shown = images.materialize() if isinstance(images, LazyBatch) else images
    folder.augmented_inputs(shown, config.data.mean, config.data.std)
    return folder


def _profile(trainer: Trainer, recorder: Recorder, folder: RunFolder | None) -> None:
    """Take a few steps, on rank 0 under the profiler, in place of a training."""
    if folder is None:
        take_steps(trainer)
        return
    trainer.on_step = recorder.step
    try:
        profiled = profile_steps(trainer, folder.path)
    finally:
        recorder.end_training()
    rank = "of rank 0, " if trainer.world.size > 1 else ""
    print(
        f"\n{profiled.table()}\n\ntrace.json ({rank}for ui.perfetto.dev) and profile.txt are in {folder.path}"
    )
