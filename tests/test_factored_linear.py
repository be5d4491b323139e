"""Gradients left as factors, their norms and SGD steps, compared with those of plain PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from fastalex.config import Optimizer, Precision, RuntimeConfig, TrainConfig
from fastalex.distributed import strategies
from fastalex.kernels.factored_sgd_reference import ROWS, gradient_rows
from fastalex.models.factored_linear import FactoredLinear, Factors, Tap
from fastalex.models.pooled_linear import PooledLinear
from fastalex.runtime import choose_runtime
from fastalex.training.optim import create_optimizer
from fastalex.training.taps import Taps
from fastalex.training.trainer import Trainer
from tests.listed import Listed
from tests.runtimes import a_runtime
from tests.tolerances import relative_error, unit_roundoff

BATCH, CHANNELS, SIZE = 6, 5, 6
UNITS = ROWS + 7  # two blocks of rows, the second incomplete
IMAGES = [(1, 1), (2, 2), (1, 3), (6, 6), (9, 11)]  # the weight is pooled for the first three


class Network(nn.Module):
    """Two layers to tap, followed by a plain one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = PooledLinear(CHANNELS, SIZE, UNITS)
        self.second = FactoredLinear(UNITS, UNITS)
        self.last = nn.Linear(UNITS, 3)

    @property
    def factored_layers(self) -> list[FactoredLinear]:
        return [self.first, self.second]

    def forward(self, x: Tensor, taps: Sequence[Tap | None] = ()) -> Tensor | tuple[Tensor, list[Tensor]]:
        if not taps:
            return self.last(torch.relu(self.second(torch.relu(self.first(x)))))
        inputs = []
        for layer, tap in zip(self.factored_layers, taps, strict=True):
            if tap is None:
                x = layer(x)
            else:
                x, seen = layer.tapped(x, tap)
                inputs.append(seen)
            x = torch.relu(x)
        return self.last(x), inputs


def networks() -> tuple[Network, Network]:
    """Two copies of a network, in float64."""
    torch.manual_seed(0)
    network = Network().double()
    return network, copy.deepcopy(network)


def images(image: tuple[int, int] = (2, 2)) -> Tensor:
    return torch.randn(BATCH, CHANNELS, *image, dtype=torch.float64)


def backward(network: Network, x: Tensor, tapped: bool = False) -> Tensor:
    """Run forward and backward pass; return the gradient of the input."""
    x = x.clone().requires_grad_()
    taps = [Tap(torch.zeros(len(x), UNITS, dtype=x.dtype, requires_grad=True)) for _ in range(2 * tapped)]
    output = network(x, taps)
    logits, inputs = output if tapped else (output, [])
    logits.square().sum().backward()
    for layer, tap, seen in zip(network.factored_layers, taps, inputs, strict=False):
        layer.add_factors(tap.zeros.grad, seen)
    assert x.grad is not None
    return x.grad


def gradient(factors: Factors | None) -> Tensor:
    """A gradient multiplied out."""
    assert factors is not None
    assert factors.scale is None
    return gradient_rows(factors.output, factors.input, factors.pooling, 0, UNITS)


@pytest.mark.parametrize("image", IMAGES, ids=str)
@pytest.mark.parametrize("passes", [1, 3])
def test_factors_give_the_gradient_and_its_norm(image: tuple[int, int], passes: int) -> None:
    network, plain = networks()
    for x in images(image).chunk(passes):
        torch.testing.assert_close(backward(network, x, tapped=True), backward(plain, x))
    for ours, theirs in zip(network.factored_layers, plain.factored_layers, strict=True):
        expected = theirs.weight.grad
        assert ours.weight.grad is None
        assert expected is not None
        torch.testing.assert_close(gradient(ours.gradient), expected)
        assert ours.gradient is not None
        torch.testing.assert_close(ours.gradient.squared_norm(), expected.square().sum())
    for name, parameter in plain.named_parameters():
        if name not in ("first.weight", "second.weight"):
            torch.testing.assert_close(network.get_parameter(name).grad, parameter.grad)


def test_the_norm_when_gradients_cancel() -> None:
    """Similar images whose gradients sum to almost zero: in fp32 the norm would be mostly rounding error."""
    torch.manual_seed(0)
    input = torch.randn(1, 1000) + 1e-4 * torch.randn(64, 1000)
    output = torch.randn(64, 50)
    output -= output.mean(0)
    expected = (output.double().t() @ input.double()).square().sum()
    torch.testing.assert_close(Factors(output, input).squared_norm(), expected)


def test_the_optimizer_clears_the_factors() -> None:
    network, _ = networks()
    optimizer = create_optimizer(network, TrainConfig())
    backward(network, images(), tapped=True)
    assert all(layer.gradient for layer in network.factored_layers)
    optimizer.zero_grad()
    assert [layer.gradient for layer in network.factored_layers] == [None, None]


@pytest.mark.parametrize("image", [(2, 2), (6, 6)], ids=str)
def test_torch_compile_takes_a_tapped_network_as_one_graph(image: tuple[int, int]) -> None:
    """With the traced graphs run eagerly: what is tested is that nothing breaks the graph."""
    network, plain = networks()
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    x = images(image)
    taps = [Tap(torch.zeros(BATCH, UNITS, dtype=x.dtype, requires_grad=True)) for _ in range(2)]
    logits, inputs = compiled(x, taps)
    logits.square().sum().backward()
    backward(plain, x)
    for ours, theirs, tap, seen in zip(
        network.factored_layers, plain.factored_layers, taps, inputs, strict=True
    ):
        ours.add_factors(tap.zeros.grad, seen)
        assert ours.weight.grad is None
        torch.testing.assert_close(gradient(ours.gradient), theirs.weight.grad)


@pytest.mark.parametrize("image", [(2, 2), (6, 6)], ids=str)
def test_under_autocast(image: tuple[int, int]) -> None:
    """Outputs are bit-identical; gradients are fp32 and agree with PyTorch's to bf16's rounding."""
    network, plain = (network.float() for network in networks())
    x = images(image).float()
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain(x).float()
    expected.square().sum().backward()
    copies = [layer.weight.detach().bfloat16() for layer in network.factored_layers]
    taps = [Tap(torch.zeros(BATCH, UNITS, dtype=torch.bfloat16, requires_grad=True), copy) for copy in copies]
    with torch.autocast("cpu", torch.bfloat16):
        logits, inputs = network(x, taps)
    torch.testing.assert_close(logits.float(), expected, rtol=0, atol=0)
    logits.float().square().sum().backward()
    for ours, theirs, tap, seen in zip(
        network.factored_layers, plain.factored_layers, taps, inputs, strict=True
    ):
        ours.add_factors(tap.zeros.grad, seen)
        assert theirs.weight.grad is not None
        found = gradient(ours.gradient)
        assert found.dtype == torch.float32
        # PyTorch rounds the product, and here its factors are rounded.
        assert relative_error(found, theirs.weight.grad) < 2 * unit_roundoff(torch.bfloat16)


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
        backward(network, x, tapped=True)
        if clip_norm:
            assert nn.utils.clip_grad_norm_(plain.parameters(), clip_norm) > clip_norm
            strategies.clip_gradients(network, clip_norm)
        optimizer.step()
        expected.step()
        for each in (optimizer, expected):
            each.zero_grad()
    for ours, theirs in zip(network.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
@pytest.mark.parametrize("overflow", [False, True])
def test_steps_with_a_scaled_loss(clip_norm: float, overflow: bool) -> None:
    """As torch.amp.GradScaler drives the optimizer: the scale is divided out, an infinity skips the step."""
    network, plain = networks()
    before = [parameter.detach().clone() for parameter in network.parameters()]
    optimizer = create_optimizer(network, TrainConfig(lr=0.01, momentum=0.9, weight_decay=0.1))
    expected = torch.optim.SGD(plain.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1)
    x, scale = images(), torch.tensor(1024.0)
    backward(plain, x)
    backward(network, x, tapped=True)
    for layer in network.factored_layers:
        layer.parts[0].output *= scale
    for parameter in network.parameters():
        if parameter.grad is not None and not clip_norm:
            parameter.grad *= scale
    if clip_norm:  # the scaler has divided the other gradients
        nn.utils.clip_grad_norm_(plain.parameters(), clip_norm)
        strategies.clip_gradients(network, clip_norm, scale)
    optimizer.grad_scale = None if clip_norm else scale
    optimizer.found_inf = torch.tensor(float(overflow))
    optimizer.step()
    expected.step()
    wanted = before if overflow else plain.parameters()
    for ours, theirs in zip(network.parameters(), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_copy_follows_the_weight() -> None:
    """In training, and when something else changes the weight."""
    network, _ = networks()
    network.float()
    taps = Taps(network, copy.deepcopy(network).to("meta"), a_runtime(dtype=torch.bfloat16), copies=True)
    optimizer = create_optimizer(network, TrainConfig(lr=0.1))
    x = images((6, 6)).float()
    for _ in range(3):
        tapped = taps.of(x.shape)
        for layer, tap in zip(network.factored_layers, tapped, strict=True):
            assert tap is not None
            assert tap.copy is not None
            assert torch.equal(tap.copy, layer.weight.bfloat16())
        with torch.autocast("cpu", torch.bfloat16):
            logits, inputs = network(x, tapped)
        logits.float().square().sum().backward()
        taps.collect(tapped, inputs)
        optimizer.step()
        optimizer.zero_grad()
        assert tapped[1].copy is network.second.copy
        assert torch.equal(network.second.copy, network.second.weight.bfloat16())
        with torch.no_grad():
            network.second.weight += 1


@pytest.mark.parametrize("frozen", [[], ["second.weight"], ["second.weight", "second.bias"]], ids=str)
def test_frozen_parameters_stay_and_others_are_updated_as_by_sgd(frozen: list[str]) -> None:
    network, plain = (each.float() for each in networks())
    for each in (network, plain):
        for name, parameter in each.named_parameters():
            parameter.requires_grad_(name not in frozen)
    before = copy.deepcopy(network.state_dict())
    config = TrainConfig(lr=0.1, momentum=0.0, weight_decay=0.0, clip_norm=0.0, epochs=1)
    runtime = choose_runtime(RuntimeConfig(device="cpu", precision=Precision.fp32))
    trainer = Trainer(network, config, OneBatch(), None, runtime)
    rate = trainer.learning_rate.current
    trainer.run_epoch()
    nn.functional.cross_entropy(plain(OneBatch.images), OneBatch.labels).backward()
    torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=rate).step()
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
        backward(each, x, tapped=True)
        steps.step()
    for ours, theirs in zip(network.parameters(), copied.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert ours is not theirs
    assert not torch.equal(copied.second.weight, networks()[0].second.weight)


class OneBatch(Listed):
    """A loader of one batch."""

    images = torch.randn(BATCH, CHANNELS, 2, 2, generator=torch.Generator().manual_seed(3))
    labels = torch.zeros(BATCH, dtype=torch.int64)

    def __init__(self) -> None:
        self.batches = [(self.images, self.labels)]


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
