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
        trained = [layer for layer in self._convolutions if layer.weight.grad is not None]
        if trained:
            self._step_convolutions(trained, loss_scale, skip)
            for layer in trained:
                layer.weight.grad = None  # so that SGD leaves it as it is

    def _step_convolutions(
        self, layers: Sequence[nn.Conv2d], loss_scale: Tensor | None, skip: Tensor | None
    ) -> None:
        group = self.param_groups[-1]
        weights = [layer.weight for layer in layers]
        directions = self._directions(layers, group["momentum"], loss_scale, skip)
        dtype = group["params"][0].dtype if self._dtype == torch.float32 else self._dtype
        # Each rank computes some of them. Computed by all, they would differ where ranks round differently.
        own = directions[self._world.rank :: self._world.size]
        if own:
            torch._foreach_copy_(own, orthogonalized(own, dtype))
        for number, direction in enumerate(directions):
            self._world.copy_from(number % self._world.size, direction)
        changes = [
            direction.view(len(weight), *weight.shape[2:], -1).permute(0, 3, 1, 2)
            for direction, weight in zip(directions, weights, strict=True)
        ]
        # A matrix of more rows than columns has columns of a norm above 1: each output changes as much.
        scales = [max(1.0, direction.shape[1] / direction.shape[2]) ** 0.5 for direction in directions]
        torch._foreach_mul_(changes, scales)
        torch._foreach_add_(changes, weights, alpha=group["weight_decay"])
        # The rate is a factor by itself, so that a rate in a tensor gives the same bits.
        torch._foreach_mul_(changes, group["lr"])
        if skip is not None:
            torch._foreach_mul_(changes, 1 - skip)
        torch._foreach_sub_(weights, changes)

    def _directions(
        self,
        layers: Sequence[nn.Conv2d],
        momentum: float,
        loss_scale: Tensor | None,
        skip: Tensor | None,
    ) -> list[Tensor]:
        """Update the momenta; return Nesterov's directions, each ``(groups, out / groups, columns)``."""
        gradients, velocities = [], []
        for layer in layers:
            gradient, velocity = layer.weight.grad, self._velocity(layer.weight, momentum)
            assert gradient is not None
            assert velocity is not None
            gradients.append(gradient)
            velocities.append(velocity)
        if loss_scale is not None:
            gradients = list(torch._foreach_div(gradients, loss_scale))
        if skip is not None:  # with the velocity as the gradient it stays as it is
            gradients = [torch.where(skip == 0, *pair) for pair in zip(gradients, velocities, strict=True)]
        torch._foreach_lerp_(velocities, gradients, 1 - momentum)
        directions = torch._foreach_lerp(gradients, velocities, momentum)
        # The order of the columns means nothing here. This one is that of channels-last memory.
        return [
            direction.permute(0, 2, 3, 1).reshape(layer.groups, len(direction) // layer.groups, -1)
            for layer, direction in zip(layers, directions, strict=True)
        ]


def orthogonalized(stacks: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return matrices with the same singular vectors, whose singular values are nearly 1.

    They are between 0.68 and 1.14 where they were at least 0.01 of the matrix's Frobenius norm, and smaller
    where they were less.

    Args:
        stacks: each ``(k, m, n)``, fp32 or float64, of any size.
        dtype: dtype of the products.

    Returns:
        As ``stacks``, in ``dtype``.
    """
    by_size: dict[int, list[int]] = {}
    for number, stack in enumerate(stacks):
        by_size.setdefault(min(stack.shape[1:]), []).append(number)
    found = list(stacks)
    for numbers in by_size.values():
        results = _of_one_size([stacks[number] for number in numbers], dtype)
        for number, result in zip(numbers, results, strict=True):
            found[number] = result
    return found


def _of_one_size(stacks: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """:func:`orthogonalized` of matrices whose Gram matrices have one size: a GPU starts fewer products."""
    are_tall = [stack.shape[1] > stack.shape[2] for stack in stacks]
    xs = [stack.mT if is_tall else stack for stack, is_tall in zip(stacks, are_tall, strict=True)]
    xs = [(x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)).to(dtype) for x in xs]
    # An application is (a + q) @ x, where q is a polynomial of x @ x.mT. As polynomials of one matrix, those
    # of a block commute, and the next Gram matrix is (a + q) @ gram @ (a + q): only the block's last product
    # is as wide as x.
    a = POLYNOMIAL[0]
    for count in BLOCKS:
        gram = torch.cat([x @ x.mT for x in xs])
        q = _without_a(gram)
        block = q.clone()
        block.diagonal(dim1=-2, dim2=-1).add_(a)
        for _ in range(count - 1):
            half = torch.baddbmm(gram, q, gram, beta=a)
            gram = torch.baddbmm(half, half, q, beta=a)
            q = _without_a(gram)
            block = torch.baddbmm(block, q, block, beta=a)
        xs = [part @ x for part, x in zip(block.split([len(x) for x in xs]), xs, strict=True)]
    return [x.mT if is_tall else x for x, is_tall in zip(xs, are_tall, strict=True)]


def _without_a(gram: Tensor) -> Tensor:
    """Return q for Gram matrices: one application multiplies x by a + q."""
    _, b, c = POLYNOMIAL
    return torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
