"""Times of an operator's forward and backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.hardware import seconds_of


def seconds_by_pass(
    forward: Callable[[], Tensor], inputs: Sequence[Tensor], grad: Tensor
) -> dict[str, float]:
    """Seconds of a forward pass, a backward pass from `grad` to `inputs`, and both together."""
    ahead, back = seconds_of(forward, lambda result: torch.autograd.grad(result, inputs, grad))
    return {"forward": ahead, "backward": back, "forward + backward": ahead + back}
