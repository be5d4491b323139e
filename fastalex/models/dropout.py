"""Dropout whose random numbers cost less on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Dropout(nn.Dropout):
    """``nn.Dropout``, but on a CPU one random number of 64 bits decides over four units.

    PyTorch draws one for each unit, which takes longer than everything else that dropout does. The numbers
    come from the same generator, but other units are dropped than by ``nn.Dropout`` from the same seed. A
    unit is dropped with probability ``p``, rounded to a multiple of 1/65,536 below 1. Compiled code and other
    devices use PyTorch's dropout.
    """

    def forward(self, input: Tensor) -> Tensor:
        is_plain = torch.compiler.is_compiling() or not input.is_cpu
        if is_plain or not self.training or self.p in (0, 1):
            return super().forward(input)
        dropped = min(round(self.p * 2**16), 2**16 - 1)  # of the 65,536 numbers that 16 bits stand for
        words = torch.empty((input.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        numbers = words.view(torch.int16)[: input.numel()].view(input.shape)
        scale = 2**16 / (2**16 - dropped)
        return input * (numbers >= dropped - 2**15).to(input.dtype).mul_(scale)
