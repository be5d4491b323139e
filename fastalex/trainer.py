"""The training loop, and nothing but the loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import record_function

from fastalex.config import TrainConfig
from fastalex.data import Loader
from fastalex.errors import DivergedError
from fastalex.flops import training_flops
from fastalex.metrics import Errors, errors, predict
from fastalex.optim import LearningRate, WeightAverage, create_optimizer
from fastalex.runtime import Runtime

# Left out of the throughput, at each new shape of batch: kernels are compiled and memory is claimed in them.
WARMUP_STEPS = 3


@dataclass(frozen=True)
class Epoch:
    """What one epoch came to.

    Attributes:
        epoch: counted from 1.
        step: optimizer steps taken since the run began.
        train_loss: mean over the epoch's batches, in nats, label smoothing included.
        train_top1_error: share of the training samples, as augmented, that were wrong when they were seen.
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


class Trainer:
    """Trains a network; knows nothing of files, plots or command lines.

    Args:
        model: on the runtime's device.
        config: the recipe.
        train_loader: yields the training batches of an epoch.
        validation_loader: yields the validation images, centre crop; None for data on which an error would
            mean nothing.
        runtime: the device and the arithmetic.
        log_every: steps between two looks at the loss. Each look waits for the device, so a loss that is no
            longer a number is noticed at most this many steps later.
        on_step: called after each step with the steps taken so far, and with the mean loss of the steps since
            the last look, or None between looks.
        peak_flops: what the hardware does at best, in FLOP/s, for ``Epoch.flops_utilization``.
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
        peak_flops: float | None = None,
    ) -> None:
        self.model = model
        self.config = config
        self.train_loader = train_loader
        self.validation_loader = validation_loader
        self.runtime = runtime
        self.log_every = log_every
        self.on_step = on_step
        self.peak_flops = peak_flops
        self.network = runtime.compiled(model)
        self.optimizer = create_optimizer(model, config)
        self.learning_rate = LearningRate(self.optimizer, config, config.epochs * len(train_loader))
        self.average = WeightAverage(model, config.ema_decay) if config.ema_decay else None
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.needs_loss_scaling)
        self.epoch = 0
        self.step = 0
        self.clocked: list[_Clock] = []
        self._flops: dict[torch.Size, int] = {}  # of a step, for each shape of batch so far

    @property
    def finished(self) -> bool:
        """Whether there is no epoch left to run."""
        return self.epoch >= self.config.epochs or self.learning_rate.exhausted

    @property
    def images_per_second(self) -> float:
        """Training samples by training time over all epochs run so far, warm-up left out."""
        return sum(clock.images for clock in self.clocked) / sum(clock.seconds for clock in self.clocked)

    @property
    def input_wait_fraction(self) -> float:
        """Share of that time that went by in waiting for the loader."""
        return sum(clock.waited for clock in self.clocked) / sum(clock.seconds for clock in self.clocked)

    @property
    def flops_utilization(self) -> float | None:
        """Share of the hardware's best rate of arithmetic over that time; None where that is not known."""
        if self.peak_flops is None:
            return None
        seconds = sum(clock.seconds for clock in self.clocked)
        return sum(clock.flops for clock in self.clocked) / seconds / self.peak_flops

    def run_epoch(self) -> Epoch:
        """Train for one epoch and validate.

        Raises:
            DivergedError: at a loss that is NaN or infinite, with the step and its learning rate. The network
                is then worthless: go back to the last checkpoint.
        """
        began = time.perf_counter()
        self.train_loader.set_epoch(self.epoch)
        self.model.train()
        window = _Window()
        clock = _Clock()
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.runtime.device)
        wrong = torch.zeros((), dtype=torch.int64, device=self.runtime.device)
        batches = samples = warm_at = 0
        for images, labels in clock.timing(self.train_loader):
            rate = self.learning_rate.current
            if images.shape not in self._flops:
                self._flops[images.shape] = training_flops(self.model, images.shape)
                # An epoch that is shorter than a warm-up has to be timed by its last step.
                warm_at = min(batches + WARMUP_STEPS, len(self.train_loader) - 1)
            loss, logits = self._step(images, labels)
            batches += 1
            samples += labels.shape[0]
            loss_sum += loss
            wrong += (logits.argmax(dim=1) != labels).sum()
            window.add(loss, self.step, rate)
            if batches <= warm_at:
                self.runtime.synchronize()
                clock.restart()
            else:
                clock.count(labels.shape[0], self._flops[images.shape])
            self.on_step(self.step, window.close() if self.step % self.log_every == 0 else None)
        window.close()
        self.runtime.synchronize()
        clock.stop()
        self.clocked.append(clock)
        self.epoch += 1
        validation = self._validate(rate)
        return Epoch(
            epoch=self.epoch,
            step=self.step,
            train_loss=loss_sum.item() / batches,
            train_top1_error=wrong.item() / samples,
            validation_loss=validation.loss if validation else None,
            validation_top1_error=validation.top1_error if validation else None,
            validation_top5_error=validation.top5_error if validation else None,
            learning_rate=rate,
            images_per_second=clock.images_per_second,
            input_wait_fraction=clock.waited / clock.seconds,
            flops_per_second=clock.flops / clock.seconds,
            flops_utilization=clock.flops / clock.seconds / self.peak_flops if self.peak_flops else None,
            warmup_seconds=clock.warmup,
            seconds=time.perf_counter() - began,
        )

    def _validate(self, rate: float) -> Errors | None:
        if self.validation_loader is None:
            return None
        with self.evaluated():
            validation = errors(*predict(self.network, self.validation_loader, self.runtime))
        if not math.isfinite(validation.loss):
            raise _diverged("validation loss", validation.loss, self.step, rate)
        self.learning_rate.after_validation(validation.top1_error)
        return validation

    def state_dict(self) -> dict:
        """Return what a later process needs, beside the weights and their average, to go on."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "learning_rate": self.learning_rate.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "step": self.step,
        }

    def averaged_weights(self) -> dict[str, Tensor] | None:
        """Return the state dict of the averaged weights; None where none are kept."""
        return self.average.weights if self.average else None

    def evaluated(self) -> AbstractContextManager[None]:
        """Context in which the network has the weights that count: their average, where one is kept."""
        return self.average.applied() if self.average else nullcontext()

    def _step(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Take one optimizer step; return the loss and the logits, detached, still on the device."""
        parts = [
            self._backward(*part)
            for part in zip(
                images.chunk(self.config.accumulate), labels.chunk(self.config.accumulate), strict=True
            )
        ]
        with record_function("optimizer"):
            if self.config.clip_norm:
                self.scaler.unscale_(self.optimizer)  # the norm of the gradient, not of its scaled copy
                nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_norm)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
            self.learning_rate.after_step()
            self.step += 1
            if self.average:
                self.average.after_step(self.step)
        losses, logits = zip(*parts, strict=True)
        return torch.stack(losses).sum(), torch.cat(logits)

    def _backward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Add a part's share to the gradients of the batch; return its share of the loss, and its logits."""
        with record_function("forward"), self.runtime.autocast():
            logits = self.network(images)
            loss = F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)
            loss = loss / self.config.accumulate
        with record_function("backward"):
            self.scaler.scale(loss).backward()
        return loss.detach(), logits.detach()


class _Window:
    """The losses since the last look, left on the device until they are looked at together."""

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._steps: list[tuple[int, float]] = []

    def add(self, loss: Tensor, step: int, rate: float) -> None:
        self._losses.append(loss)
        self._steps.append((step, rate))

    def close(self) -> float | None:
        """Wait for the losses, check each, return their mean and begin anew."""
        if not self._losses:
            return None
        losses = torch.stack(self._losses).tolist()
        for loss, (step, rate) in zip(losses, self._steps, strict=True):
            if not math.isfinite(loss):
                raise _diverged("loss", loss, step, rate)
        self._losses, self._steps = [], []
        return sum(losses) / len(losses)


class _Clock:
    """The wall time of an epoch's training steps, and the part of it spent waiting for input."""

    def __init__(self) -> None:
        self._made = time.perf_counter()
        self.restart()

    def restart(self) -> None:
        """Forget what was counted; the warm-up has only now ended."""
        self.images = self.flops = 0
        self.waited = self.seconds = 0.0
        self._began = time.perf_counter()
        self.warmup = self._began - self._made

    def timing(self, loader: Loader) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield a loader's batches."""
        batches = iter(loader)
        while True:
            asked = time.perf_counter()
            with record_function("input"):
                batch = next(batches, None)
            self.waited += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def count(self, images: int, flops: int) -> None:
        """Count a batch that was trained on."""
        self.images += images
        self.flops += flops

    def stop(self) -> None:
        self.seconds = time.perf_counter() - self._began

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds


def _diverged(what: str, value: float, step: int, rate: float) -> DivergedError:
    return DivergedError(
        f"the {what} became {value} at step {step} with learning rate {rate:.3g}; lower train.lr"
    )
