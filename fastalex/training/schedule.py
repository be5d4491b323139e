"""The learning rate over a run: one cycle, several, or a plateau."""

from __future__ import annotations

import torch
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau

from fastalex.config import Scaling, Schedule, TrainConfig

PLATEAU_FACTOR = 0.1


# The paper's run ended after three reductions; the fourth ends ours. (Half, because 0.1**3 is not exact.)
PLATEAU_FLOOR = 0.5 * PLATEAU_FACTOR**3


# The batch that train.lr is for, where it is scaled: the paper's.
LR_BATCH = 128


def learning_rate(config: TrainConfig) -> float:
    """The peak rate: ``train.lr``, or that in proportion to the batch.

    Goyal et al., "Accurate, Large Minibatch SGD", 2017; the warm-up which that takes is the one cycle's.
    """
    return config.lr * _scale(config)


def _scale(config: TrainConfig) -> float:
    return 1.0 if config.lr_scaling is Scaling.none else config.batch_size / LR_BATCH


def _cycles(config: TrainConfig, steps: int) -> list[tuple[int, float]]:
    """The steps and the peak rate of each cycle; each stage with a rate ends one, and the run the last."""
    per_epoch = steps // config.epochs
    cycles, taken, epochs = [], 0, 0
    for stage in config.stages:
        epochs += stage.epochs
        if stage.lr is not None:
            cycles.append((per_epoch * epochs - taken, stage.lr * _scale(config)))
            taken = per_epoch * epochs
    return [*cycles, (steps - taken, learning_rate(config))]


class LearningRate:
    """A schedule that is told of every step and of every validation, whichever of the two it follows.

    Args:
        optimizer: whose rate is set.
        config: names the schedule: ``one_cycle`` rises linearly from ``lr / 25`` to ``lr`` over the first
            ``warmup`` of the steps and falls linearly to zero (Smith and Topin, "Super-Convergence", 2018),
            and does so anew after a stage with a rate of its own (the warm restart of Loshchilov and Hutter,
            "SGDR", 2017); ``plateau`` divides by ten when the validation error has not improved for more
            than ``patience`` epochs (Krizhevsky's rule, made automatic).
        steps: of the whole run.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, config: TrainConfig, steps: int) -> None:
        self._optimizer = optimizer
        self._initial = learning_rate(config)
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
        # PyTorch's SequentialLR cannot do it: OneCycleLR keeps its bounds in the optimizer, the last one's in
        # place of the others'.
        steps, peak = self._cycles[cycle]
        self._cycle = cycle
        # PyTorch divides by the length of the rise, and ends it a step early: then it has none.
        warmup = 0.0 if self._warmup * (steps + 1) == 1 else self._warmup
        self._scheduler = OneCycleLR(
            self._optimizer,
            max_lr=peak,
            # One more than are taken: PyTorch's schedule reaches zero at its last step.
            total_steps=steps + 1,
            pct_start=warmup,
            anneal_strategy="linear",
            cycle_momentum=False,
        )

    @property
    def current(self) -> float:
        """The rate of the next step."""
        return float(self._optimizer.param_groups[0]["lr"])

    @property
    def exhausted(self) -> bool:
        """Whether a plateau schedule has made its last reduction."""
        return isinstance(self._scheduler, ReduceLROnPlateau) and self.current < self._initial * PLATEAU_FLOOR

    def after_step(self) -> None:
        if not isinstance(self._scheduler, OneCycleLR):
            return
        self._scheduler.step()
        ended = self._scheduler.last_epoch == self._cycles[self._cycle][0]
        if ended and self._cycle + 1 < len(self._cycles):
            self._begin(self._cycle + 1)

    def after_validation(self, error: float) -> None:
        if isinstance(self._scheduler, ReduceLROnPlateau):
            self._scheduler.step(error)

    def state_dict(self) -> dict:
        state = self._scheduler.state_dict()
        return state | {"cycle": self._cycle} if self._cycles else state

    def load_state_dict(self, state: dict) -> None:
        """Go on from a state; the optimizer's, with the rate, has to be loaded already."""
        state = dict(state)
        cycle = state.pop("cycle", 0)
        if self._cycles and cycle != self._cycle:
            groups = [dict(group) for group in self._optimizer.param_groups]
            self._begin(cycle)
            for group, loaded in zip(self._optimizer.param_groups, groups, strict=True):
                group.update(loaded)
        self._scheduler.load_state_dict(state)
