"""SGD that takes gradients as factors where layers keep them so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastalex.kernels.factored_sgd import factored_sgd
from fastalex.models.factored_linear import FactoredLinear


class FactoredSGD(torch.optim.SGD):
    """Fused SGD that also applies gradients which layers keep as factors.

    Args:
        groups: parameter groups, as :class:`torch.optim.SGD` takes them, each with ``fused``.
        layers: the layers that may leave their gradients as factors.
        lr: learning rate, a factor of the whole step.
        momentum: fraction of the last step's velocity that the next one keeps, 0 to 1; 0 keeps no velocity.
        weight_decay: multiple of the weight that is added to its gradient.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        layers: Sequence[FactoredLinear],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
    ) -> None:
        super().__init__(groups, lr=lr, momentum=momentum, weight_decay=weight_decay)
        # PyTorch sets this only if `fused` is given for all groups at once. With it, GradScaler passes the
        # kernel a flag on the device for overflow; without it, the host waits for that flag in each step.
        self._step_supports_amp_scaling = all(group["fused"] for group in self.param_groups)
        self._layers = layers
        # Allocate the momentum now: in the first step it would lie among activations and fragment memory.
        # Allocate it for all parameters, since PyTorch's fused step needs all buffers or none.
        for group in self.param_groups:
            for parameter in group["params"] if group["fused"] else ():
                self._velocity(parameter, group["momentum"])

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_layers": self._layers}

    def _velocity(self, weight: Tensor, momentum: float) -> Tensor | None:
        """Return the weight's momentum buffer, created as zeros; None without momentum."""
        if not momentum:
            return None
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        buffer: Tensor = state["momentum_buffer"]
        return buffer

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update each parameter from its ``grad``, and weights of layers with factors from those.

        Args:
            closure: recomputes the loss, as in :meth:`torch.optim.SGD.step`.

        Returns:
            The closure's loss; None without a closure.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # A gradient scaler sets these for the step: the factor of the loss, unless the gradients have been
        # divided by it, and whether a gradient is infinite or NaN, in which case nothing may change.
        self._step_apart(getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        super().step()
        return loss

    def _step_apart(self, loss_scale: Tensor | None, skip: Tensor | None) -> None:
        """Update what PyTorch's SGD is not to update: it leaves parameters without ``grad`` as they are.

        Args:
            loss_scale: what the gradients have to be divided by, fp32 ``()``; None means 1.
            skip: fp32 ``()``; nothing may change where it is not 0. None means 0.
        """
        groups = {parameter: group for group in self.param_groups for parameter in group["params"]}
        for layer in self._layers:
            gradient = layer.gradient
            if gradient is None:
                continue
            group = groups[layer.weight]
            scale = gradient.scale
            if loss_scale is not None:
                scale = loss_scale.reciprocal() if scale is None else scale / loss_scale
            factored_sgd(
                layer.weight,
                self._velocity(layer.weight, group["momentum"]),
                gradient.output,
                gradient.input,
                rate=_rate(group["lr"], layer.weight.device),
                momentum=group["momentum"],
                weight_decay=group["weight_decay"],
                pooling=gradient.pooling,
                scale=scale,
                skip=skip,
                copy=layer.copy,
            )
            if layer.copy is not None:
                layer.mark_copied()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, and those that layers keep as factors."""
        super().zero_grad(set_to_none)
        for layer in self._layers:
            layer.parts.clear()


def _rate(rate: float | Tensor, device: torch.device) -> Tensor:
    """Return a learning rate as a tensor ``()``, in fp64 on a CPU, which reads it back."""
    if isinstance(rate, Tensor):
        return rate
    return torch.full((), rate, dtype=torch.float64 if device.type == "cpu" else None, device=device)
