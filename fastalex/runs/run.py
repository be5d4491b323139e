"""A training run as one rank takes part in it: the same steps and collectives on every rank."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from fastalex.config import Config
from fastalex.data import DataSplits
from fastalex.distributed.connection import is_lost
from fastalex.errors import DataError, DivergedError, StoppedError
from fastalex.models import count_parameters
from fastalex.runs.checkpoint import DIGEST
from fastalex.runs.recorder import Recorder
from fastalex.runs.signals import StopSignals
from fastalex.runtime import versions
from fastalex.training.epoch import Epoch
from fastalex.training.evaluation import evaluate_model
from fastalex.training.trainer import StopTraining, Trainer


class Run:
    """Trains to the end of a run, saves its state, and evaluates what was learnt.

    Every rank has one and calls the same methods. Only their recorders differ.

    Args:
        config: the run's settings.
        splits: the run's images.
        trainer: the trainer, with the state to start from.
        recorder: writes files and prints, or does neither.
        signals: the signals that stop the run.
        started: when this process started on the run, by ``time.perf_counter``, in seconds.
        before: the training state of the checkpoint that is resumed; empty for a new run.
    """

    def __init__(
        self,
        config: Config,
        splits: DataSplits,
        trainer: Trainer,
        recorder: Recorder,
        signals: StopSignals,
        started: float,
        before: Mapping[str, Any],
    ) -> None:
        self.config = config
        self.splits = splits
        self.trainer = trainer
        self.recorder = recorder
        self.signals = signals
        self._started = started
        self._earlier_seconds: float = before.get("wall_seconds", 0.0)  # of processes before this one
        self._startup_seconds: float = before.get("startup_seconds", 0.0)
        self._between_seconds: float = before.get("between_epochs_seconds", 0.0)
        self._trained = time.perf_counter()
        trainer.on_step = self._on_step

    def execute(self) -> None:
        """Train and evaluate; write ``summary.json``.

        Raises:
            StoppedError: on rank 0, after a signal on any rank; ReportedError on the others.
            DivergedError: on rank 0, at a loss that is no longer finite; ReportedError on the others.
        """
        try:
            with self.signals.deferred():
                self._fit()
                received = next(filter(None, self.trainer.world.gather(self.signals.received)), None)
            if received is not None:
                raise self.recorder.stopped(received)
            self._report()
        except (StoppedError, DataError, RuntimeError) as error:
            if self.signals.received is None:
                raise
            # torchrun stops a process that it finds without rank 0's node, and rank 0 says nothing then.
            if not self.trainer.world.main and is_lost(error):
                raise
            # A signal to the whole process group ends the loader's workers as well, which is then no error.
            raise self.recorder.stopped(self.signals.received) from error

    def _fit(self) -> None:
        """Train to the end, or to where the trainer is told to stop; the state is then saved."""
        self._startup_seconds += time.perf_counter() - self._started
        try:
            with suppress(StopTraining):
                while not self.trainer.finished:
                    self._end_epoch(self.trainer.run_epoch())
            self._trained = time.perf_counter()
            self._save()
            self.recorder.finish()
        except DivergedError as error:
            raise self.recorder.diverged(error) from error
        finally:
            self.recorder.end_training()

    def _on_step(self, step: int, loss: float | None) -> None:
        self.recorder.step(step, loss)
        every = self.config.checkpoint.every_steps
        asked = every > 0 and step % every == 0
        if asked or self.trainer.world.any(self.recorder.save_due):
            self._save()

    def _end_epoch(self, epoch: Epoch) -> None:
        """Record an epoch, keep its weights if they are the best, and save the state if that is due."""
        began = time.perf_counter()
        trainer = self.trainer
        if trainer.world.any(self.recorder.epoch(epoch)):
            self.recorder.keep_best(self._final_weights(), epoch)
        # The end of the last epoch is that of the run, and saved as such.
        if not trainer.finished and trainer.world.any(self.recorder.save_due):
            self._save()
        self._between_seconds += time.perf_counter() - began

    def _final_weights(self) -> dict[str, Any]:
        """The weights that count: their average, where one is kept; collective."""
        weights = self.trainer.weights()
        return self.trainer.averaged_weights() or weights

    def _save(self) -> None:
        trainer = self.trainer
        training = {
            **trainer.state_dict(),
            "history": [asdict(epoch) for epoch in self.recorder.epochs],
            "train_images": len(self.splits.train),
            DIGEST: self.splits.digest,
            "wall_seconds": self._wall_seconds,
            "startup_seconds": self._startup_seconds,
            "between_epochs_seconds": self._between_seconds,
        }
        self.recorder.save(trainer.weights(), trainer.averaged_weights(), training)

    def _report(self) -> None:
        """Evaluate what was learnt, and write the summary."""
        trainer, runtime = self.trainer, self.trainer.runtime
        self.recorder.final_weights(self._final_weights())
        summary = self._evaluate() if self.splits.is_measurable else {}
        if not trainer.world.main:
            return
        if not self.splits.is_measurable:
            self.recorder.say(
                "\nsynthetic data: the throughput is real, an error would mean nothing and none is reported"
            )
        summary |= {
            "data": self.splits.source,
            "train_images": len(self.splits.train),
            "validation_images": len(self.splits.validation),
            "skipped_images": self.splits.skipped,
            DIGEST: self.splits.digest,
            "epochs": trainer.epoch,
            "steps": trainer.step,
            "images_per_second": trainer.images_per_second,
            "input_wait_fraction": trainer.input_wait_fraction,
            "flops_utilization": trainer.flops_utilization,
            "checkpoint_stall_seconds": self.recorder.longest_stall,
            **self._seconds(),
            "parameters": count_parameters(trainer.model),
            "seed": self.config.seed,
            "hardware": runtime.hardware,
            "runtime": str(runtime),
            "versions": versions(),
        }
        self.recorder.summary(summary)

    def _evaluate(self) -> dict[str, Any]:
        """Evaluate the final weights on the test set, and those best on validation; collective."""
        trainer, runtime = self.trainer, self.trainer.runtime
        with trainer.evaluated() as network:
            final = evaluate_model(network, self.splits.test, self.config, runtime, trainer.world)
        self._stop_if_asked()
        self.recorder.say(f"\n{final.table('test set, final weights')}")
        summary = final.as_dict()
        best = self.recorder.best()  # which rank 0 alone can read
        facts = trainer.world.on_main(lambda: best and best[1])
        if facts is not None:
            chosen = final
            if facts["epoch"] != trainer.epoch:
                network = trainer.undivided(best and best[0])
                trainer.world.copy_from_main(network.state_dict().values())
                chosen = evaluate_model(network, self.splits.test, self.config, runtime, trainer.world)
                self._stop_if_asked()
                self.recorder.say(chosen.table(f"test set, best on validation (epoch {facts['epoch']})"))
            summary["best_on_validation"] = {
                "epoch": facts["epoch"],
                "validation_top1_error": facts["validation_top1_error"],
                **chosen.as_dict(),
            }
        return summary

    def _stop_if_asked(self) -> None:
        """Stop after a signal whose exception was lost: Python ignores those of the callbacks of a fork."""
        received = self.signals.received
        if received is not None:
            raise StoppedError(f"stopped by {received.name}", received)

    @property
    def _wall_seconds(self) -> float:
        """Seconds of this process and of those before it."""
        return self._earlier_seconds + time.perf_counter() - self._started

    def _seconds(self) -> dict[str, float]:
        """Where the wall time went; the last is the sum of those before it."""
        spent = self.trainer.spent
        epochs = sum(epoch.seconds for epoch in self.recorder.epochs)
        return {
            "startup_seconds": self._startup_seconds,
            "warmup_seconds": spent.warmup,
            "training_seconds": spent.seconds,
            "validation_seconds": epochs - spent.warmup - spent.seconds,
            "between_epochs_seconds": self._between_seconds,
            "closing_seconds": time.perf_counter() - self._trained,
            "wall_seconds": self._wall_seconds,
        }
