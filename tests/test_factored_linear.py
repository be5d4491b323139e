"""Gradients stored as factors, their norms and SGD steps, compared with those of plain PyTorch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fastalex.config import Optimizer, Precision, RuntimeConfig, TrainConfig
from fastalex.distributed import strategies
from fastalex.models.factored_linear import FactoredLinear, keeping_factors
from fastalex.models.pooled_linear import PooledLinear
from fastalex.runtime import choose_runtime
from fastalex.training.optim import ROWS, create_optimizer
from fastalex.training.trainer import Trainer

BATCH, CHANNELS, SIZE = 6, 5, 6
UNITS = ROWS + 7  # two blocks of rows, the second incomplete
IMAGES = [(1, 1), (2, 2), (1, 3), (6, 6), (9, 11)]  # the weight is pooled for the first three


class Network(nn.Module):
    """Two factored layers followed by a plain one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = PooledLinear(CHANNELS, SIZE, UNITS)
        self.second = FactoredLinear(UNITS, UNITS)
        self.last = nn.Linear(UNITS, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.second(torch.relu(self.first(x)))))

    @property
    def factored(self) -> list[FactoredLinear]:
        return [self.first, self.second]


def networks() -> tuple[Network, Network]:
    """Two copies of a network, in float64."""
    torch.manual_seed(0)
    network = Network().double()
    return network, copy.deepcopy(network)


def images(image: tuple[int, int] = (2, 2)) -> Tensor:
    return torch.randn(BATCH, CHANNELS, *image, dtype=torch.float64)


def backward(network: Network, x: Tensor) -> Tensor:
    """Run forward and backward pass; return the gradient of the input."""
    x = x.clone().requires_grad_()
    network(x).square().sum().backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("image", IMAGES, ids=str)
@pytest.mark.parametrize("passes", [1, 3])
def test_factors_give_the_gradient_and_its_norm(image: tuple[int, int], passes: int) -> None:
    network, plain = networks()
    with keeping_factors(network.factored):
        for x in images(image).chunk(passes):
            torch.testing.assert_close(backward(network, x), backward(plain, x))
        for ours, theirs in zip(network.factored, plain.factored, strict=True):
            expected = theirs.weight.grad
            assert ours.weight.grad is None
            assert ours.gradient is not None
            assert expected is not None
            torch.testing.assert_close(ours.gradient.rows(3, UNITS), expected[3:])
            torch.testing.assert_close(ours.gradient.squared_norm(), expected.square().sum())
    for name, parameter in plain.named_parameters():
        if name not in ("first.weight", "second.weight"):
            torch.testing.assert_close(network.get_parameter(name).grad, parameter.grad)
    assert [layer.gradient for layer in network.factored] == [None, None]


def test_the_norm_when_gradients_cancel() -> None:
    """Similar images whose gradients sum to almost zero: in fp32 the norm would be mostly rounding error."""
    torch.manual_seed(0)
    layer = FactoredLinear(1000, 50)
    images = torch.randn(1, 1000) + 1e-4 * torch.randn(64, 1000)
    gradient = torch.randn(64, 50)
    gradient -= gradient.mean(0)
    with keeping_factors([layer]):
        layer(images).backward(gradient)
        assert layer.gradient is not None
        found = layer.gradient.squared_norm()
    torch.testing.assert_close(found, (gradient.double().t() @ images.double()).square().sum())


def test_after_the_context_the_gradient_goes_to_the_weight() -> None:
    network, plain = networks()
    x = images()
    with pytest.raises(ZeroDivisionError), keeping_factors(network.factored):
        raise ZeroDivisionError
    backward(network, x)
    backward(plain, x)
    for ours, theirs in zip(network.parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("image", [(2, 2), (6, 6)], ids=str)
def test_under_autocast(image: tuple[int, int]) -> None:
    """Outputs are bit-identical; gradients are fp32 and agree with PyTorch's to bf16's rounding."""
    network, plain = (network.float() for network in networks())
    x = images(image).float()
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain(x).float()
    expected.square().sum().backward()
    with keeping_factors(network.factored):
        with torch.autocast("cpu", torch.bfloat16):
            found = network(x).float()
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        found.square().sum().backward()
        for ours, theirs in zip(network.factored, plain.factored, strict=True):
            assert theirs.weight.grad is not None
            assert ours.gradient is not None
            rows = ours.gradient.rows(0, UNITS)
            assert rows.dtype == torch.float32
            assert (rows - theirs.weight.grad).norm() < 2**-8 * theirs.weight.grad.norm()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
@pytest.mark.parametrize("image", [(2, 2), (6, 6)], ids=str)
def test_steps_equal_those_of_sgd(momentum: float, clip_norm: float, image: tuple[int, int]) -> None:
    network, plain = networks()
    optimizer = create_optimizer(network, TrainConfig(lr=0.01, momentum=momentum, weight_decay=0.1))
    expected = torch.optim.SGD(plain.parameters(), lr=0.01, momentum=momentum, weight_decay=0.1)
    for _ in range(3):
        x = images(image)
        backward(plain, x)
        with keeping_factors(network.factored):
            backward(network, x)
            if clip_norm:
                assert nn.utils.clip_grad_norm_(plain.parameters(), clip_norm) > clip_norm
                strategies.clip_gradients(network, clip_norm)
            optimizer.step()
        expected.step()
        for each in (optimizer, expected):
            each.zero_grad()
    for ours, theirs in zip(network.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "frozen", [[], ["1.weight"], ["0.weight", "0.bias"], ["0.weight", "0.bias", "1.bias"]], ids=str
)
def test_frozen_parameters_stay_and_others_are_updated_as_by_sgd(frozen: list[str], bias: bool) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 5), FactoredLinear(5, 6, bias=bias)).double()
    plain = copy.deepcopy(network)
    for each in (network, plain):
        for name, parameter in each.named_parameters():
            parameter.requires_grad_(name not in frozen)
    optimizer = create_optimizer(network, TrainConfig(lr=0.1, momentum=0.0, weight_decay=0.0))
    expected = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=0.1)
    x = torch.randn(7, 4, dtype=torch.float64)
    plain(x).square().mean().backward()
    expected.step()
    before = {name: parameter.clone() for name, parameter in network.named_parameters()}
    with keeping_factors([network[1]]):
        network(x).square().mean().backward()
        optimizer.step()
    theirs = dict(plain.named_parameters())
    for name, ours in network.named_parameters():
        torch.testing.assert_close(ours, theirs[name])
        assert torch.equal(ours, before[name]) == (name in frozen)


def test_a_copied_optimizer_updates_the_copied_layers() -> None:
    network, _ = networks()
    optimizer = create_optimizer(network, TrainConfig(lr=0.01))
    copied, its_optimizer = copy.deepcopy((network, optimizer))
    x = images()
    for each, steps in ((network, optimizer), (copied, its_optimizer)):
        with keeping_factors(each.factored):
            backward(each, x)
            steps.step()
    for ours, theirs in zip(network.parameters(), copied.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert ours is not theirs
    assert not torch.equal(copied.second.weight, networks()[0].second.weight)


class OneBatch:
    """A loader of one batch."""

    num_samples = BATCH

    def __len__(self) -> int:
        return 1

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        pass

    def __iter__(self):
        yield images().float(), torch.zeros(BATCH, dtype=torch.int64)


@pytest.mark.parametrize(
    ("config", "computed"), [(TrainConfig(), False), (TrainConfig(optimizer=Optimizer.lars), True)]
)
def test_the_trainer_computes_the_whole_gradient_only_for_lars(config: TrainConfig, computed: bool) -> None:
    """LARS needs the gradient itself, not its factors."""
    network = Network()
    seen: list[Tensor] = []
    network.second.weight.register_post_accumulate_grad_hook(seen.append)
    before = network.second.weight.detach().clone()
    runtime = choose_runtime(RuntimeConfig(device="cpu", precision=Precision.fp32))
    Trainer(network, config, OneBatch(), None, runtime).run_epoch()
    assert bool(seen) == computed
    assert not torch.equal(network.second.weight, before)
