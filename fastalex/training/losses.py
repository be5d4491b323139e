"""The check that losses are finite numbers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastalex.distributed.processes import World
from fastalex.errors import DivergedError


class LossWindow:
    """The losses since the last check, kept on the device until the next one.

    Args:
        world: the ranks whose losses are averaged.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._losses: list[Tensor] = []
        self._steps: list[tuple[int, float]] = []

    def add(self, loss: Tensor, step: int, rate: float) -> None:
        """Add the loss of a step, ``()`` on the device, and the learning rate of that step."""
        self._losses.append(loss)
        self._steps.append((step, rate))

    def check(self) -> list[float]:
        """Wait for the device and return each step's loss, averaged over ranks; collective.

        Raises:
            DivergedError: a loss is NaN or infinite.
        """
        losses = torch.stack(self._losses).tolist() if self._losses else []
        losses = [loss / self._world.size for loss in self._world.sum(*losses)]
        for loss, (step, rate) in zip(losses, self._steps, strict=True):
            if not math.isfinite(loss):
                raise diverged("loss", loss, step, rate)
        return losses

    def close(self) -> float | None:
        """Check the losses and clear them; return their mean, or None if there were none."""
        losses = self.check()
        self._losses, self._steps = [], []
        return sum(losses) / len(losses) if losses else None


def diverged(what: str, value: float, step: int, rate: float) -> DivergedError:
    """Return the error that names a loss that is not finite, and its step and learning rate."""
    return DivergedError(
        f"the {what} became {value} at step {step} with learning rate {rate:.3g}; lower train.lr"
    )
