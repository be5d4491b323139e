"""The figures of an epoch, and what is known of one that has not ended."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastalex.distributed.processes import World
from fastalex.training.timing import Spent


@dataclass(frozen=True)
class Epoch:
    """The figures of one epoch, over all ranks.

    Attributes:
        epoch: number of the epoch, from 1.
        step: optimizer steps since the start of the run.
        train_loss: mean cross-entropy over the epoch's batches, in nats, with label smoothing.
        train_top1_error: fraction of the augmented training samples that were misclassified in their training
            step. For a CutMix image, the class with the larger area counts as correct.
        validation_loss: mean cross-entropy of the centre crops, in nats, with the averaged weights if there
            are any; None without a validation loader, like the next two.
        validation_top1_error: fraction of the centre crops whose most probable class is wrong.
        validation_top5_error: fraction of the centre crops whose class is not among the five most probable.
        learning_rate: the rate of the epoch's last step.
        images_per_second: training samples per second of training time, without warm-up steps.
        input_wait_fraction: fraction of the training time spent waiting for the loader.
        flops_per_second: forward and backward FLOPs of convolutions and matrix products per second of
            training time.
        flops_utilization: ``flops_per_second`` as a fraction of the peak rate; None if the peak is unknown.
        warmup_seconds: duration of the warm-up steps, which compile kernels and allocate memory.
        seconds: wall time of the epoch, including warm-up and validation.
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
class EpochState:
    """Mid-epoch state that a resumed process cannot recompute.

    Attributes:
        batches: batches trained on so far.
        samples: samples in those batches.
        loss: sum of the batches' losses, in nats; fp64 ``()`` on the device while training.
        wrong: number of misclassified samples; int64 ``()`` on the device while training.
        rate: learning rate of the last step.
        spent: images, FLOPs and time of the epoch's steps in earlier processes.
        seconds: wall time of the epoch in earlier processes.
    """

    batches: int = 0
    samples: int = 0
    loss: Tensor | float = 0.0
    wrong: Tensor | int = 0
    rate: float = 0.0
    spent: Spent = field(default_factory=Spent)
    seconds: float = 0.0

    def over(self, world: World) -> EpochState:
        """Return the state summed over all ranks; collective, and waits for the device."""
        loss, wrong, samples = world.sum(float(self.loss), int(self.wrong), self.samples)
        return replace(self, loss=loss / world.size, wrong=int(wrong), samples=int(samples))


class Sums(NamedTuple):
    """Sums over an epoch's batches on this rank, on its device.

    Attributes:
        loss: of the losses, fp64 ``()``.
        wrong: number of misclassified samples, int64 ``()``.
    """

    loss: Tensor
    wrong: Tensor

    @classmethod
    def zeros(cls, device: torch.device) -> Sums:
        return cls(
            torch.zeros((), dtype=torch.float64, device=device),
            torch.zeros((), dtype=torch.int64, device=device),
        )
