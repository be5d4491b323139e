"""Which run to go on with, and with what configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import EnumMeta
from pathlib import Path
from typing import Any

from fastalex.checkpoint import Checkpoint, plain
from fastalex.cli import flat
from fastalex.config import Config
from fastalex.errors import CheckpointError, ConfigError
from fastalex.saving import NEWEST, load_newest, older
from fastalex.tracking import RunLock, is_finished

# What may be set anew: where the data lie, and what does not change the result.
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


@dataclass(frozen=True)
class Found:
    """An unfinished run.

    Attributes:
        folder: of the run.
        lock: on it.
        checkpoint: to go on from.
        path: of the checkpoint.
    """

    folder: Path
    lock: RunLock
    checkpoint: Checkpoint
    path: Path

    def configuration(self, asked: Mapping[str, Any]) -> Config:
        """Return the run's configuration, with what was asked for anew.

        Args:
            asked: values by their dotted keys, as :func:`fastalex.checkpoint.plain` has them.

        Raises:
            ConfigError: if one of them is another than the run's and cannot be changed.
            CheckpointError: the configuration is of another version.
        """
        config = self.checkpoint.restore_config()
        ours = flat(plain(config))
        for key, value in asked.items():
            if key in CHANGEABLE or key == "resume" or value == ours.get(key):
                continue
            if (key, value) == ("loader.name", "auto"):  # the run has settled on one
                continue
            raise ConfigError(
                f"{key}={value}: the run in {self.folder} has {key}={ours.get(key)}, and goes on as it "
                "began; leave out what sets it, or begin another run without resume"
            )
        for key in CHANGEABLE:
            if key in asked:
                set_key(config, key, asked[key])
        return config


def find(resume: str, run_dir: Path, given: bool) -> Found | None:
    """Find the run that ``resume=auto|PATH`` means, and lock it.

    Args:
        resume: ``auto``, a checkpoint or a run's folder.
        run_dir: where a new run would go: outputs/DATE/TIME, or hydra.run.dir.
        given: whether hydra.run.dir was given.

    Returns:
        None where ``auto`` finds nothing to go on with.

    Raises:
        ConfigError: for a run that is finished, or in use.
        CheckpointError: for a path without a checkpoint, or none that is whole.
    """
    if resume == "auto":
        return _auto(run_dir, given)
    path = Path(resume)
    if not path.exists():
        raise CheckpointError(f"resume={resume}: there is no such run or checkpoint")
    folder = path if path.is_dir() else path.parent
    if given and run_dir.resolve() != folder.resolve():
        raise ConfigError(
            f"hydra.run.dir={run_dir}: a resumed run stays in its folder; leave hydra.run.dir out"
        )
    if path.is_dir() and is_finished(folder):
        raise ConfigError(f"resume={resume}: that run is finished; its figures are in {folder}/summary.json")
    lock = RunLock.take(folder)
    if lock is None:
        raise ConfigError(f"resume={resume}: another process is at work on that run")
    loaded = load_newest(path)
    if loaded is None:
        lock.release()
        raise CheckpointError(f"resume={resume}: holds no checkpoint; begin another run without resume")
    return Found(folder, lock, *loaded)


def _auto(run_dir: Path, given: bool) -> Found | None:
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
            return Found(folder, lock, *loaded)
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


def set_key(config: Config, key: str, value: Any) -> None:
    """Set what a dotted key names to a plain value."""
    *sections, name = key.split(".")
    target: Any = config
    for section in sections:
        target = getattr(target, section)
    kind = type(getattr(target, name))
    setattr(target, name, kind[value] if isinstance(kind, EnumMeta) else value)
