"""A run's folder: its lock, and the files of figures in it."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from fastalex.config import Config
from fastalex.config.plain import flat, plain
from fastalex.errors import ConfigError, OutputError
from fastalex.files import remove_partial, write_text
from fastalex.runs.background import Background
from fastalex.runs.checkpoint import FINAL_WEIGHTS
from fastalex.training.epoch import Epoch

SUMMARY, METRICS, TENSORBOARD = "summary.json", "metrics.jsonl", "tensorboard"
DRAW_EVERY = 30.0  # seconds; a drawing takes most of one, and holds Python's lock for as long


class RunLock:
    """A lock on a run's folder, held by the process that trains; the system releases it if that is killed."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor
        _held.add(self)

    @classmethod
    def take(cls, folder: Path) -> RunLock | None:
        """Lock a folder; None if another process holds the lock."""
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError:  # a file system without locks
            pass
        return cls(descriptor)

    def release(self) -> None:
        """Release the lock; a second call does nothing."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


_held: WeakSet[RunLock] = WeakSet()


def _forget_locks() -> None:
    """Close a forked child's copies of the locks, which would outlive a parent that is killed."""
    for lock in _held:
        lock.release()


os.register_at_fork(after_in_child=_forget_locks)


def is_finished(folder: Path) -> bool:
    """Whether a folder holds a finished run."""
    return (folder / SUMMARY).is_file()


def _holds_run(folder: Path) -> bool:
    """Whether a folder holds a run, or a file of another program that a run would replace."""
    names = (TENSORBOARD, "config.yaml", METRICS, SUMMARY, "checkpoint*.pt", "*.safetensors")
    return any(path for name in names for path in folder.glob(name))


def _is_free(folder: Path, restart: bool) -> bool:
    """Whether a new run may write to a folder; the arguments are those of :func:`check_free`."""
    return not _holds_run(folder) or (restart and not is_finished(folder))


def check_free(folder: Path, *, restart: bool) -> None:
    """Refuse a folder that holds a run, before a new run reads its images.

    Args:
        folder: that the user named; it need not exist.
        restart: whether a run that has not been finished may begin again there.

    Raises:
        ConfigError: it holds a run.
    """
    if not _is_free(folder, restart):
        raise _in_use(folder)


class RunFolder:
    """The folder of one run. Every file in it is whole at any moment.

    Args:
        path: the folder.
        lock: the lock on it.
        history: the epochs that are complete.
        step: the step that the run resumes from; TensorBoard drops what it has of later ones.
    """

    def __init__(self, path: Path, lock: RunLock, history: Sequence[Epoch] = (), step: int = 0) -> None:
        self.path = path
        self._lock = lock
        self.epochs = list(history)
        self._drawing = Background("drawing", DRAW_EVERY)
        self._drawn = 0  # epochs in losses.png
        remove_partial(path)
        purge = step + 1 if step else None
        self._writer: SummaryWriter | None = None
        try:
            self._writer = SummaryWriter(path / TENSORBOARD, purge_step=purge)
        except OSError as error:
            raise OutputError(f"{path}: cannot be written ({error.strerror})") from error

    @classmethod
    def new(cls, path: Path, given: bool, config: Config, *, restart: bool = False) -> RunFolder:
        """Create the folder of a new run.

        Args:
            path: the folder, created by Hydra; where another run already writes there, a numbered neighbour.
            given: whether the user named the folder, which is then used or refused, never renamed.
            config: written to ``config.yaml``.
            restart: use a named folder even if a run started there, as long as none is running.

        Raises:
            ConfigError: if the user named a folder that already holds a run.
        """
        folder = cls(*_claim(path, given, restart))
        folder._write_config(config)
        return folder

    @classmethod
    def resumed(
        cls, path: Path, lock: RunLock, config: Config, history: Sequence[Epoch], step: int
    ) -> RunFolder:
        """Open the folder of a resumed run, and remove what was written after its checkpoint."""
        folder = cls(path, lock, history, step)
        folder._write_config(config)
        for name in (SUMMARY, FINAL_WEIGHTS):
            (path / name).unlink(missing_ok=True)
        folder._write_metrics()
        return folder

    def augmented_inputs(self, images: Tensor, mean: Sequence[float], std: Sequence[float]) -> None:
        """Show in TensorBoard up to 32 training images, normalised, float ``(N, 3, H, W)``."""
        shown = images[:32].float().cpu() * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
        self._tell(lambda writer: writer.add_images("augmented inputs", shown.clamp(0, 1), 0))

    def loss(self, step: int, value: float) -> None:
        """Record the mean training loss of the steps up to this one."""
        self._tell(lambda writer: writer.add_scalar("loss/train", value, step))

    def epoch(self, epoch: Epoch) -> None:
        """Record an epoch: a line of ``metrics.jsonl``, TensorBoard, and from time to time ``losses.png``.

        Raises:
            OutputError: a file cannot be written; the epoch is recorded with the next one.
        """
        self.epochs.append(epoch)
        # Not flushed: that may take as long as the checkpoint which is being written to the same disk, and a
        # resumed run writes this file anew from its checkpoint.
        self._write_metrics(durable=False)
        self._tell(lambda writer: _add_epoch(writer, epoch))
        self._drawing.check()
        if self._drawing.due:
            self._draw()

    def finish(self) -> None:
        """Complete ``metrics.jsonl`` and ``losses.png``: there are no more epochs.

        Raises:
            OutputError: one of them cannot be written.
        """
        if not self.epochs:
            return
        self._write_metrics()
        with suppress(OutputError):  # of an earlier drawing, which the last one replaces
            self._drawing.wait()
        if self._drawn < len(self.epochs):
            self._draw()
            self._drawing.wait()

    def summary(self, summary: dict[str, Any]) -> None:
        """Write ``summary.json``."""
        write_text(self.path / SUMMARY, json.dumps(summary, indent=2) + "\n")

    def hparams(self, config: Config, summary: Mapping[str, Any], step: int) -> None:
        """Show TensorBoard's HParams page the settings of the run, and its figures.

        Args:
            config: the settings.
            summary: the content of ``summary.json``.
            step: the run's last.
        """
        values = flat(plain(config))
        # PyTorch would write a truth value as the number 1 or 0.
        settings = {
            key: value if type(value) in (int, float) else str(value) for key, value in values.items()
        }
        figures = {"hparams/images per second": summary["images_per_second"]}
        for name in ("single_crop", "ten_crop"):
            if name in summary:
                figures[f"hparams/test top-1 error, {name}"] = summary[name]["top1_error"]
        errors = [epoch.validation_top1_error for epoch in self.epochs[-1:]]
        if errors and errors[0] is not None:
            figures["hparams/validation top-1 error"] = errors[0]
        # In this run: by default it would be another, in a folder inside the run's.
        self._tell(lambda writer: writer.add_hparams(settings, figures, run_name=".", global_step=step))

    def close(self) -> None:
        """Close the TensorBoard file and release the lock."""
        try:
            with suppress(OutputError):  # :meth:`finish` has raised it, or the run ends with another error
                self._drawing.close()
            self._tell(SummaryWriter.close)
        finally:
            self._lock.release()

    def _draw(self) -> None:
        """Draw the epochs so far, in the background."""
        epochs = tuple(self.epochs)

        def draw() -> None:
            from fastalex import plots  # takes half a second to import, so not at a run's start

            plots.losses(epochs, self.path / "losses.png")
            self._drawn = len(epochs)

        self._drawing.start(draw)

    def _write_config(self, config: Config) -> None:
        write_text(self.path / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(config)))

    def _write_metrics(self, *, durable: bool = True) -> None:
        lines = [json.dumps(dataclasses.asdict(epoch)) + "\n" for epoch in self.epochs]
        write_text(self.path / METRICS, "".join(lines), durable=durable)

    def _tell(self, write: Callable[[SummaryWriter], None]) -> None:
        """Write to TensorBoard's file; after the first error, no longer."""
        if self._writer is None:
            return
        try:
            write(self._writer)
        except OSError as error:
            self._writer = None
            raise OutputError(
                f"{self.path / TENSORBOARD}: cannot be written ({error.strerror or error})"
            ) from error


def _add_epoch(writer: SummaryWriter, epoch: Epoch) -> None:
    for name, value in (
        ("loss/validation", epoch.validation_loss),
        ("error/train top-1", epoch.train_top1_error),
        ("error/validation top-1", epoch.validation_top1_error),
        ("error/validation top-5", epoch.validation_top5_error),
        ("images per second", epoch.images_per_second),
        ("FLOP/s utilization", epoch.flops_utilization),
        ("learning rate", epoch.learning_rate),
    ):
        if value is not None:
            writer.add_scalar(name, value, epoch.step)
    writer.flush()


def _claim(path: Path, given: bool, restart: bool) -> tuple[Path, RunLock]:
    """Claim a folder for this run. Hydra gives two runs started in the same second the same path."""
    for attempt in range(1, 1000):
        candidate = path if attempt == 1 else path.with_name(f"{path.name}-{attempt}")
        candidate.mkdir(parents=True, exist_ok=True)
        lock = RunLock.take(candidate)
        if lock is not None:
            if _is_free(candidate, restart):
                try:
                    (candidate / TENSORBOARD).mkdir()  # exactly one process succeeds
                    return candidate, lock
                except FileExistsError:
                    if restart:
                        return candidate, lock
            lock.release()
        if given:
            break
    raise _in_use(path)


def _in_use(path: Path) -> ConfigError:
    return ConfigError(
        f"hydra.run.dir={path}: already holds a run; name another folder, or resume it with resume=auto"
    )
