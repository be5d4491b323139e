"""Muon for the convolutions: momentum whose singular values are made nearly equal.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024. A step of SGD is almost all
along the few directions in which the gradient is largest. Muon steps about equally far along all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastalex.distributed.processes import ALONE, World
from fastalex.models.factored_linear import FactoredLinear
from fastalex.training.factored_sgd import FactoredSGD

MOMENTUM = 0.95

# Jordan's polynomial a*x + b*x^3 + c*x^5. Applied five times, it maps singular values between 0.01 and 1 to
# values between 0.68 and 1.14.
POLYNOMIAL = (3.4445, -4.7750, 2.0315)

# The five applications, in blocks that each begin with a new Gram matrix. Rounding makes some of its smallest
# eigenvalues negative, and each application multiplies those by a^2 = 12: after five in bf16, they would be
# large.
BLOCKS = (2, 3)


class Muon(FactoredSGD):
    """Muon for the weights of convolutions, and :class:`FactoredSGD` for all other parameters.

    A weight ``(out, in, H, W)`` is taken as a matrix ``(out, in * H * W)``, or as one for each group of
    channels.

    Args:
        groups: parameter groups, as for :class:`FactoredSGD`, without the convolutions' weights.
        layers: the layers that may leave their gradients as factors.
        convolutions: the convolutions.
        lr: learning rate of the other parameters.
        muon_lr: learning rate of the convolutions: about the spectral norm of a step of a matrix that has no
            more rows than columns.
        momentum: as for :class:`FactoredSGD`, of the other parameters; that of the convolutions is
            :data:`MOMENTUM`, in Nesterov's form.
        weight_decay: as for :class:`FactoredSGD`, of the other parameters.
        muon_weight_decay: that of the convolutions, decoupled (Loshchilov and Hutter, 2019): a step first
            takes this multiple of ``muon_lr`` off a weight.
        dtype: dtype of the matrix products. With fp32 they are in the dtype of the weights, at least fp32.
        world: the ranks that take this step. Each orthogonalises some of the matrices and sends them to the
            others.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        layers: Sequence[FactoredLinear],
        convolutions: Sequence[nn.Conv2d],
        *,
        lr: float,
        muon_lr: float,
        momentum: float,
        weight_decay: float,
        muon_weight_decay: float,
        dtype: torch.dtype = torch.float32,
        world: World = ALONE,
    ) -> None:
        weights = [layer.weight for layer in convolutions]
        # "fused" is for SGD's kernel, which finds no gradients in this group.
        own = {"lr": muon_lr, "momentum": MOMENTUM, "weight_decay": muon_weight_decay, "fused": True}
        super().__init__(
            [*groups, {"params": weights, **own}], layers, lr=lr, momentum=momentum, weight_decay=weight_decay
        )
        self._convolutions = convolutions
        self._dtype = dtype
        self._world = world

    def __getstate__(self) -> dict[str, Any]:
        own = {"_convolutions": self._convolutions, "_dtype": self._dtype, "_world": self._world}
        return {**super().__getstate__(), **own}

    def _step_apart(self, loss_scale: Tensor | None, skip: Tensor | None) -> None:
        super()._step_apart(loss_scale, skip)
        group = self.param_groups[-1]
        trained = [layer for layer in self._convolutions if layer.weight.grad is not None]
        directions = [self._direction(layer, group["momentum"], loss_scale, skip) for layer in trained]
        dtype = group["params"][0].dtype if self._dtype == torch.float32 else self._dtype
        # Each rank computes some of them. Computed by all, they would differ where ranks round differently.
        for number, direction in enumerate(directions):
            if number % self._world.size == self._world.rank:
                direction.copy_(orthogonalized(direction, dtype))
        for number, direction in enumerate(directions):
            self._world.copy_from(number % self._world.size, direction)
        rate = group["lr"]
        for layer, direction in zip(trained, directions, strict=True):
            out, within, height, width = layer.weight.shape
            update = direction.view(out, height, width, within).permute(0, 3, 1, 2)
            # A matrix of more rows than columns has columns of a norm above 1: each output changes as much.
            scale = max(1.0, direction.shape[-2] / direction.shape[-1]) ** 0.5
            # The rate is a factor by itself, so that a rate in a tensor gives the same bits.
            change = (update * scale + layer.weight * group["weight_decay"]) * rate
            layer.weight.sub_(change if skip is None else change * (1 - skip))
            layer.weight.grad = None  # so that SGD leaves it as it is

    def _direction(
        self, layer: nn.Conv2d, momentum: float, loss_scale: Tensor | None, skip: Tensor | None
    ) -> Tensor:
        """Update the momentum; return Nesterov's direction, ``(groups, out / groups, columns)``."""
        gradient = layer.weight.grad
        velocity = self._velocity(layer.weight, momentum)
        assert gradient is not None
        assert velocity is not None
        if loss_scale is not None:
            gradient = gradient / loss_scale
        if skip is not None:
            gradient = torch.where(skip == 0, gradient, velocity)  # with which the velocity stays as it is
        velocity.lerp_(gradient, 1 - momentum)
        direction = gradient.lerp(velocity, momentum)
        # The order of the columns means nothing here. This one is that of channels-last memory.
        return direction.permute(0, 2, 3, 1).reshape(layer.groups, len(direction) // layer.groups, -1)


def orthogonalized(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Return matrices with the same singular vectors, whose singular values are nearly 1.

    They are between 0.68 and 1.14 where they were at least 0.01 of the matrix's Frobenius norm, and smaller
    where they were less.

    Args:
        matrices: ``(..., m, n)``, fp32 or float64.
        dtype: dtype of the products.

    Returns:
        As ``matrices``, in ``dtype``.
    """
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.reshape(-1, *matrices.shape[-2:])  # for baddbmm
    x = x.mT if is_tall else x
    x = (x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)).to(dtype)
    # An application is p @ x, where p is a polynomial of x @ x.mT. As polynomials of one matrix, those of a
    # block commute, and the next Gram matrix is p @ gram @ p: only the block's last product is as wide as x.
    for count in BLOCKS:
        gram = x @ x.mT
        factor = step = _polynomial(gram)
        for _ in range(count - 1):
            gram = step @ gram @ step
            step = _polynomial(gram)
            factor = step @ factor
        x = factor @ x
    return (x.mT if is_tall else x).reshape(matrices.shape)


def _polynomial(gram: Tensor) -> Tensor:
    """Return p for Gram matrices: one application multiplies x by it."""
    a, b, c = POLYNOMIAL
    polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
    return polynomial
