"""A loader of batches in memory."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor


class Listed:
    """The base class of loaders whose epochs are the same batches in the same order.

    Attributes:
        batches: images and labels of each; a subclass sets it.
    """

    batches: list[tuple[Tensor, Tensor]]

    @property
    def num_samples(self) -> int:
        """Number of images of an epoch."""
        return sum(len(labels) for _, labels in self.batches)

    def __len__(self) -> int:
        return len(self.batches)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Do nothing: all epochs are alike."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.batches)
