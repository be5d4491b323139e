"""The training loop, and nothing but the loop."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from fastalex.config import DistributedConfig, TrainConfig
from fastalex.data import Loader
from fastalex.data.sampling import mix
from fastalex.distributed import strategies
from fastalex.distributed.processes import ALONE, World
from fastalex.errors import CheckpointError, DivergedError
from fastalex.kernels import LazyBatch
from fastalex.models import load_weights
from fastalex.models.factored_linear import FactoredLinear, factored_layers, keeping_factors
from fastalex.runtime import Runtime
from fastalex.training.flops import training_flops
from fastalex.training.metrics import EVALUATION_PASSES, Errors, errors, predict
from fastalex.training.optim import FactoredSGD, WeightAverage, create_optimizer
from fastalex.training.schedule import LearningRate
from fastalex.training.timing import WARMUP_STEPS, Clock, Spent

# Each compiled for itself: in training a batch, or part of one, and the last of an epoch, whose last part may
# be smaller still, and each of these both made and unmade, where CutMix makes some; in validation a batch and
# the last.
PASSES_AT_A_CROP = 8


@dataclass(frozen=True)
class Epoch:
    """What one epoch came to.

    Attributes:
        epoch: counted from 1.
        step: optimizer steps taken since the run began.
        train_loss: mean over the epoch's batches, in nats, label smoothing included.
        train_top1_error: share of the training samples, as augmented, that were wrong when they were seen; of
            one in two classes, the right one is that of its larger part.
        validation_loss: in nats, centre crop, of the averaged weights where there are any; None without a
            validation loader, as are the next two.
        validation_top1_error: centre crop.
        validation_top5_error: centre crop.
        learning_rate: of the epoch's last step.
        images_per_second: training samples by training time, warm-up steps left out.
        input_wait_fraction: share of the training time that went by in waiting for the loader.
        flops_per_second: of the convolutions and matrix products, forward and backward, in the same time.
        flops_utilization: that, as a share of what the hardware does at best; None where that is not known.
        warmup_seconds: of the steps that compile kernels and claim memory, left out of the rates above.
        seconds: wall time of the epoch, warm-up and validation included.
    """

    epoch: int
    step: int
    train_loss: float
    train_top1_error: float
    validation_loss: float | None
    validation_top1_error: float | None
    validation_top5_error: float | None
    learning_rate: float
    images_per_second: float
    input_wait_fraction: float
    flops_per_second: float
    flops_utilization: float | None
    warmup_seconds: float
    seconds: float


@dataclass
class _Progress:
    """How far the current epoch is: all that a process which goes on from here cannot compute again.

    Attributes:
        batches: taken.
        samples: in them.
        loss: the sum over the batches.
        wrong: samples that were.
        rate: of the last step.
        spent: in the epoch's steps by earlier processes, as is the next.
        seconds: of the epoch's wall time.
    """

    batches: int = 0
    samples: int = 0
    loss: Tensor | float = 0.0
    wrong: Tensor | int = 0
    rate: float = 0.0
    spent: Spent = field(default_factory=Spent)
    seconds: float = 0.0

    def over(self, world: World) -> _Progress:
        """The progress of all processes together; collective, and waits for the device."""
        loss, wrong, samples = world.sum(float(self.loss), int(self.wrong), self.samples)
        return replace(self, loss=loss / world.size, wrong=int(wrong), samples=int(samples))


class StopTraining(Exception):
    """The run was asked to stop; the trainer's state is whole, in the middle of an epoch or not."""


class Trainer:
    """Trains a network; knows nothing of files, plots or command lines.

    Of several processes that train it together each has a trainer, and calls the same methods in the same
    order. The figures that come out are those of all of them.

    After each step, and whenever ``run_epoch`` raises StopTraining, its state may be saved, and another
    process goes on from there to the same weights and figures: on a CPU, bit for bit.

    Args:
        model: on the runtime's device.
        config: the recipe.
        train_loader: yields the training batches of an epoch; labels may be int64 (B,), or probabilities
            (B, classes).
        validation_loader: yields the validation images, centre crop; None for data on which an error would
            mean nothing.
        runtime: the device and the arithmetic.
        log_every: steps between two looks at the loss. Each look waits for the device, so a loss that is no
            longer a number is noticed at most this many steps later.
        on_step: called after each step with the steps taken so far, and with the mean loss of the steps since
            the last look, or None between looks.
        should_stop: asked after each step and each batch of a validation.
        peak_flops: what this process's hardware does at best, in FLOP/s, for ``Epoch.flops_utilization``.
        world: the processes that train together; their loaders share the images.
        distributed: how they divide the network.
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
        self._template = copy.deepcopy(model).to("meta")  # of the undivided network
        self._divided: DistributedDataParallel | None = None
        if self.world.size > 1:
            how = distributed or DistributedConfig()
            self._divided = strategies.divide(model, how, self.world, runtime.device)
        self.model = model
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
            # Gradients are summed over the parts of a batch, and DistributedDataParallel keeps views of them.
            graphs=config.accumulate == 1 and world.size == 1,
        )
        self._undivided = compiled(model)
        self.network = self._undivided if self._divided is None else compiled(self._divided)
        self.optimizer = create_optimizer(model, config)
        self._factored = self._layers_to_factor()
        self.learning_rate = LearningRate(self.optimizer, config, config.epochs * len(train_loader))
        self.average = WeightAverage(model, config.ema_decay) if config.ema_decay else None
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.needs_loss_scaling)
        self.epoch = 0
        self.step = 0
        self.spent = Spent()  # in all epochs that are complete
        self._progress = _Progress()
        self._clock = Clock()
        self._window = _Window(self.world)
        self._flops: dict[torch.Size, int] = {}  # of a step, for each shape of batch so far

    @property
    def finished(self) -> bool:
        """Whether there is no epoch left to run."""
        return self.epoch >= self.config.epochs or self.learning_rate.exhausted

    @property
    def images_per_second(self) -> float:
        """Training samples by training time over all epochs run so far, warm-up left out."""
        return self.spent.images / self.spent.seconds

    @property
    def input_wait_fraction(self) -> float:
        """Share of that time that went by in waiting for the loader."""
        return self.spent.waited / self.spent.seconds

    @property
    def flops_utilization(self) -> float | None:
        """Share of the hardware's best rate of arithmetic over that time; None where that is not known."""
        return self.spent.flops / self.spent.seconds / self.peak_flops if self.peak_flops else None

    def run_epoch(self) -> Epoch:
        """Train for one epoch, or what is left of it, and validate.

        Raises:
            DivergedError: at a loss that is NaN or infinite, with the step and its learning rate. The network
                is then worthless: go back to the last checkpoint.
            StopTraining: because ``should_stop`` said so.
        """
        self._clock = Clock()
        self._train()
        validation = self._validate()
        # From here to the end nothing can stop: the schedule has been told, and the epoch counts.
        progress = self._progress.over(self.world)
        spent = progress.spent + self._clock.spent
        self._progress = _Progress()
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
        """Take the epoch's steps, from where its progress says."""
        progress = self._progress
        first = progress.batches
        if first == len(self.train_loader):
            return
        self.train_loader.set_epoch(self.epoch, first)
        self.model.train()
        if not first:
            progress.loss = torch.zeros((), dtype=torch.float64, device=self.runtime.device)
            progress.wrong = torch.zeros((), dtype=torch.int64, device=self.runtime.device)
        warm_at = first
        for images, labels in self._clock.timing(self.train_loader):
            progress.rate = self.learning_rate.current
            if images.shape not in self._flops:
                self._flops[images.shape] = training_flops(self._template, images.shape) * self.world.size
                # An epoch that is shorter than a warm-up has to be timed by its last step.
                warm_at = min(progress.batches + WARMUP_STEPS, len(self.train_loader) - 1)
            loss, logits = self._step(images, labels)
            progress.batches += 1
            progress.samples += labels.shape[0]
            progress.loss += loss
            classes = labels if labels.dim() == 1 else labels.argmax(dim=1)
            progress.wrong += (logits.argmax(dim=1) != classes).sum()
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
            raise _diverged("validation loss", validation.loss, self.step, self._progress.rate)
        self.learning_rate.after_validation(validation.top1_error)
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
        """Return what later processes need, beside the weights and their average, to go on.

        Tensors are the trainer's own, and change with the next step; those that are divided come out whole.

        Raises:
            DivergedError: a loss that was not looked at yet is NaN or infinite.
        """
        self._window.check()
        begun = self._progress.batches > 0
        progress = {
            **vars(self._progress.over(self.world)),
            "spent": asdict(self._progress.spent + self._clock.spent) if begun else {},
            "seconds": self._progress.seconds + self._clock.age if begun else 0.0,
        }
        cuda = self.runtime.device.type == "cuda"
        return {
            "optimizer": strategies.gathered(self.optimizer.state_dict()),
            "learning_rate": self.learning_rate.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
            "progress": progress,
            "spent": asdict(self.spent),
            # Of dropout and CutMix, in each process; what else loaders draw, the seed and the epoch decide.
            "generators": self.world.gather(
                {
                    "cpu": torch.get_rng_state(),
                    "cuda": torch.cuda.get_rng_state(self.runtime.device) if cuda else None,
                }
            ),
        }

    def load_state_dict(self, state: dict[str, Any], average: dict[str, Tensor] | None) -> None:
        """Go on from where a trainer of the same recipe was; the network has its weights already.

        Args:
            state: of :meth:`state_dict`.
            average: the averaged weights, where there were any.

        Raises:
            CheckpointError: if the state lacks a part or is of another recipe or network.
        """
        try:
            self.optimizer.load_state_dict(strategies.scatter_optimizer(state["optimizer"], self.optimizer))
            self.learning_rate.load_state_dict(state["learning_rate"])
            self.scaler.load_state_dict(state["scaler"])
            self.epoch, self.step = int(state["epoch"]), int(state["step"])
            self.spent = Spent(**state["spent"])
            progress = state["progress"]
            self._progress = _Progress(**progress | {"spent": Spent(**progress["spent"])})
            if self._progress.batches:
                device = self.runtime.device
                mine = self.world.main  # the sums are over all processes, and are added up again
                loss, wrong = (progress["loss"] * self.world.size, progress["wrong"]) if mine else (0.0, 0)
                self._progress.samples = progress["samples"] if mine else 0
                self._progress.loss = torch.tensor(loss, dtype=torch.float64, device=device)
                self._progress.wrong = torch.tensor(wrong, dtype=torch.int64, device=device)
            if self.average:
                self.average.load(average)
            self._restore_generators(state["generators"])
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(
                f"the checkpoint's training state does not fit this run ({reason}); train again"
            ) from error

    def _restore_generators(self, states: list[dict[str, Tensor | None]]) -> None:
        if len(states) != self.world.size:  # no process's are another's to go on with
            torch.manual_seed(mix(self.step, self.world.rank))
            return
        mine = states[self.world.rank]
        cpu, cuda = mine["cpu"], mine["cuda"]
        assert cpu is not None
        torch.set_rng_state(cpu)
        if self.runtime.device.type == "cuda" and cuda is not None:
            torch.cuda.set_rng_state(cuda, self.runtime.device)

    def weights(self) -> dict[str, Tensor]:
        """Return the network's state dict, divided tensors made whole."""
        state: dict[str, Tensor] = strategies.gathered(self.model.state_dict())
        return state

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Go on from whole weights.

        Raises:
            CheckpointError: if they are another network's.
        """
        load_weights(self.model, strategies.scattered(weights, self.model.state_dict()))

    def undivided(self, weights: dict[str, Tensor]) -> nn.Module:
        """Return a network in this process alone that has other weights than the one in training."""
        network = copy.deepcopy(self._template).to_empty(device=self.runtime.device)
        network.load_state_dict(weights)
        return network

    def averaged_weights(self) -> dict[str, Tensor] | None:
        """Return the state dict of the averaged weights; None where none are kept."""
        return self.average.weights if self.average else None

    @contextmanager
    def evaluated(self) -> Iterator[nn.Module]:
        """Context with the whole network and the weights that count: their average, where one is kept."""
        if strategies.is_divided(self.model):
            yield self.undivided(self.weights())
            return
        with self.average.applied() if self.average else nullcontext():
            yield self._undivided

    def _step(self, images: Tensor | LazyBatch, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Take one optimizer step; return the loss and the logits, detached, still on the device."""
        chunks: Sequence[Tensor | LazyBatch] = images.chunk(self.config.accumulate)
        parts = []
        with keeping_factors(self._factored):
            for number, part in enumerate(zip(chunks, labels.chunk(self.config.accumulate), strict=True), 1):
                with nullcontext() if number == len(chunks) else self._without_exchange():
                    parts.append(self._backward(*part, len(labels)))
            with record_function("optimizer"):
                if self.config.clip_norm:
                    self.scaler.unscale_(self.optimizer)  # the norm of the gradient, not of its scaled copy
                    strategies.clip_gradients(self.model, self.config.clip_norm)
                self.scaler.step(self.optimizer)
                self.scaler.update()
                self.optimizer.zero_grad()
                self.learning_rate.after_step()
                self.step += 1
                if self.average:
                    self.average.after_step(self.step)
        losses, logits = zip(*parts, strict=True)
        return torch.stack(losses).sum(), torch.cat(logits)

    def _layers_to_factor(self) -> list[FactoredLinear]:
        """Layers whose weights' gradients are never made: compilers and other processes need them."""
        plain = self.runtime.device.type == "cpu" and not self.runtime.compile and self._divided is None
        if not plain or not isinstance(self.optimizer, FactoredSGD):
            return []
        return factored_layers(self.model)

    def _without_exchange(self) -> AbstractContextManager[None]:
        """Context whose gradients stay in this process until a later backward pass."""
        return self._divided.no_sync() if self._divided is not None else nullcontext()

    def _backward(self, images: Tensor | LazyBatch, labels: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """Add a part's share to the gradients of the batch; return its share of the loss, and its logits.

        Args:
            images: the part's, (N, 3, crop, crop).
            labels: (N,), or of mixed images (N, classes).
            batch: how many images the whole batch has.
        """
        with record_function("forward"), self.runtime.autocast():
            logits = self.network(images)
            # The logits' own softmax would be one of eight bits, where autocast does not see to it.
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            loss = F.cross_entropy(wide, labels, label_smoothing=self.config.label_smoothing)
            loss = loss * (len(labels) / batch)  # the last part may be a smaller one
        with record_function("backward"):
            self.scaler.scale(loss).backward()
        return loss.detach(), logits.detach()


class _Window:
    """The losses since the last look, left on the device until they are looked at together.

    Args:
        world: whose processes' losses are looked at.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._losses: list[Tensor] = []
        self._steps: list[tuple[int, float]] = []

    def add(self, loss: Tensor, step: int, rate: float) -> None:
        self._losses.append(loss)
        self._steps.append((step, rate))

    def check(self) -> list[float]:
        """Wait for the losses, check each and return them."""
        losses = torch.stack(self._losses).tolist() if self._losses else []
        losses = [loss / self._world.size for loss in self._world.sum(*losses)]
        for loss, (step, rate) in zip(losses, self._steps, strict=True):
            if not math.isfinite(loss):
                raise _diverged("loss", loss, step, rate)
        return losses

    def close(self) -> float | None:
        """Check the losses, return their mean and begin anew."""
        losses = self.check()
        self._losses, self._steps = [], []
        return sum(losses) / len(losses) if losses else None


def _diverged(what: str, value: float, step: int, rate: float) -> DivergedError:
    return DivergedError(
        f"the {what} became {value} at step {step} with learning rate {rate:.3g}; lower train.lr"
    )
