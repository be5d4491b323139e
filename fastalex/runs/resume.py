"""Which run to resume, and with what configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastalex.config import Config, Schedule
from fastalex.config.plain import flat, plain, set_key
from fastalex.errors import CheckpointError, ConfigError
from fastalex.files import remove_empty
from fastalex.runs.checkpoint import Checkpoint
from fastalex.runs.checkpoint_writer import NEWEST, load_newest, older
from fastalex.runs.folder import RunLock, is_finished
from fastalex.training.epoch import Epoch
from fastalex.training.schedule import has_ended

# What may change on resume: where the data lie, and what does not change the result.
CHANGEABLE = (
    "checkpoint.every_seconds",
    "checkpoint.every_steps",
    "checkpoint.keep",
    "checkpoint.on_error",
    "data.download",
    "data.root",
    "distributed.timeout",
    "loader.workers",
    "log_every",
)
EPOCHS = "train.epochs"  # may be raised under the plateau schedule


@dataclass(frozen=True)
class UnfinishedRun:
    """An unfinished run.

    Attributes:
        folder: of the run.
        lock: on it.
        checkpoint: to resume from.
        path: of the checkpoint.
    """

    folder: Path
    lock: RunLock
    checkpoint: Checkpoint
    path: Path

    def configuration(self, overrides: Mapping[str, Any]) -> Config:
        """Return the run's configuration with the explicit overrides that may change.

        Args:
            overrides: values by their dotted keys, as :func:`fastalex.config.plain.plain` has them.

        Raises:
            ConfigError: if one of them differs from the run's and cannot be changed.
            CheckpointError: the configuration is of another version.
        """
        config = self.checkpoint.restore_config()
        ours = flat(plain(config))
        for key, value in overrides.items():
            if key in CHANGEABLE or key == "resume" or value == ours.get(key):
                continue
            if (key, value) == ("loader.name", "auto"):  # the run has settled on one
                continue
            if key == EPOCHS and value > config.train.epochs:
                self._check_longer(config, value)
                continue
            raise ConfigError(
                f"{key}={value}: the run in {self.folder} has {key}={ours.get(key)}, and a resumed "
                "run keeps it; leave out what sets it, or start another run without resume"
            )
        for key in (*CHANGEABLE, EPOCHS):
            if key in overrides:
                set_key(config, key, overrides[key])
        return config

    def _check_longer(self, config: Config, epochs: int) -> None:
        """Refuse more epochs than the run has, unless its schedule does not depend on their number."""
        before = config.train.epochs
        if config.train.schedule is Schedule.one_cycle:
            raise ConfigError(
                f"{EPOCHS}={epochs}: the run in {self.folder} lowers its learning rate to zero over {before} "
                f"epochs (train.schedule=one_cycle) and has no rate for more; train its weights further in "
                f"another run, with init_from={self.folder} {EPOCHS}={epochs - before}"
            )
        rate = self.checkpoint.training["optimizer"]["param_groups"][0]["lr"]
        if has_ended(config.train, rate):
            raise ConfigError(
                f"{EPOCHS}={epochs}: the run in {self.folder} has ended by its schedule, after the last "
                f"reduction of its learning rate; train its weights further in another run, with "
                f"init_from={self.folder}"
            )

    def history(self) -> list[Epoch]:
        """Return the epochs that are complete.

        Raises:
            CheckpointError: the checkpoint lacks them.
        """
        try:
            return [Epoch(**epoch) for epoch in self.checkpoint.training["history"]]
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"resume={self.path}: lacks the epochs so far; train again") from error


def find(
    resume: str, run_dir: Path, given: bool, overrides: Mapping[str, Any] | None = None
) -> UnfinishedRun | None:
    """Find the run that ``resume=auto|PATH`` means, and lock it.

    Args:
        resume: ``auto``, a checkpoint or a run's folder; empty for a new run.
        run_dir: where a new run would go: outputs/DATE/TIME, or hydra.run.dir.
        given: whether hydra.run.dir was given.
        overrides: the values that were given explicitly, by their dotted keys; with more epochs than it had,
            a run that is named may be finished.

    Returns:
        None for a new run, also where ``auto`` finds nothing to resume.

    Raises:
        ConfigError: for a run that is finished, or in use.
        CheckpointError: for a path without a checkpoint, or none that is whole.
    """
    if not resume:
        return None
    epochs = (overrides or {}).get(EPOCHS, 0)
    found = _auto(run_dir, given) if resume == "auto" else _named(resume, run_dir, given, epochs)
    if found is not None and found.folder.resolve() != run_dir.resolve():
        remove_empty(run_dir)
    return found


def resume_again(resume: str, given: bool) -> str:
    """Return what to resume in a process that torchrun has restarted, such that no progress is lost.

    Args:
        resume: as it was asked for.
        given: whether hydra.run.dir was given.
    """
    if resume == "auto" or not resume:
        # Without a folder of that name, the newest unfinished run may be another command's.
        return "auto" if given else resume
    path = Path(resume)
    return str(path.parent) if path.is_file() else resume


def _named(resume: str, run_dir: Path, given: bool, epochs: int) -> UnfinishedRun:
    path = Path(resume)
    if not path.exists():
        raise CheckpointError(f"resume={resume}: there is no such run or checkpoint")
    folder = path if path.is_dir() else path.parent
    if given and run_dir.resolve() != folder.resolve():
        raise ConfigError(
            f"hydra.run.dir={run_dir}: a resumed run stays in its folder; leave hydra.run.dir out"
        )
    finished = ConfigError(f"resume={resume}: that run is finished; its figures are in {folder}/summary.json")
    whole = (path.is_dir() or path.name == NEWEST) and is_finished(folder)
    if whole and not epochs:
        raise finished
    lock = RunLock.take(folder)
    if lock is None:
        raise ConfigError(f"resume={resume}: another process is at work on that run")
    loaded = load_newest(path)
    if loaded is None:
        lock.release()
        raise CheckpointError(f"resume={resume}: holds no checkpoint; start another run without resume")
    if whole and epochs <= loaded[0].restore_config().train.epochs:
        lock.release()
        raise finished
    return UnfinishedRun(folder, lock, *loaded)


def _auto(run_dir: Path, given: bool) -> UnfinishedRun | None:
    if given and is_finished(run_dir):
        raise ConfigError(f"hydra.run.dir={run_dir}: the run there is finished; name another folder")
    for folder in [run_dir] if given else _unfinished(run_dir.parent.parent):
        if not folder.is_dir():
            continue
        lock = RunLock.take(folder)
        if lock is None:
            if given:
                raise ConfigError(f"hydra.run.dir={run_dir}: another process is at work on the run there")
            continue  # it is running
        loaded = load_newest(folder)
        if loaded is not None:
            return UnfinishedRun(folder, lock, *loaded)
        lock.release()
    return None


def _unfinished(outputs: Path) -> list[Path]:
    """Run folders that have a checkpoint and no summary; that of the newest checkpoint first."""
    written = {}
    for config in outputs.glob("*/*/config.yaml"):
        folder = config.parent
        checkpoints = [path for path in (folder / NEWEST, *older(folder).values()) if path.is_file()]
        if checkpoints and not is_finished(folder):
            written[folder] = max(path.stat().st_mtime_ns for path in checkpoints)
    return sorted(written, key=written.__getitem__, reverse=True)
