"""What an epoch consists of: which images, where each is cut and whether it is mirrored.

Every loader draws its epoch here, so that all give the same pixels in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastalex.config import Flip
from fastalex.errors import ConfigError


@dataclass(frozen=True)
class EpochPlan:
    """The samples of one rank's epoch, in order: row i says how the i-th is made.

    Attributes:
        indices: int64 (n,), the image.
        offsets: int32 (n, 2), the top and left of the crop within the resized image, in pixels.
        flips: bool (n,), whether the crop is mirrored.
    """

    indices: Tensor
    offsets: Tensor
    flips: Tensor

    def __len__(self) -> int:
        return len(self.indices)

    def to(self, device: torch.device) -> EpochPlan:
        """The same rows on a device."""
        return EpochPlan(self.indices.to(device), self.offsets.to(device), self.flips.to(device))

    def batch(self, number: int, batch_size: int) -> EpochPlan:
        """The rows of one batch; the last may be short."""
        rows = slice(number * batch_size, (number + 1) * batch_size)
        return EpochPlan(self.indices[rows], self.offsets[rows], self.flips[rows])


def training_samples(num_images: int, *, flip: Flip, batch_size: int, world_size: int = 1) -> int:
    """How many samples :func:`training_plan` gives each rank: whole batches, the same number on every rank.

    Raises:
        ConfigError: there are too few images for one batch on each rank.
    """
    samples = num_images * (2 if flip is Flip.both else 1)
    batches = samples // (batch_size * world_size)
    if batches == 0:
        raise ConfigError(
            f"train.batch_size={batch_size * world_size} is more than the {samples} training samples of an "
            f"epoch; use train.batch_size={max(1, samples // world_size) * world_size} or less"
        )
    return batches * batch_size


def training_plan(
    num_images: int,
    *,
    flip: Flip,
    max_offset: int,
    seed: int,
    epoch: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
) -> EpochPlan:
    """Draws one rank's training epoch.

    Every image comes once (``Flip.both``: twice, once each way), in an order that seed and epoch decide,
    with offsets uniform over 0..max_offset. Every step has batch_size images on every rank, so that its loss
    means the same and no rank waits for another: the last, incomplete batch is dropped, other images each
    epoch. Step i of all ranks together takes the same samples whatever the number of ranks, if batch_size
    times world_size is the same.

    The numbers come from a torch.Generator on ``device``: the same seed gives the same plan on the same kind
    of device (a CPU and a GPU draw different numbers).

    Raises:
        ConfigError: there are too few images for one batch on each rank.
    """
    kept = training_samples(num_images, flip=flip, batch_size=batch_size, world_size=world_size)
    samples = num_images * (2 if flip is Flip.both else 1)
    generator = torch.Generator(device).manual_seed(mix(seed, epoch))
    order = torch.randperm(samples, generator=generator, device=device)
    offsets = torch.randint(
        max_offset + 1, (samples, 2), generator=generator, device=device, dtype=torch.int32
    )
    if flip is Flip.both:
        indices, flips = order // 2, order % 2 == 1
    elif flip is Flip.alternate:
        first = torch.Generator(device).manual_seed(mix(seed, -1 % 2**64))  # the same in every epoch
        mirrored = torch.randint(2, (samples,), generator=first, device=device)
        indices, flips = order, (mirrored[order] + epoch) % 2 == 1
    elif flip is Flip.random:
        indices, flips = order, torch.randint(2, (samples,), generator=generator, device=device).bool()
    else:
        indices, flips = order, torch.zeros(samples, dtype=torch.bool, device=device)
    # All ranks draw the whole epoch and take turns at it: disjoint, with nothing to communicate.
    rows = slice(rank, kept * world_size, world_size)
    return EpochPlan(indices[rows].contiguous(), offsets[rows].contiguous(), flips[rows].contiguous())


def evaluation_plan(num_images: int, *, rank: int = 0, world_size: int = 1) -> Tensor:
    """The images that this rank evaluates, int64 (n,): over all ranks each image once, with no padding.

    Ranks may differ by one image, so their numbers of batches may too: sum counts over ranks at the end only.
    """
    return torch.arange(num_images)[rank::world_size]


def center_offset(resize: int, crop: int) -> int:
    """Top and left of the centre crop, rounded as torchvision's ``center_crop`` does (half to even)."""
    return round((resize - crop) / 2)


def mix(seed: int, epoch: int) -> int:
    """A generator seed from both numbers, such that (seed, epoch + 1) has nothing of (seed + 1, epoch)."""
    return int(np.random.SeedSequence((seed % 2**64, epoch)).generate_state(1, np.uint64)[0] >> 1)
