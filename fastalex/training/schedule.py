"""Learning-rate schedules: one cycle, several cycles, or reduction on a plateau."""

from __future__ import annotations

import math
from itertools import accumulate

import torch
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau

from fastalex.config import Scaling, Schedule, TrainConfig

PLATEAU_FACTOR = 0.1

# The paper reduced the rate three times; the fourth reduction ends our run. The factor 0.5 allows for
# rounding: 0.1**3 is inexact.
PLATEAU_FLOOR = 0.5 * PLATEAU_FACTOR**3

# The batch size that train.lr refers to under linear scaling: the paper's.
LR_BATCH = 128


def learning_rate(config: TrainConfig) -> float:
    """Return the peak rate: ``train.lr``, with linear scaling times ``batch_size / LR_BATCH``.

    Linear scaling is from Goyal et al., "Accurate, Large Minibatch SGD", 2017; ``one_cycle`` has the warm-up
    that it needs.

    Args:
        config: the recipe.
    """
    return config.lr * _scale(config)


def head_learning_rate(config: TrainConfig) -> float:
    """Return the last layer's peak rate: ``train.head_lr`` in place of ``train.lr``, scaled like that.

    Args:
        config: the recipe.
    """
    return learning_rate(config) if config.head_lr is None else config.head_lr * _scale(config)


def muon_learning_rate(config: TrainConfig) -> float:
    """Return the peak rate of Muon's convolutions: ``train.muon_lr``, scaled like ``train.lr``.

    Args:
        config: the recipe.
    """
    return config.muon_lr * _scale(config)


def _scale(config: TrainConfig) -> float:
    return 1.0 if config.lr_scaling is Scaling.none else config.batch_size / LR_BATCH


def _cycles(config: TrainConfig, steps: int) -> list[tuple[int, float]]:
    """Return each cycle's number of steps and peak rate.

    A stage with a rate of its own ends a cycle; the end of the run ends the last.
    """
    per_epoch = steps // config.epochs
    cycles, taken, epochs = [], 0, 0
    for stage in config.stages:
        epochs += stage.epochs
        if stage.lr is not None:
            cycles.append((per_epoch * epochs - taken, stage.lr * _scale(config)))
            taken = per_epoch * epochs
    return [*cycles, (steps - taken, learning_rate(config))]


def has_ended(config: TrainConfig, rate: float) -> bool:
    """Whether a plateau schedule has made its last reduction.

    Args:
        config: the recipe.
        rate: the learning rate now.
    """
    return config.schedule is Schedule.plateau and rate < learning_rate(config) * PLATEAU_FLOOR


class LearningRate:
    """Sets the optimizer's learning rate. Call ``after_step`` and ``after_validation`` with any schedule.

    The schedule is that of the first parameter group. Each other group's rate is the same multiple of it at
    every step: that of the rates that the optimizer was created with.

    ``one_cycle`` rises linearly from ``lr / 25`` to ``lr`` over the first ``warmup`` of the steps and falls
    linearly to zero (Smith and Topin, "Super-Convergence", 2018). It restarts after a stage with a rate of
    its own (Loshchilov and Hutter, "SGDR", 2017). ``plateau`` divides the rate by ten when the validation
    error has not improved for more than ``patience`` epochs (Krizhevsky's rule, automated).

    Args:
        optimizer: the optimizer whose rate is set.
        config: the recipe, with the schedule.
        steps: number of steps in the whole run.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, config: TrainConfig, steps: int) -> None:
        self._optimizer = optimizer
        self._config = config
        self._multiples = [group["lr"] / learning_rate(config) for group in optimizer.param_groups]
        self._warmup = config.warmup
        self._cycles = _cycles(config, steps) if config.schedule is Schedule.one_cycle else []
        self._scheduler: OneCycleLR | ReduceLROnPlateau
        if self._cycles:
            self._begin(0)
        else:
            self._scheduler = ReduceLROnPlateau(
                optimizer, factor=PLATEAU_FACTOR, patience=config.patience, threshold=0.0, eps=0.0
            )

    def _begin(self, cycle: int) -> None:
        """Begin a cycle, at its lowest rate."""
        # Not PyTorch's SequentialLR: each OneCycleLR stores its bounds in the optimizer, so the last one
        # would overwrite the others'.
        steps, peak = self._cycles[cycle]
        self._cycle = cycle
        # A warm-up of one step has length 0 in PyTorch, which divides by that length: leave it out.
        warmup = 0.0 if self._warmup * (steps + 1) == 1 else self._warmup
        self._scheduler = OneCycleLR(
            self._optimizer,
            max_lr=[peak * multiple for multiple in self._multiples],
            # One more than the cycle has: PyTorch's schedule reaches zero at its last step.
            total_steps=steps + 1,
            pct_start=warmup,
            anneal_strategy="linear",
            cycle_momentum=False,
        )

    @property
    def current(self) -> float:
        """Learning rate of the next step."""
        return float(self._optimizer.param_groups[0]["lr"])

    @property
    def exhausted(self) -> bool:
        """Whether a plateau schedule has made its last reduction."""
        return has_ended(self._config, self.current)

    def after_step(self) -> None:
        """Set the rate of the next step, under ``one_cycle``."""
        if not isinstance(self._scheduler, OneCycleLR):
            return
        self._scheduler.step()
        ended = self._scheduler.last_epoch == self._cycles[self._cycle][0]
        if ended and self._cycle + 1 < len(self._cycles):
            self._begin(self._cycle + 1)

    def after_validation(self, error: float, epoch: int) -> None:
        """Reduce the rate if the error has stopped improving, under ``plateau``.

        Errors at different crops are not compared: a stage begins anew.

        Args:
            error: top-1 error on the validation images, a fraction.
            epoch: the epoch that was validated, from 0.
        """
        if isinstance(self._scheduler, ReduceLROnPlateau):
            if epoch in accumulate(stage.epochs for stage in self._config.stages):
                self._scheduler.best, self._scheduler.num_bad_epochs = math.inf, 0
            self._scheduler.step(error)

    def state_dict(self) -> dict:
        """Return the state to resume from."""
        state = self._scheduler.state_dict()
        return state | {"cycle": self._cycle} if self._cycles else state

    def load_state_dict(self, state: dict) -> None:
        """Restore a state. Load the optimizer's first: it holds the current rate.

        Args:
            state: what :meth:`state_dict` returned.
        """
        state = dict(state)
        cycle = state.pop("cycle", 0)
        if self._cycles and cycle != self._cycle:
            groups = [dict(group) for group in self._optimizer.param_groups]
            self._begin(cycle)
            for group, loaded in zip(self._optimizer.param_groups, groups, strict=True):
                group.update(loaded)
        self._scheduler.load_state_dict(state)
