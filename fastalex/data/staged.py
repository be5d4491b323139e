"""A resolution schedule: another loader for each part of the run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

from torch import Tensor

from fastalex.crops import Crops
from fastalex.data.loader import Loader


class StagedLoader:
    """Yields from one of several loaders, whichever the epoch belongs to.

    Args:
        loaders: in order, each over the same samples and in batches of the same size.
        epochs: of each loader but the last, which takes all epochs after those.
    """

    def __init__(self, loaders: Sequence[Loader], epochs: Sequence[int]) -> None:
        self._loaders = list(loaders)
        self._ends = list(accumulate(epochs))
        self._current = self._loaders[0]
        self.num_samples = self._current.num_samples

    def __len__(self) -> int:
        return len(self._current)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        self._current = self._loaders[sum(epoch >= end for end in self._ends)]
        self._current.set_epoch(epoch, start_batch)

    def __iter__(self) -> Iterator[tuple[Tensor | Crops, Tensor]]:
        return iter(self._current)
