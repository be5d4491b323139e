"""CutMix: in a share of the batches each image has a rectangle of another in it, and the label of both."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastalex.crops import Crops
from fastalex.data.loader import Loader


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

    def __iter__(self) -> Iterator[tuple[Tensor | Crops, Tensor]]:
        for images, labels in self._loader:
            if torch.rand(()) < self._share:
                yield self._mix(images.make() if isinstance(images, Crops) else images, labels)
            else:
                yield images, labels
