"""Times of the two passes through a differentiable operator on the CPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def seconds_by_pass(
    forward: Callable[[], Tensor], inputs: Sequence[Tensor], grad: Tensor
) -> dict[str, float]:
    """Of a forward pass, a backward pass from `grad` to `inputs`, and the two together."""
    start = time.perf_counter()
    result = forward()
    middle = time.perf_counter()
    torch.autograd.grad(result, inputs, grad)
    end = time.perf_counter()
    return {"forward": middle - start, "backward": end - middle, "forward + backward": end - start}
