"""The cost of training steps: samples, FLOPs and wall time, apart from warm-up."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor
from torch.profiler import record_function

from fastalex.data import Loader
from fastalex.kernels import LazyBatch

# Steps at each new batch shape that throughput leaves out: they compile kernels and allocate memory.
WARMUP_STEPS = 3


@dataclass
class Spent:
    """The cost of training steps. All but ``warmup`` leave out warm-up steps.

    Attributes:
        images: number of training samples.
        flops: forward and backward FLOPs of convolutions and matrix products.
        waited: seconds spent waiting for the loader.
        seconds: wall time, in seconds.
        warmup: wall time of the warm-up steps, in seconds.
    """

    images: int = 0
    flops: int = 0
    waited: float = 0.0
    seconds: float = 0.0
    warmup: float = 0.0

    def __add__(self, other: Spent) -> Spent:
        return Spent(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


class Clock:
    """Measures the wall time of an epoch's training steps in this process, and the part spent on input."""

    def __init__(self) -> None:
        self._made = time.perf_counter()
        self._stopped: float | None = None
        self.restart()

    def restart(self) -> None:
        """Discard the counts so far: all steps until now were warm-up."""
        self._images = self._flops = 0
        self._waited = 0.0
        self._began = time.perf_counter()

    def timing(self, loader: Loader) -> Iterator[tuple[Tensor | LazyBatch, Tensor]]:
        """Yield a loader's batches, and time the wait for each."""
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
        """Count a finished step.

        Args:
            images: samples in its batch, over all ranks.
            flops: FLOPs of the step, over all ranks.
        """
        self._images += images
        self._flops += flops

    def stop(self) -> None:
        """Stop measuring steps, but not :attr:`age`."""
        self._stopped = time.perf_counter()

    @property
    def age(self) -> float:
        """Seconds since the clock was created, whether stopped or not."""
        return time.perf_counter() - self._made

    @property
    def spent(self) -> Spent:
        """The cost of the steps until now, or until the clock was stopped."""
        if not self._images:  # warm-up only
            return Spent(warmup=self._began - self._made)
        seconds = (self._stopped or time.perf_counter()) - self._began
        return Spent(self._images, self._flops, self._waited, seconds, self._began - self._made)
