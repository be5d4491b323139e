"""The layer in the place of torch's, and the example that puts it there."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from examples import googlenet_lrn
from fastalex.kernels import LocalResponseNorm, replace_lrn
from tests.tolerances import NOISE, assert_within_noise, far_from_jumps

STRONG = {"alpha": 0.5, "beta": 0.75, "k": 1.0}  # neighbours matter: without the layer, results are far off


@pytest.mark.parametrize("arguments", [{}, {"alpha": 2}, {"alpha": 5e-4, "beta": 0.5, "k": 2.0}])
def test_arguments_state_and_representation_are_those_of_torch(arguments: dict[str, float]) -> None:
    ours, theirs = LocalResponseNorm(5, **arguments), nn.LocalResponseNorm(5, **arguments)
    assert repr(ours) == repr(theirs)
    assert {name: getattr(ours, name) for name in theirs.__constants__} == {
        name: getattr(theirs, name) for name in theirs.__constants__
    }
    assert ours.state_dict() == {}
    ours.load_state_dict(theirs.state_dict())
    assert repr(nn.Sequential(pickle.loads(pickle.dumps(ours)))) == repr(nn.Sequential(theirs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 7, 9), (2, 16, 5, 6), (2, 7, 3, 2, 2)])
@pytest.mark.parametrize("size", [3, 4])
def test_results_and_gradients_are_those_of_torch_in_float64(
    shape: tuple[int, ...], dtype: torch.dtype, size: int
) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype).requires_grad_()
    exact_x = x.detach().double().requires_grad_()
    result, exact = LocalResponseNorm(size, **STRONG)(x), nn.LocalResponseNorm(size, **STRONG)(exact_x)
    gradient = torch.randn(shape).to(dtype)
    result.backward(gradient)
    exact.backward(gradient.double())
    assert result.dtype == dtype
    # Arithmetic is fp32: a power of 3e-7 and some roundings; then the result is rounded to its dtype.
    bound = {"rtol": torch.finfo(dtype).eps + 2e-6, "atol": 4e-6}
    torch.testing.assert_close(result.double(), exact, **bound)
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), exact_x.grad, **bound)


class Other(nn.LocalResponseNorm):
    """A subclass with arithmetic of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return -input


def test_each_layer_is_replaced_in_place() -> None:
    shared = nn.LocalResponseNorm(3)
    other = Other(5)
    network = nn.Sequential(
        nn.ReLU(), shared, nn.Sequential(shared, nn.LocalResponseNorm(5, **STRONG)), other
    )
    network[2].eval()
    seen = []
    handle = shared.register_forward_hook(lambda layer, inputs, output: seen.append(layer))
    assert replace_lrn(network) == 2
    assert type(network[1]) is LocalResponseNorm
    assert network[1] is network[2][0] is shared
    assert type(network[2][1]) is LocalResponseNorm
    assert network[2][1].alpha == STRONG["alpha"]
    assert type(network[3]) is Other
    assert [layer.training for layer in (network[1], network[2][1], network[3])] == [False, False, True]
    network(torch.ones(1, 4, 2, 2))
    assert seen == [shared, shared]
    handle.remove()
    assert replace_lrn(network) == 0


def test_a_layer_itself_is_replaced() -> None:
    layer = nn.LocalResponseNorm(5)
    assert replace_lrn(layer) == 1
    assert type(layer) is LocalResponseNorm


def test_the_example_computes_and_trains_as_with_the_layers_of_torch() -> None:
    torch.manual_seed(0)
    plain = googlenet_lrn.GoogLeNet(classes=2)
    for layer in plain:
        if isinstance(layer, nn.LocalResponseNorm):
            vars(layer).update(STRONG)
    network, exact = copy.deepcopy(plain), copy.deepcopy(plain).double()
    assert replace_lrn(network) == 2
    images, labels = far_from_jumps(exact, 2, 3, 32, 32), torch.arange(2)
    # A rounding of each of ten layers, relative to the norm of its output, forward and again backward.
    bound = 2 * 10 * torch.finfo(torch.float32).eps
    assert max(googlenet_lrn.differences(network, exact, images, labels)) < bound
    weaker = copy.deepcopy(exact)
    for layer in weaker:
        if isinstance(layer, nn.LocalResponseNorm):
            layer.size = 3
    assert min(googlenet_lrn.differences(network, weaker, images, labels)) > 100 * bound  # so it can fail
    images, labels = googlenet_lrn.generated_images(4, 32)
    noisy = images * (1 + NOISE * torch.randn(images.shape))
    ours, theirs, noise = (
        {"losses": torch.tensor(googlenet_lrn.train(copy.deepcopy(model), given, labels, 8))}
        for model, given in ((network, images), (plain, images), (plain, noisy))
    )
    assert_within_noise(ours, theirs, noise, floor=bound)
    assert ours["losses"][-1] < ours["losses"][0]
