"""What training steps take: samples, arithmetic, and wall time without the warm-up."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor
from torch.profiler import record_function

from fastalex.data import Loader
from fastalex.kernels import LazyBatch

# Left out of the throughput, at each new shape of batch: kernels are compiled and memory is claimed in them.
WARMUP_STEPS = 3


@dataclass
class Spent:
    """What training steps took.

    Attributes:
        images: training samples, as the next three without those of the warm-up.
        flops: of the convolutions and matrix products, forward and backward.
        waited: seconds in waiting for the loader.
        seconds: of wall time.
        warmup: seconds of the steps that compile kernels and claim memory.
    """

    images: int = 0
    flops: int = 0
    waited: float = 0.0
    seconds: float = 0.0
    warmup: float = 0.0

    def __add__(self, other: Spent) -> Spent:
        return Spent(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


class Clock:
    """The wall time of an epoch's training steps in this process, and the part of it spent on input."""

    def __init__(self) -> None:
        self._made = time.perf_counter()
        self._stopped: float | None = None
        self.restart()

    def restart(self) -> None:
        """Forget what was counted; the warm-up has only now ended."""
        self._images = self._flops = 0
        self._waited = 0.0
        self._began = time.perf_counter()

    def timing(self, loader: Loader) -> Iterator[tuple[Tensor | LazyBatch, Tensor]]:
        """Yield a loader's batches."""
        batches = iter(loader)
        while True:
            asked = time.perf_counter()
            with record_function("input"):
                batch = next(batches, None)
            self._waited += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def count(self, images: int, flops: int) -> None:
        """Count a batch that was trained on."""
        self._images += images
        self._flops += flops

    def stop(self) -> None:
        self._stopped = time.perf_counter()

    @property
    def age(self) -> float:
        """Seconds since it was made, whether it has been stopped or not."""
        return time.perf_counter() - self._made

    @property
    def spent(self) -> Spent:
        """What the steps took, up to now or to where it was stopped."""
        if not self._images:  # nothing but warm-up so far
            return Spent(warmup=self._began - self._made)
        seconds = (self._stopped or time.perf_counter()) - self._began
        return Spent(self._images, self._flops, self._waited, seconds, self._began - self._made)
