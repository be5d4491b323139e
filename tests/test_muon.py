"""Muon compared with its formula in float64, from a singular value decomposition, and with PyTorch's own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastalex.config import Optimizer, TrainConfig
from fastalex.distributed.processes import ALONE, World
from fastalex.training.muon import BLOCKS, Muon, orthogonalized
from fastalex.training.optim import create_optimizer
from fastalex.training.schedule import LearningRate
from tests.tolerances import assert_as_accurate, assert_same_in_float64, usual_sum_error

A, B, C = 3.4445, -4.7750, 2.0315  # Jordan's polynomial
RATE, DECAY, MOMENTUM = 0.03, 0.2, 0.95


def alone(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Orthogonalise one matrix."""
    ((found,),) = orthogonalized([matrix[None]], dtype)
    return found


def from_svd(matrix: Tensor) -> Tensor:
    """Apply the polynomial five times to the singular values of a matrix of norm 1, in float64."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    return left @ applied(values / values.norm(), 5).diag() @ right


def applied(values: Tensor, count: int) -> Tensor:
    """Apply the polynomial some times to singular values."""
    for _ in range(count):
        values = A * values + B * values**3 + C * values**5
    return values


def growth(matrix: Tensor) -> float:
    """How much larger a block's error is than a rounding, as a share of the block's result.

    A block of applications is a matrix, which is as large as the largest factor of a singular value. The
    rounding of that matrix multiplies all of the block's input.
    """
    values = torch.linalg.svdvals(matrix.double())
    values = values / values.norm()
    found = []
    for count in BLOCKS:
        before, values = values, applied(values, count)
        found.append(((values / before).max() * before.norm() / values.norm()).item())
    return max(found)


def with_spectrum(rows: int, columns: int, condition: float) -> Tensor:
    """Return a matrix of random singular vectors, whose singular values fall by equal factors."""
    count = min(rows, columns)
    left, _ = torch.linalg.qr(torch.randn(rows, count, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(columns, count, dtype=torch.float64))
    values = torch.logspace(0, -math.log10(condition), count, dtype=torch.float64)
    return 7 * left @ values.diag() @ right.T


SHAPES = [(12, 40), (40, 12), (16, 16), (1, 9), (9, 1), (1, 1)]


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e6])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_singular_values_are_those_of_the_polynomial(rows: int, columns: int, condition: float) -> None:
    torch.manual_seed(0)
    matrix = with_spectrum(rows, columns, condition)
    assert_same_in_float64(alone(matrix, torch.float64), from_svd(matrix))


def test_singular_values_become_nearly_one() -> None:
    """From a hundredth of the norm on, as the docstring says."""
    torch.manual_seed(0)
    matrix = with_spectrum(20, 50, 30.0)
    assert torch.linalg.svdvals(matrix).min() > 0.01 * matrix.norm()
    values = torch.linalg.svdvals(alone(matrix, torch.float64))
    assert 0.68 < values.min() < values.max() < 1.14


def plain(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Apply the polynomial to the matrix itself, as PyTorch's Muon does."""
    x = (matrix / matrix.norm()).to(dtype)
    for _ in range(5):
        gram = x @ x.mT
        x = A * x + (B * gram + C * gram @ gram) @ x
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("condition", [10.0, 1e4])
def test_products_of_few_digits_are_as_accurate_as_the_usual_form(
    dtype: torch.dtype, condition: float
) -> None:
    torch.manual_seed(0)
    matrix = with_spectrum(96, 363, condition).float()
    exact = {"x": from_svd(matrix)}
    ours, theirs = {"x": alone(matrix, dtype)}, {"x": plain(matrix, dtype)}
    assert ours["x"].dtype == dtype
    floor = usual_sum_error(dtype, 363)
    if dtype == torch.float32:  # sums of 16-bit products are in fp32, and rounded once
        floor = max(floor, growth(matrix) * usual_sum_error(dtype, len(matrix)))
    assert_as_accurate(ours, [theirs], exact, floor=floor)


def test_matrices_of_stacks_are_independent_and_zero_stays_zero() -> None:
    """Some stacks are computed together: those of 6 rows or columns, whichever are fewer."""
    torch.manual_seed(0)
    zeros = torch.zeros(6, 10, dtype=torch.float64)
    stacks = [
        torch.stack([with_spectrum(6, 10, 5.0), zeros]),
        with_spectrum(9, 4, 5.0)[None],
        torch.stack([with_spectrum(20, 6, 100.0) for _ in range(3)]),
        with_spectrum(6, 6, 5.0)[None],
    ]
    found = orthogonalized(stacks, torch.float64)
    assert found[0][1].abs().max() == 0
    pairs = [pair for both in zip(stacks, found, strict=True) for pair in zip(*both, strict=True)]
    assert len(pairs) == 7
    for matrix, result in pairs:
        if matrix.any():
            assert_same_in_float64(result, from_svd(matrix))


class Products(TorchDispatchMode):
    """Counts the operators that multiply matrices."""

    count = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += operator.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.baddbmm)
        return operator(*args, **(kwargs or {}))


def test_layers_of_one_size_share_the_products_of_their_gram_matrices() -> None:
    """More layers add only those that are as wide as their matrix: two for each of the two blocks."""
    shapes = [(1, 6, 10), (2, 6, 20), (1, 30, 6)]
    counts = []
    for number in (1, 2, 3):
        with Products() as products:
            orthogonalized([torch.ones(shape) for shape in shapes[:number]], torch.float32)
        counts.append(products.count)
    assert counts == [counts[0], counts[0] + 4, counts[0] + 8]
    assert counts[0] > 4


class Network(nn.Module):
    """Convolutions of several shapes: wide, tall, grouped and depthwise."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, bias=False)
        self.grouped = nn.Conv2d(8, 12, 3, groups=2)
        self.depthwise = nn.Conv2d(12, 12, 3, groups=12)
        self.tall = nn.Conv2d(12, 30, 1)
        self.last = nn.Linear(30, 4)


def a_network(memory_format: torch.memory_format = torch.channels_last) -> Network:
    torch.manual_seed(0)
    return Network().double().to(memory_format=memory_format)


def give_gradients(network: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        gradient = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.grad = torch.empty_like(parameter).copy_(gradient)


def muon(network: nn.Module, world: World = ALONE) -> Muon:
    config = TrainConfig(optimizer=Optimizer.muon, lr=0.1, muon_lr=RATE, muon_weight_decay=DECAY)
    optimizer = create_optimizer(network, config, world=world)
    assert isinstance(optimizer, Muon)
    return optimizer


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_steps_of_convolutions_are_those_of_the_formula(memory_format: torch.memory_format) -> None:
    """Nesterov momentum; a matrix for each group of channels, scaled where it has more rows than columns."""
    network = a_network(memory_format)
    optimizer = muon(network)
    convolutions = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    weights = [layer.weight.detach().clone() for layer in convolutions]
    velocities = [torch.zeros_like(weight) for weight in weights]
    for step in range(3):
        give_gradients(network, step)
        gradients = [layer.weight.grad for layer in convolutions]
        optimizer.step()
        for number, layer in enumerate(convolutions):
            velocities[number] = MOMENTUM * velocities[number] + (1 - MOMENTUM) * gradients[number]
            direction = MOMENTUM * velocities[number] + (1 - MOMENTUM) * gradients[number]
            for rows in torch.arange(layer.out_channels).chunk(layer.groups):
                update = from_svd(direction[rows].flatten(1))
                scale = math.sqrt(max(1, update.shape[0] / update.shape[1]))
                weights[number][rows] *= 1 - RATE * DECAY
                weights[number][rows] -= RATE * scale * update.view_as(direction[rows])
            assert_same_in_float64(layer.weight.detach(), weights[number])


def test_all_other_parameters_take_the_steps_of_sgd() -> None:
    ours, theirs = a_network(), a_network()
    optimizers = muon(ours), create_optimizer(theirs, TrainConfig(lr=0.1))
    for step in range(3):
        for network, optimizer in zip((ours, theirs), optimizers, strict=True):
            give_gradients(network, step)
            optimizer.step()
    changed = {
        name
        for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True)
        if not torch.equal(mine, other)
    }
    assert changed == {"first.weight", "grouped.weight", "depthwise.weight", "tall.weight"}


def test_a_step_is_that_of_pytorchs_muon() -> None:
    """PyTorch's is for matrices, and in bf16, where Jordan's five products err by several hundredths."""
    torch.manual_seed(0)
    layer = nn.Conv2d(16, 24, 3, bias=False)
    matrix = nn.Parameter(layer.weight.detach().flatten(1).clone())
    before = matrix.detach().clone()
    ours = muon(nn.Sequential(layer))
    theirs = torch.optim.Muon([matrix], lr=RATE, weight_decay=DECAY, momentum=MOMENTUM)
    for _ in range(3):
        layer.weight.grad = torch.randn_like(layer.weight)
        matrix.grad = layer.weight.grad.flatten(1).clone()
        ours.step()
        theirs.step()
    moved = layer.weight.detach().flatten(1) - before
    assert (moved - (matrix.detach() - before)).norm() < 0.1 * moved.norm()


def test_a_skipped_step_changes_nothing_and_a_scaled_one_divides() -> None:
    """What a gradient scaler asks of an optimizer that it leaves the check for overflow to."""
    network, expected = a_network(), a_network()
    optimizer, plain_optimizer = muon(network), muon(expected)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    give_gradients(network, 0)
    network.first.weight.grad[0, 0, 0, 0] = math.inf
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(1.0), torch.tensor(64.0)
    optimizer.step()
    for parameter, old in zip(network.parameters(), before, strict=True):
        assert torch.equal(parameter, old)
        assert optimizer.state[parameter]["momentum_buffer"].abs().max() == 0
    optimizer.found_inf = torch.tensor(0.0)
    give_gradients(network, 1)
    give_gradients(expected, 1)
    for parameter in network.parameters():
        parameter.grad *= 64
    optimizer.step()
    plain_optimizer.step()
    for mine, other in zip(network.parameters(), expected.parameters(), strict=True):
        assert_same_in_float64(mine.detach(), other.detach())


def test_a_rank_for_which_no_convolution_is_left_takes_the_steps_of_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What ranks send each other is made up here; ``tests/test_distributed.py`` has two that do it."""
    first, last = a_network(), a_network()
    sent: list[Tensor] = []
    for network, world, exchange in (
        (first, ALONE, lambda _world, _rank, tensor: sent.append(tensor.clone())),
        (last, World(rank=5, size=6), lambda _world, rank, tensor: tensor.copy_(sent[rank])),
    ):
        monkeypatch.setattr(World, "copy_from", exchange)
        give_gradients(network, 0)
        muon(network, world).step()
    assert len(sent) == 4
    for mine, other in zip(first.parameters(), last.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_frozen_convolutions_are_left_out_and_none_at_all_is_sgd() -> None:
    network = a_network()
    network.first.weight.requires_grad_(False)
    held = {p for group in muon(network).param_groups for p in group["params"]}
    assert network.first.weight not in held
    assert network.grouped.weight in held
    config = TrainConfig(optimizer=Optimizer.muon)
    assert not isinstance(create_optimizer(nn.Linear(2, 2), config), Muon)


def test_the_schedule_scales_both_rates() -> None:
    config = TrainConfig(optimizer=Optimizer.muon, lr=0.1, muon_lr=RATE, warmup=0.5)
    optimizer = create_optimizer(a_network(), config)
    schedule = LearningRate(optimizer, config, 19)
    rates = []
    for _ in range(19):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.after_step()
    assert max(rate for rate, _ in rates) == pytest.approx(0.1)
    assert [theirs / rate for rate, theirs in rates] == pytest.approx([RATE / 0.1] * 19)
