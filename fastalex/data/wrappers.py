"""Loaders that wrap other loaders: one loader per stage of a run, CutMix, and epochs of a given length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from fastalex.data.loader import Loader
from fastalex.kernels import LazyBatch


class StagedLoader:
    """A loader for each stage of a run; yields the batches of the loader whose stage the epoch belongs to.

    Epochs are begun in order: the loader of a stage that has passed is freed, and its worker processes end.

    Args:
        loaders: one per stage, in order, over the same samples and with the same batch size.
        epochs: length of each stage but the last, which has no end.
    """

    def __init__(self, loaders: Sequence[Loader], epochs: Sequence[int]) -> None:
        self._loaders = list(loaders)
        self._ends = list(accumulate(epochs))
        self.num_samples = self._loaders[0].num_samples

    def __len__(self) -> int:
        return len(self._loaders[0])

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        while self._ends and epoch >= self._ends[0]:
            del self._loaders[0], self._ends[0]
        self._loaders[0].set_epoch(epoch, start_batch)

    def __iter__(self) -> Iterator[tuple[Tensor | LazyBatch, Tensor]]:
        return iter(self._loaders[0])


class CutMixLoader:
    """Yields another loader's batches, some of them mixed by torchvision's ``CutMix``.

    Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features", 2019.

    In a mixed batch each image has a rectangle of another one, at the same place in all images. The
    rectangle's fraction of the area is uniform over 0..1 before it is clipped at the border. The labels of a
    mixed batch are float32 (B, classes): each class's fraction of the image's area. Random numbers come from
    torch's global CPU generator, as those of dropout on a CPU do.

    Args:
        loader: the loader of training batches. A lazy batch is materialized if it is mixed.
        classes: number of classes of the data set.
        share: probability that a batch is mixed.
    """

    def __init__(self, loader: Loader, classes: int, share: float) -> None:
        from torchvision.transforms.v2 import CutMix  # takes a second to import

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
    """Yields epochs of ``count`` batches; if another loader's epoch is shorter, its next epochs follow.

    Args:
        loader: the loader that yields the batches.
        count: number of batches per epoch; the attribute may be changed between epochs.
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
