"""The plan of an epoch: which images in which order, and how each is cropped, flipped and coloured.

Every loader draws its epochs here, so that all yield the same pixels in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastalex.config import Flip
from fastalex.errors import ConfigError

COLOR_DEVIATION = 0.1  # standard deviation of the factors of colours' principal components: the paper's


@dataclass(frozen=True)
class EpochPlan:
    """The n samples of one rank's epoch, in order.

    Attributes:
        indices: int64 (n,), the image of each sample.
        offsets: int32 (n, 2), top and left of its crop within the resized image, in pixels.
        flips: bool (n,), whether the crop is mirrored.
        colors: float32 (n, 3), what is added to the RGB of every pixel, in units of pixels in 0..1; None for
            nothing.
    """

    indices: Tensor
    offsets: Tensor
    flips: Tensor
    colors: Tensor | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def to(self, device: torch.device) -> EpochPlan:
        """Return the same plan on a device."""
        colors = None if self.colors is None else self.colors.to(device)
        return EpochPlan(self.indices.to(device), self.offsets.to(device), self.flips.to(device), colors)

    def batch(self, number: int, batch_size: int) -> EpochPlan:
        """Return the plan of batch ``number``, from 0; the last batch may be shorter than ``batch_size``."""
        rows = slice(number * batch_size, (number + 1) * batch_size)
        colors = None if self.colors is None else self.colors[rows]
        return EpochPlan(self.indices[rows], self.offsets[rows], self.flips[rows], colors)


def training_samples(num_images: int, *, flip: Flip, batch_size: int, world_size: int = 1) -> int:
    """Return the number of samples per rank of :func:`training_plan`: whole batches, equal on every rank.

    Args:
        num_images: number of images of the split.
        flip: with ``Flip.both`` each image counts twice.
        batch_size: images per batch on each rank.
        world_size: number of ranks.

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
    offset: int | None = None,
    seed: int,
    epoch: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    color_steps: Sequence[Sequence[float]] = (),
) -> EpochPlan:
    """Draw one rank's training epoch.

    Every image occurs once (``Flip.both``: twice, once flipped), in an order that seed and epoch decide, with
    offsets uniform over 0..max_offset, or all the same. Every step has batch_size images on every rank, so
    that losses are comparable and no rank waits for another: the last, incomplete batch is dropped, which
    leaves out other images each epoch. Step i has the same samples, over all ranks, for any number of ranks
    with the same batch_size times world_size.

    Random numbers come from a torch.Generator on ``device``: the same seed gives the same plan on the same
    kind of device, but a CPU and a GPU draw different numbers.

    Args:
        num_images: number of images of the split.
        flip: which samples are mirrored.
        max_offset: largest top or left of a crop, in pixels: resize - crop.
        offset: top and left of every crop, in pixels; None for random ones.
        seed: any integer; seed and epoch together decide the plan.
        epoch: number of the epoch, from 0.
        batch_size: images per batch on each rank.
        rank: this rank, from 0.
        world_size: number of ranks.
        device: where the plan is drawn and stored.
        color_steps: three rows, what is added to RGB for a factor of 1 of each principal component of the
            colours (:func:`fastalex.data.color.steps`); none for ``colors=None``. The factors of a sample
            depend on its image (with ``Flip.both``, on its flip too), the seed and the epoch alone.

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
    if offset is not None:  # after the draw: order and flips are the same with random crops and without
        offsets.fill_(offset)
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
    # Every rank draws the whole epoch and takes every world_size-th sample: disjoint, without communication.
    rows = slice(rank, kept * world_size, world_size)
    colors = None
    if len(color_steps):
        # A generator of its own: the other draws are the same with colours and without.
        of_colors = torch.Generator(device).manual_seed(mix(mix(seed, epoch), 1))
        factors = COLOR_DEVIATION * torch.randn((samples, 3), generator=of_colors, device=device)
        a1, a2, a3 = factors[order[rows], :, None].unbind(1)
        steps = torch.tensor(color_steps, dtype=torch.float32, device=device)
        # Not a matrix product, which a GPU may round to TF32.
        colors = a1 * steps[0] + a2 * steps[1] + a3 * steps[2]
    return EpochPlan(indices[rows].contiguous(), offsets[rows].contiguous(), flips[rows].contiguous(), colors)


def evaluation_plan(num_images: int, *, rank: int = 0, world_size: int = 1) -> Tensor:
    """Return the images that this rank evaluates, int64 (n,): over all ranks each image once, no padding.

    Numbers of images, and so of batches, may differ by one between ranks: counts can be summed over the ranks
    only at the end.

    Args:
        num_images: number of images of the split.
        rank: this rank, from 0.
        world_size: number of ranks.
    """
    return torch.arange(num_images)[rank::world_size]


def center_offset(resize: int, crop: int) -> int:
    """Return top and left of the centre crop, in pixels, rounded half to even as torchvision rounds it.

    Args:
        resize: side of the resized image, in pixels.
        crop: side of the crop, in pixels.
    """
    return round((resize - crop) / 2)


def mix(seed: int, epoch: int) -> int:
    """Return a generator seed for a pair of numbers; similar pairs give unrelated seeds.

    Args:
        seed: any integer; taken modulo 2**64.
        epoch: an integer from 0 to 2**64 - 1, such as an epoch or a rank.
    """
    return int(np.random.SeedSequence((seed % 2**64, epoch)).generate_state(1, np.uint64)[0] >> 1)
