"""The training loop."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastalex.config import DistributedConfig, TrainConfig
from fastalex.data import Loader
from fastalex.data.sampling import mix
from fastalex.distributed import strategies
from fastalex.distributed.processes import ALONE, World
from fastalex.errors import CheckpointError
from fastalex.kernels import LazyBatch
from fastalex.models import load_weights
from fastalex.runtime import Runtime
from fastalex.training.average import WeightAverage
from fastalex.training.epoch import Epoch, EpochState
from fastalex.training.flops import training_flops
from fastalex.training.freezing import freeze, frozen_norms
from fastalex.training.losses import LossWindow, diverged
from fastalex.training.metrics import EVALUATION_PASSES, Errors, errors, predict
from fastalex.training.optim import create_optimizer
from fastalex.training.schedule import LearningRate
from fastalex.training.step import TrainingStep
from fastalex.training.timing import WARMUP_STEPS, Clock, Spent

# Variants that torch.compile may need at each crop. Training has batches of three sizes: a batch or a part of
# one, a part of the epoch's last batch, and that batch's smaller last part. Each comes both lazy and
# materialized where CutMix mixes some batches. Validation has two sizes: a batch and the last one.
PASSES_AT_A_CROP = 8


class StopTraining(Exception):
    """``should_stop`` returned true; the trainer's state is consistent and can be saved."""


class Trainer:
    """Trains a network, epoch by epoch; does no file, plot or command-line work.

    With several ranks, each has a trainer and calls the same methods in the same order. The reported figures
    cover all ranks.

    The state may be saved after each step and whenever ``run_epoch`` raises StopTraining. A process resumed
    from it reaches the same weights and figures; on a CPU they are bit-identical.

    Args:
        model: the network, on the runtime's device.
        config: the recipe.
        train_loader: yields an epoch's training batches: images ``(B, 3, crop, crop)`` in the runtime's dtype
            or a lazy batch, and labels, int64 ``(B,)`` or class probabilities, fp32 ``(B, classes)``.
        validation_loader: yields the centre crops of the validation images and their labels, int64 ``(B,)``;
            None for synthetic data, whose error has no meaning.
        runtime: the device, dtype and memory format.
        log_every: steps between two checks of the loss. Each check waits for the device, so a loss that is
            NaN or infinite is noticed at most this many steps late.
        on_step: called after each step with the number of steps so far and, if the loss was checked, its mean
            since the last check in nats, else None.
        should_stop: called after each training step and each validation batch.
        peak_flops: peak rate of this rank's hardware in FLOP/s, for ``Epoch.flops_utilization``; None if
            unknown.
        world: the ranks that train together; each one's loader yields its share of the images.
        distributed: the strategy for several ranks; None for the default.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        train_loader: Loader,
        validation_loader: Loader | None,
        runtime: Runtime,
        *,
        log_every: int = 20,
        on_step: Callable[[int, float | None], None] = lambda step, loss: None,
        should_stop: Callable[[], bool] = lambda: False,
        peak_flops: float | None = None,
        world: World = ALONE,
        distributed: DistributedConfig | None = None,
    ) -> None:
        self.world = world
        freeze(model, config)
        self._template = copy.deepcopy(model).to("meta")  # the network before it is parallelized
        parallel: DistributedDataParallel | None = None
        if self.world.size > 1:
            strategy = distributed or DistributedConfig()
            parallel = strategies.parallelize(model, strategy, self.world, runtime.device)
        self.model = model
        self._frozen_norms = frozen_norms(model, config)
        self.config = config
        self.train_loader = train_loader
        self.validation_loader = validation_loader
        self.runtime = runtime
        self.log_every = log_every
        self.on_step = on_step
        self.should_stop = should_stop
        self.peak_flops = peak_flops * self.world.size if peak_flops else None
        compiled = partial(
            runtime.compiled,
            variants=PASSES_AT_A_CROP * (len(config.stages) + 1) + EVALUATION_PASSES,
            # Accumulation adds to gradients over several passes; DistributedDataParallel keeps views of them.
            graphs=config.accumulate == 1 and world.size == 1,
        )
        self._evaluation_network = compiled(model)
        self.network = self._evaluation_network if parallel is None else compiled(parallel)
        self.optimizer = create_optimizer(model, config, runtime.dtype, self.world)
        self.training_step = TrainingStep(
            model,
            self.network,
            self.optimizer,
            config,
            runtime,
            template=self._template,
            parallel=parallel,
        )
        self.steps = config.epochs * len(train_loader)  # of the whole run
        self.learning_rate = LearningRate(self.optimizer, config, self.steps)
        self.average = WeightAverage(model, config.ema_decay) if config.ema_decay else None
        self.epoch = 0
        self.step = 0
        self.spent = Spent()  # total of the completed epochs
        self._progress = EpochState()
        self._clock = Clock()
        self._window = LossWindow(self.world)
        self._gathered: dict[str, Tensor] | None = None  # the weights after the last step, of all ranks
        self._flops: dict[torch.Size, int] = {}  # FLOPs of a step, by the shape of its batch

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or a plateau schedule has made its last reduction."""
        return self.epoch >= self.config.epochs or self.learning_rate.exhausted

    @property
    def images_per_second(self) -> float:
        """Training samples per second of training time over all epochs so far, without warm-up steps."""
        return self.spent.images / self.spent.seconds

    @property
    def input_wait_fraction(self) -> float:
        """Fraction of that time spent waiting for the loader."""
        return self.spent.waited / self.spent.seconds

    @property
    def flops_utilization(self) -> float | None:
        """FLOP/s over that time as a fraction of the peak rate; None if the peak is unknown."""
        return self.spent.flops / self.spent.seconds / self.peak_flops if self.peak_flops else None

    def run_epoch(self) -> Epoch:
        """Train for one epoch, or for the rest of a resumed one, and validate.

        Raises:
            DivergedError: the loss is NaN or infinite; names the step and its learning rate. The weights are
                then useless: resume from the last checkpoint.
            StopTraining: ``should_stop`` returned true.
        """
        self._clock = Clock()
        self._train()
        validation = self._validate()
        # No stop from here on: the schedule has seen this validation, so the epoch must be counted.
        progress = self._progress.over(self.world)
        spent = progress.spent + self._clock.spent
        self._progress = EpochState()
        self.spent += spent
        self.epoch += 1
        return Epoch(
            epoch=self.epoch,
            step=self.step,
            train_loss=float(progress.loss) / progress.batches,
            train_top1_error=int(progress.wrong) / progress.samples,
            validation_loss=validation.loss if validation else None,
            validation_top1_error=validation.top1_error if validation else None,
            validation_top5_error=validation.top5_error if validation else None,
            learning_rate=progress.rate,
            images_per_second=spent.images / spent.seconds,
            input_wait_fraction=spent.waited / spent.seconds,
            flops_per_second=spent.flops / spent.seconds,
            flops_utilization=spent.flops / spent.seconds / self.peak_flops if self.peak_flops else None,
            warmup_seconds=spent.warmup,
            seconds=progress.seconds + self._clock.age,
        )

    def _train(self) -> None:
        """Take the epoch's remaining steps."""
        progress = self._progress
        first = progress.batches
        if first == len(self.train_loader):
            return
        self.train_loader.set_epoch(self.epoch, first)
        self.model.train()
        for norm in self._frozen_norms:
            norm.eval()
        if not first:
            self.training_step.sums.loss.zero_()
            self.training_step.sums.wrong.zero_()
        progress.loss, progress.wrong = self.training_step.sums
        warm_at = first
        for images, labels in self._clock.timing(self.train_loader):
            progress.rate = self.learning_rate.current
            if images.shape not in self._flops:
                self._flops[images.shape] = training_flops(self._template, images.shape) * self.world.size
                # In an epoch shorter than the warm-up, the last step is the one that is timed.
                warm_at = min(progress.batches + WARMUP_STEPS, len(self.train_loader) - 1)
            loss = self._step(images, labels)
            progress.batches += 1
            progress.samples += labels.shape[0]
            self._window.add(loss, self.step, progress.rate)
            if progress.batches <= warm_at:
                self.runtime.synchronize()
                self._clock.restart()
            else:
                self._clock.count(labels.shape[0] * self.world.size, self._flops[images.shape])
            self.on_step(self.step, self._window.close() if self.step % self.log_every == 0 else None)
            self._stop_if_asked()
        self._window.close()
        self.runtime.synchronize()
        self._clock.stop()

    def _validate(self) -> Errors | None:
        if self.validation_loader is None:
            return None
        self.validation_loader.set_epoch(self.epoch)
        with self.evaluated() as network:
            batches = self._watched(self.validation_loader)
            validation = errors(*predict(network, batches, self.runtime, self.world))
        if not math.isfinite(validation.loss):
            raise diverged("validation loss", validation.loss, self.step, self._progress.rate)
        self.learning_rate.after_validation(validation.top1_error, self.epoch)
        return validation

    def _watched(self, loader: Loader) -> Iterator[tuple[Tensor | LazyBatch, Tensor]]:
        shared = self.world.min(len(loader))
        for number, batch in enumerate(loader):
            yield batch
            if number < shared:
                self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        if self.world.any(self.should_stop()):
            raise StopTraining

    def state_dict(self) -> dict[str, Any]:
        """Return the state to resume from, except the weights and their average; collective.

        Tensors are not copied: the next step changes them. Sharded tensors are gathered.

        Raises:
            DivergedError: a loss since the last check is NaN or infinite.
        """
        self._window.check()
        started = self._progress.batches > 0
        progress = {
            **vars(self._progress.over(self.world)),
            "spent": asdict(self._progress.spent + self._clock.spent) if started else {},
            "seconds": self._progress.seconds + self._clock.age if started else 0.0,
        }
        cuda = self.runtime.device.type == "cuda"
        return {
            "optimizer": strategies.gathered(self.optimizer.state_dict()),
            "learning_rate": self.learning_rate.state_dict(),
            "scaler": self.training_step.scaler.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "progress": progress,
            "spent": asdict(self.spent),
            # Each rank's generators, for dropout and CutMix. Loaders draw the rest from the seed and epoch.
            "generators": self.world.gather(
                {
                    "cpu": torch.get_rng_state(),
                    "cuda": torch.cuda.get_rng_state(self.runtime.device) if cuda else None,
                }
            ),
        }

    def load_state_dict(self, state: dict[str, Any], average: dict[str, Tensor] | None) -> None:
        """Restore the state of a trainer with the same recipe; collective. Load the weights first.

        Args:
            state: what :meth:`state_dict` returned.
            average: the state dict of the averaged weights; None if there were none.

        Raises:
            CheckpointError: the state is incomplete, or belongs to another recipe or network.
        """
        try:
            self.optimizer.load_state_dict(strategies.scatter_optimizer(state["optimizer"], self.optimizer))
            self.learning_rate.load_state_dict(state["learning_rate"])
            self.training_step.scaler.load_state_dict(state["scaler"])
            self.epoch, self.step = int(state["epoch"]), int(state["step"])
            self.spent = Spent(**state["spent"])
            progress = state["progress"]
            self._progress = EpochState(**progress | {"spent": Spent(**progress["spent"])})
            if self._progress.batches:
                main = self.world.main  # takes the sums over all ranks, which are later summed again
                loss, wrong = (progress["loss"] * self.world.size, progress["wrong"]) if main else (0.0, 0)
                self._progress.samples = progress["samples"] if main else 0
                self.training_step.sums.loss.fill_(loss)
                self.training_step.sums.wrong.fill_(wrong)
                self._progress.loss, self._progress.wrong = self.training_step.sums
            if self.average:
                self.average.load(average)
            self._restore_generators(state["generators"])
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(
                f"the checkpoint's training state does not fit this run ({reason}); train again"
            ) from error

    def _restore_generators(self, states: list[dict[str, Tensor | None]]) -> None:
        if len(states) != self.world.size:
            # The world size changed, so saved generator states match no rank: reseed.
            torch.manual_seed(mix(self.step, self.world.rank))
            return
        state = states[self.world.rank]
        cpu, cuda = state["cpu"], state["cuda"]
        assert cpu is not None
        torch.set_rng_state(cpu)
        if self.runtime.device.type == "cuda" and cuda is not None:
            torch.cuda.set_rng_state(cuda, self.runtime.device)

    def weights(self) -> dict[str, Tensor]:
        """Return the network's state dict, with sharded tensors gathered; collective.

        Sharded tensors are gathered once after a step, however many follow of validation, checkpoint and
        evaluation.
        """
        if not strategies.is_sharded(self.model):
            return self.model.state_dict()
        if self._gathered is None:
            self._gathered = strategies.gathered(self.model.state_dict())
        return dict(self._gathered)

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Copy weights into the network; collective.

        Args:
            weights: a complete state dict, as :meth:`weights` returns it; sharded here if the network is.

        Raises:
            CheckpointError: the weights belong to another network.
        """
        self._gathered = None
        load_weights(self.model, strategies.scattered(weights, self.model.state_dict()))

    def undivided(self, weights: dict[str, Tensor] | None) -> nn.Module:
        """Return a new, unsharded network on this rank's device with the given weights.

        Args:
            weights: a complete state dict; None leaves the weights as they happen to be.
        """
        network = copy.deepcopy(self._template).to_empty(device=self.runtime.device)
        if weights is not None:
            network.load_state_dict(weights)
        return network

    def averaged_weights(self) -> dict[str, Tensor] | None:
        """Return the state dict of the averaged weights; None before the first update or without them."""
        return self.average.weights if self.average else None

    @contextmanager
    def evaluated(self) -> Iterator[nn.Module]:
        """Context that yields the unsharded network to evaluate, with the averaged weights if there are any.

        Collective.
        """
        if strategies.is_sharded(self.model):
            yield self.undivided(self.weights())
            return
        with self.average.applied() if self.average else nullcontext():
            yield self._evaluation_network

    def _step(self, images: Tensor | LazyBatch, labels: Tensor) -> Tensor:
        """Take one optimizer step; return its loss, fp32 ``()`` on the device.

        Args:
            images: ``(B, 3, crop, crop)`` in the runtime's dtype, or a lazy batch.
            labels: int64 ``(B,)``, or fp32 ``(B, classes)``.
        """
        self._gathered = None
        loss = self.training_step(images, labels)
        self.learning_rate.after_step()
        self.step += 1
        if self.average:
            self.average.after_step(self.step)
        return loss
