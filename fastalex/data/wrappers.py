"""Loaders around other loaders: one for each stage of a run, CutMix, and epochs of a given length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from fastalex.data.loader import Loader
from fastalex.kernels import LazyBatch


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

    def __iter__(self) -> Iterator[tuple[Tensor | LazyBatch, Tensor]]:
        return iter(self._current)


class CutMixLoader:
    """Yields another loader's batches, some of them mixed by torchvision's ``CutMix`` (Yun et al., 2019).

    The rectangle is the same in all images of a batch; its share of them is uniform over 0..1 before it is
    cut off at the border. Labels of a mixed batch are float32 (B, classes): the share of each in the image.
    The draws are from torch's global generator of the CPU, as dropout's are there.

    Args:
        loader: of training batches; one that is to be mixed is made, if it was not.
        classes: of the data set.
        share: the probability that a batch is mixed.
    """

    def __init__(self, loader: Loader, classes: int, share: float) -> None:
        from torchvision.transforms.v2 import CutMix  # a second, which reading data need not take

        self._loader = loader
        self._mix = CutMix(num_classes=classes)
        self._share = share
        self.num_samples = loader.num_samples

    def __len__(self) -> int:
        return len(self._loader)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        self._loader.set_epoch(epoch, start_batch)

    def __iter__(self) -> Iterator[tuple[Tensor | LazyBatch, Tensor]]:
        for images, labels in self._loader:
            if torch.rand(()) < self._share:
                yield self._mix(images.materialize() if isinstance(images, LazyBatch) else images, labels)
            else:
                yield images, labels


class FirstBatches:
    """Yields epochs of ``count`` batches from another loader, across its own epochs where one is too short.

    Args:
        loader: that the batches come from.
        count: batches an epoch; may be changed between epochs.
    """

    def __init__(self, loader: Loader, count: int) -> None:
        self._loader = loader
        self.count = count
        self.num_samples = count * loader.num_samples // len(loader)

    def __len__(self) -> int:
        return self.count

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        self._loader.set_epoch(epoch, start_batch)

    def __iter__(self) -> Iterator[tuple[Tensor | LazyBatch, Tensor]]:
        left, epoch = self.count, 0
        while left:
            for batch in self._loader:
                yield batch
                left -= 1
                if not left:
                    return
            epoch += 1
            self._loader.set_epoch(epoch)
