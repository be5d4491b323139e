"""What a rank shows of a run: rank 0 writes files and prints, the others do neither."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fastalex.config import Config
from fastalex.config.plain import as_argument, plain
from fastalex.errors import DivergedError, FastalexError, ReportedError, StoppedError
from fastalex.files import remove_empty
from fastalex.runs.checkpoint import DIGEST, FINAL_WEIGHTS, Checkpoint, save_weights
from fastalex.runs.checkpoint_writer import NEWEST, BestWeights, CheckpointWriter, OutputPolicy
from fastalex.runs.folder import RunFolder
from fastalex.runs.progress import ProgressBar
from fastalex.runs.resume import UnfinishedRun
from fastalex.training.epoch import Epoch


class Recorder:
    """Records nothing: every rank but 0 has one. Rank 0 has a :class:`FolderRecorder`.

    Args:
        run_dir: the folder that Hydra created for this process; removed at the end if it is empty.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir

    def say(self, text: str) -> None:
        """Print a text."""

    @property
    def save_due(self) -> bool:
        """Whether it is time for the next checkpoint."""
        return False

    def step(self, step: int, loss: float | None) -> None:
        """Record a step, and the mean loss since the last look, where there was one now."""

    def epoch(self, epoch: Epoch) -> bool:
        """Record an epoch; return whether its validation error is the lowest so far."""
        return False

    def keep_best(self, weights: Mapping[str, Tensor], epoch: Epoch) -> None:
        """Keep a copy of the weights with the lowest validation error so far."""

    def save(self, weights: dict[str, Tensor], average: dict[str, Tensor] | None, training: dict) -> None:
        """Write a checkpoint, in the background.

        Args:
            weights: the network's state dict.
            average: the state dict of the averaged weights; None if they are not kept.
            training: the trainer's state, and what the run adds to it.
        """

    def finish(self) -> None:
        """Complete the files of the training: there are no more epochs."""

    def diverged(self, error: DivergedError) -> FastalexError:
        """Write what is still good after a divergence; return the error to end the run with."""
        return ReportedError(error.exit_status)

    def stopped(self, received: signal.Signals) -> StoppedError | ReportedError:
        """Return the error to end a run with that a signal stopped."""
        return ReportedError(128 + received)

    def final_weights(self, weights: dict[str, Tensor]) -> None:
        """Write ``model.safetensors``."""

    def best(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Read the weights that were best on validation, with epoch and error; None if there are none."""
        return None

    def summary(self, summary: dict[str, Any]) -> None:
        """Write ``summary.json``, and print the run's throughput."""

    @property
    def epochs(self) -> list[Epoch]:
        """The epochs that are complete."""
        return []

    @property
    def longest_stall(self) -> float:
        """Seconds that training waited for a checkpoint, at most."""
        return 0.0

    def end_training(self) -> None:
        """End the progress bar and the background writes."""

    def close(self) -> None:
        """Release the folder."""
        remove_empty(self._run_dir)


class FolderRecorder(Recorder):
    """Writes a run's folder and shows its progress: rank 0 has one.

    Args:
        folder: the run's folder; :meth:`close` closes it.
        config: the run's settings.
        classes: class names, in the order of the network's outputs.
        digest: of the run's images.
        resumed: the run that is resumed; None for a new one.
        step: the number of steps taken so far.
        parts: of the run, as :class:`ProgressBar` shows them.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: Config,
        classes: list[str],
        digest: str,
        resumed: UnfinishedRun | None,
        step: int,
        parts: Sequence[tuple[str, int]],
    ) -> None:
        super().__init__(folder.path)
        self._folder = folder
        self._config = config
        self._classes = classes
        self._digest = digest
        self._policy = OutputPolicy(config.checkpoint.on_error)
        newest = resumed.checkpoint.step if resumed is not None and resumed.path.name == NEWEST else None
        self._writer = CheckpointWriter(folder.path, config.checkpoint, self._policy, newest)
        self._best = BestWeights(folder.path / "best.safetensors", plain(config), classes, digest)
        self._find_best_so_far()
        self._bar = ProgressBar(parts, step)

    def say(self, text: str) -> None:
        print(text)

    @property
    def save_due(self) -> bool:
        return self._writer.due

    @property
    def epochs(self) -> list[Epoch]:
        return self._folder.epochs

    @property
    def longest_stall(self) -> float:
        return max(self._writer.stalls, default=0.0)

    def step(self, step: int, loss: float | None) -> None:
        self._bar.update()
        if loss is not None:
            with self._policy.applied():
                self._folder.loss(step, loss)
            self._bar.show_loss(loss)
        self._writer.check()

    def epoch(self, epoch: Epoch) -> bool:
        with self._policy.applied():
            self._folder.epoch(epoch)
        self._bar.write(_line(epoch, self._config.train.epochs))
        # Errors at another resolution do not compare with those at the one that is asked for.
        early = epoch.epoch <= self._config.train.staged_epochs
        error = epoch.validation_top1_error
        return error is not None and not early and self._best.improved_by(error)

    def keep_best(self, weights: Mapping[str, Tensor], epoch: Epoch) -> None:
        assert epoch.validation_top1_error is not None
        self._best.keep(weights, epoch.epoch, epoch.validation_top1_error)

    def save(self, weights: dict[str, Tensor], average: dict[str, Tensor] | None, training: dict) -> None:
        checkpoint = Checkpoint(plain(self._config), self._classes, weights, training, average)
        # The best weights first: whoever resumes from a checkpoint finds those of the epochs in it.
        self._writer.save(checkpoint, self._best.writing())

    def finish(self) -> None:
        with self._policy.applied():
            self._folder.finish()

    def diverged(self, error: DivergedError) -> FastalexError:
        # The state is worthless; what is good is that of the epochs before.
        self._writer.wait()
        for write in (self._best.write, self._folder.finish):
            with self._policy.applied():
                write()
        kept = (
            "no checkpoint was written"
            if self._writer.written is None
            else f"the last good checkpoint is {self._writer.path}"
        )
        return DivergedError(f"{error}; {kept}")

    def stopped(self, received: signal.Signals) -> StoppedError | ReportedError:
        message = f"stopped by {received.name}"
        if self._writer.written is not None:
            again = as_argument("resume", str(self._folder.path))
            message += f"; step {self._writer.written} is saved, resume with {again}"
        return StoppedError(message, received)

    def final_weights(self, weights: dict[str, Tensor]) -> None:
        with self._policy.applied():
            path = self._folder.path / FINAL_WEIGHTS
            save_weights(weights, path, plain(self._config), self._classes, **{DIGEST: self._digest})

    def best(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        return self._best.read("its errors are left out") if self._best.error is not None else None

    def summary(self, summary: dict[str, Any]) -> None:
        self._folder.summary(summary)
        with self._policy.applied():
            self._folder.hparams(self._config, summary, summary["steps"])
        print(
            f"{summary['images_per_second']:,.1f} images/s in training, "
            f"{summary['input_wait_fraction']:.1%} of the time waiting for input; the arithmetic runs at "
            f"{summary['flops_utilization']:.0%} of a large matrix product's rate\n"
            f"the run's files are in {self._folder.path}"
        )

    def end_training(self) -> None:
        self._bar.close()
        self._writer.close()

    def close(self) -> None:
        self._folder.close()

    def _find_best_so_far(self) -> None:
        """Take up the best validation error of a resumed run, if its weights are still there."""
        late = self.epochs[self._config.train.staged_epochs :]
        if not any(epoch.validation_top1_error is not None for epoch in late):
            return
        kept = self._best.read("the best on validation is sought among the epochs to come")
        if kept is not None:
            self._best.error = kept[1]["validation_top1_error"]


def _line(epoch: Epoch, epochs: int) -> str:
    line = f"epoch {epoch.epoch:>{len(str(epochs))}}/{epochs}  loss {epoch.train_loss:.4f}"
    if epoch.validation_top1_error is not None:
        line += (
            f"  validation loss {epoch.validation_loss:.4f}"
            f"  top-1 error {epoch.validation_top1_error:.4f}  top-5 {epoch.validation_top5_error:.4f}"
        )
    return (
        f"{line}  lr {epoch.learning_rate:.2g}  {epoch.images_per_second:,.1f} images/s"
        f"  {epoch.flops_per_second / 1e9:,.0f} GFLOP/s ({epoch.flops_utilization:.0%})"
    )
