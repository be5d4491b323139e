"""The schedules compared with their definitions, and SGD with its formula in float64."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from fastalex.config import Scaling, Schedule, Stage, TrainConfig
from fastalex.training.optim import create_optimizer
from fastalex.training.schedule import LearningRate


def rates(config: TrainConfig, steps: int) -> list[float]:
    optimizer = create_optimizer(nn.Linear(1, 1), config)
    schedule = LearningRate(optimizer, config, steps)
    seen = []
    for _ in range(steps):
        seen.append(schedule.current)
        optimizer.step()
        schedule.after_step()
    return seen


def test_one_cycle_rises_then_falls_linearly() -> None:
    seen = rates(TrainConfig(lr=0.5, warmup=0.25), 100)
    peak = max(range(100), key=seen.__getitem__)
    assert seen[0] == pytest.approx(0.5 / 25)
    assert seen[peak] == pytest.approx(0.5, rel=0.02)
    assert 20 <= peak <= 28
    rising = [b - a for a, b in pairwise(seen[:peak])]
    falling = [b - a for a, b in pairwise(seen[peak + 1 :])]
    assert max(rising) == pytest.approx(min(rising), rel=1e-6)
    assert min(rising) > 0
    assert max(falling) == pytest.approx(min(falling), rel=1e-6)
    assert max(falling) < 0
    assert 0 < seen[-1] < 0.01  # the last step still changes weights


def test_a_warm_up_of_one_step_is_left_out() -> None:
    """0.1 of nine steps plus PyTorch's extra one is a single step: the cycle begins at the peak."""
    seen = rates(TrainConfig(lr=0.5, warmup=0.1), 9)
    assert seen == rates(TrainConfig(lr=0.5, warmup=0.0), 9)
    assert seen[0] == max(seen) == pytest.approx(0.5, rel=0.11)
    assert min(seen) > 0


def test_a_stage_with_its_own_rate_is_a_cycle_of_its_own() -> None:
    """Each cycle equals that of a separate run; a stage without a rate joins the next cycle."""
    stages = [Stage(2, 16, 12, lr=0.5), Stage(1, 18, 14)]
    config = TrainConfig(
        epochs=7, lr=0.1, batch_size=256, lr_scaling=Scaling.linear, warmup=1 / 3, stages=stages
    )
    first, last = (replace(config, epochs=epochs, lr=lr, stages=[]) for epochs, lr in ((2, 0.5), (5, 0.1)))
    assert rates(config, 70) == rates(first, 20) + rates(last, 50)
    assert max(rates(first, 20)) == pytest.approx(2 * 0.5)


def test_stages_without_rates_share_one_cycle() -> None:
    config = TrainConfig(epochs=7, lr=0.1, stages=[Stage(2, 16, 12), Stage(1, 18, 14)])
    assert rates(config, 70) == rates(replace(config, stages=[]), 70)


def test_plateau_divides_by_ten_when_validation_stops_improving() -> None:
    config = TrainConfig(lr=1.0, schedule=Schedule.plateau, patience=2)
    schedule = LearningRate(create_optimizer(nn.Linear(1, 1), config), config, 1000)
    seen = []
    for epoch, error in enumerate((0.9, 0.8, 0.8, 0.81, 0.8, 0.7, 0.7, 0.7, 0.7)):
        schedule.after_step()
        schedule.after_validation(error, epoch)
        seen.append(schedule.current)
    assert seen == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.1, 0.1, 0.01])
    assert not schedule.exhausted
    for epoch in range(9, 15):
        schedule.after_validation(0.7, epoch)
    assert schedule.current == pytest.approx(1e-4)
    assert schedule.exhausted


def test_plateau_does_not_compare_errors_at_different_crops() -> None:
    stages = [Stage(2, 16, 12), Stage(2, 18, 14)]
    config = TrainConfig(lr=1.0, schedule=Schedule.plateau, patience=0, stages=stages)
    schedule = LearningRate(create_optimizer(nn.Linear(1, 1), config), config, 1000)
    seen = []
    for epoch, error in enumerate((0.3, 0.2, 0.4, 0.39, 0.5, 0.4, 0.4)):
        schedule.after_validation(error, epoch)
        seen.append(schedule.current)
    assert seen == pytest.approx([1, 1, 1, 1, 1, 1, 0.1])


def test_sgd_has_the_papers_momentum_and_weight_decay() -> None:
    """v <- 0.9 v + (g + 0.0005 w); w <- w - lr v: the paper's rule with lr outside the velocity."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 2, bias=False)
    optimizer = create_optimizer(layer, TrainConfig(lr=0.1))
    weight = layer.weight.detach().double().clone()
    velocity = torch.zeros_like(weight)
    for _ in range(5):
        gradient = torch.randn(2, 3)
        layer.weight.grad = gradient.clone()
        optimizer.step()
        velocity = 0.9 * velocity + gradient.double() + 5e-4 * weight
        weight = weight - 0.1 * velocity
    torch.testing.assert_close(layer.weight.detach().double(), weight, rtol=1e-6, atol=1e-6)
