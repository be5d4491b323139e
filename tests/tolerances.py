"""Where the bounds of numeric tests come from: no bound is the error that one processor happened to have.

Processors add in different orders, so results of the same arithmetic differ by its rounding. A bound follows
from one of these rules:

* In float64 on both sides, :func:`assert_same_in_float64`: results agree in half of their digits. This is for
  what does not depend on the precision: trainers, optimizers, ranks.
* For a sum of products, :func:`sum_bound`: the longest sum and the magnitudes of its terms bound the error.
* For whole networks, :func:`assert_as_accurate`: plain PyTorch in the same arithmetic errs as much.
* For several training steps, :func:`assert_within_noise`: plain PyTorch differs as much if its images have
  noise of the size of rounding.

The derivative of a network with ReLU and max pooling jumps. Where an activation is zero but for its rounding,
or two pixels of a window are equal but for theirs, the order of sums decides which side of the jump is taken,
and no bound on rounding holds for a gradient. So gradients are compared for images whose activations are all
further from jumps than rounding reaches (:func:`far_from_jumps`), or in float64, where rounding reaches a
hundred-millionth as far.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

SAFETY = 4.0
"""How much larger an error may be than that of plain PyTorch: another order of sums or Winograd's algorithm
costs up to two bits, and a wrong computation errs by more than any factor of a rounding."""

NOISE = 2**-16
"""More than rounding in fp32 does to an activation, in units of its layer's root mean square: in AlexNet the
largest error of 100,000 activations is 4e-6 units, a fourth of this."""

HALF = 2**-26
"""Half of float64's digits, as a relative error. The other half is for what cancellation, and steps that
build on each other, make of a rounding: a factor of 10^8, far from any that a test has."""

Tensors = Mapping[str, Tensor]


def unit_roundoff(dtype: torch.dtype) -> float:
    """Return the largest relative error of one rounding to a dtype."""
    return torch.finfo(dtype).eps / 2


def sum_bound(dtype: torch.dtype, terms: int) -> float:
    """Return the error of a sum, in any order, as a share of the sum of its terms' magnitudes.

    The error of n - 1 additions and of n products: Higham, "Accuracy and Stability of Numerical Algorithms",
    section 3.1.
    """
    rounding = terms * unit_roundoff(dtype)
    return rounding / (1 - rounding)


def usual_sum_error(dtype: torch.dtype, terms: int) -> float:
    """Return the usual error of a sum, as a share of the sum itself, over many sums of terms of both signs.

    Roundings are as often up as down, so n of them err as a random walk does, by sqrt(n): Higham and Mary, "A
    New Approach to Probabilistic Rounding Error Analysis", SIAM J. Sci. Comput. 41 (2019).
    """
    return math.sqrt(terms) * unit_roundoff(dtype)


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Return the norm of an error as a share of the exact tensor's norm."""
    assert found.shape == exact.shape
    return ((found.detach().double() - exact.detach()).norm() / exact.detach().norm()).item()


def joined(tensors: Tensors) -> Tensor:
    """Return the values of all tensors as one vector, whose norm is that of them together."""
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors.values()])


def gradients(network: torch.nn.Module) -> dict[str, Tensor]:
    """Return the gradient of each parameter by its name."""
    found = {name: parameter.grad for name, parameter in network.named_parameters()}
    assert all(gradient is not None for gradient in found.values())
    return found  # type: ignore[return-value]


def assert_near(found: Tensor, expected: Tensor, fraction: float) -> None:
    """Assert that the largest error is at most a fraction of the largest value."""
    assert found.shape == expected.shape
    if found.numel():
        error, largest = (found.detach().double() - expected).abs().max().item(), expected.abs().max().item()
        assert error <= fraction * largest, f"off by {error / largest:.1e}, allowed {fraction:.1e}"


def assert_same_in_float64(found: Tensor, expected: Tensor) -> None:
    """Assert that two float64 computations of the same agree in half of the digits of the largest value."""
    assert found.dtype == expected.dtype == torch.float64
    assert_near(found, expected.detach(), HALF)


def assert_as_accurate(
    ours: Tensors, plain: Sequence[Tensors], exact: Tensors, *, floor: float, factor: float = SAFETY
) -> None:
    """Assert that no tensor has a larger error than plain PyTorch in the same arithmetic.

    Args:
        ours: results by name.
        plain: those of plain PyTorch, in one or more runs that differ only in how they round.
        exact: those of plain PyTorch in float64, nonzero.
        floor: relative error that is allowed even where plain PyTorch errs less, as its order of sums suits
            the case: :func:`usual_sum_error` of the longest sum.
        factor: how much larger our relative error may be than the largest of plain PyTorch.
    """
    assert ours.keys() == exact.keys()
    for name, truth in exact.items():
        theirs = max(relative_error(each[name], truth) for each in plain)
        error = relative_error(ours[name], truth)
        assert error <= factor * theirs + floor, f"{name}: error {error:.1e}, of plain PyTorch {theirs:.1e}"


def assert_within_noise(found: Tensors, expected: Tensors, noisy: Tensors, *, floor: float) -> None:
    """Assert that results of several steps in fp32 differ by no more than rounding explains.

    Rounding moves some activations over a jump of the derivative, and steps build on each other, so by how
    much results may differ depends on the network and its data. Noise on the images moves as many more
    activations over jumps as it is larger than rounding.

    Args:
        found: results by name.
        expected: those of plain PyTorch.
        noisy: those of plain PyTorch from images with relative noise of :data:`NOISE`.
        floor: relative error of what does not depend on the images: :func:`usual_sum_error` of the last sum.
    """
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        error, noise = relative_error(found[name], wanted), relative_error(noisy[name], wanted)
        assert error <= noise + floor, (
            f"{name}: differs by {error:.1e}, plain PyTorch with noise by {noise:.1e}"
        )


class _Jumps(TorchDispatchMode):
    """Finds how close activations come to a jump of the derivative of ReLU or max pooling.

    Attributes:
        distance: the smallest, in units of its tensor's root mean square.
    """

    def __init__(self) -> None:
        super().__init__()
        self.distance = math.inf

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.relu.default, torch.ops.aten.relu_.default):
            self._see(args[0].abs(), args[0])
        elif func is torch.ops.aten.max_pool2d_with_indices.default:
            x, (size, *_), (stride, *_), (padding, *_) = (*args[:3], args[3] if len(args) > 3 else [0])
            windows = F.pad(x, [padding] * 4, value=-math.inf).unfold(2, size, stride).unfold(3, size, stride)
            first, second = windows.flatten(-2).topk(2).values.unbind(-1)
            # Where ReLU has made the whole window zero it does not matter which pixel gets the gradient.
            self._see((first - second)[first != 0], x)
        return func(*args, **(kwargs or {}))

    def _see(self, distances: Tensor, x: Tensor) -> None:
        distances = distances[distances > 0]  # what is exactly equal is the same number, on all processors
        if distances.numel():
            self.distance = min(self.distance, (distances.min() / x.square().mean().sqrt()).item())


def is_far_from_jumps(network: Callable[[Tensor], Any], images: Tensor) -> bool:
    """Return whether rounding in fp32 cannot change a gradient by a jump.

    Args:
        network: of ReLU, max pooling and smooth layers of plain PyTorch, in float64.
        images: to compute the gradient for.
    """
    with torch.no_grad(), _Jumps() as jumps:
        network(images.double())
    return jumps.distance > NOISE


def far_from_jumps(network: Callable[[Tensor], Any], *shape: int, scale: float = 1.0) -> Tensor:
    """Draw fp32 images that are far from jumps (:func:`is_far_from_jumps`), the same on all processors.

    Args:
        network: of ReLU, max pooling and smooth layers of plain PyTorch, in float64.
        shape: of the images.
        scale: the images' standard deviation.
    """
    for seed in range(200):
        images = scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        if is_far_from_jumps(network, images):
            return images
    raise AssertionError(f"no images of {shape} are far from jumps: draw fewer or smaller ones")
