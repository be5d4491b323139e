"""Tensors as kernels see them: dense (N, ..., C), which is the memory order of channels-last."""

from __future__ import annotations

import torch
from torch import Tensor


def pixels(x: Tensor) -> Tensor:
    """`x`, (N, C, ...), as dense (N, ..., C): a view if it is channels-last, else a copy."""
    return x.movedim(1, -1).contiguous()


def empty_pixels(out: Tensor) -> Tensor:
    """Where a kernel writes `out`, as dense (N, ..., C): `out` itself if channels-last, else a buffer."""
    view = out.movedim(1, -1)
    return view if view.is_contiguous() else torch.empty(view.shape, dtype=out.dtype, device=out.device)


def finish(out: Tensor, written: Tensor) -> Tensor:
    """`out`, after a kernel has written `written`, its `empty_pixels`."""
    return out if written.data_ptr() == out.data_ptr() else out.copy_(written.movedim(-1, 1))
