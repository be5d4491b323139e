"""CutMix: the pixels and labels of mixed batches, and how often batches are mixed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fastalex.config import DataConfig, Flip, LoaderConfig
from fastalex.data import CutMixLoader, ImageSet, Views, load_splits
from fastalex.kernels import LazyBatch
from tests.runtimes import Folding, loader_on

CLASSES = 10
DATA = DataConfig("digits", resize=20, crop=16, flip=Flip.alternate)


def loader(batch_size: int = 64, fold: bool = False, images: ImageSet | None = None, data: DataConfig = DATA):
    return loader_on(
        images or load_splits(DATA, 0).train,
        data,
        LoaderConfig("resident"),
        views=Views.random,
        batch_size=batch_size,
        network=Folding() if fold else None,
    )


def mixed(share: float, batch_size: int = 64) -> CutMixLoader:
    torch.manual_seed(0)
    return CutMixLoader(loader(batch_size), CLASSES, share)


def test_each_image_has_a_rectangle_of_another_and_labels_are_fractions_of_the_area() -> None:
    classes = np.arange(CLASSES)
    pixels = np.broadcast_to(classes[:, None, None, None], (CLASSES, 16, 16, 3)).astype(np.uint8)
    levels = DataConfig("flat", resize=16, crop=16, flip=Flip.none, mean=[0.0] * 3, std=[1 / 255] * 3)
    plain = loader(CLASSES, images=ImageSet(classes, pixels), data=levels)
    cut = CutMixLoader(plain, CLASSES, 1.0)
    torch.manual_seed(0)
    areas = []
    for epoch in range(50):
        cut.set_epoch(epoch)
        ((images, labels),), ((_, own),) = cut, plain
        colours = images.round().long()
        seen = F.one_hot(colours[:, 0], CLASSES).double().mean(dim=(1, 2))
        torch.testing.assert_close(labels.double(), seen, rtol=0, atol=1e-6)
        for colour, image in zip(own, colours, strict=True):
            pasted = image != colour
            assert len(image[pasted].unique()) <= 1
            sides = [int(pasted.any(dim=axis).sum()) for axis in ((0, 1), (0, 2))]
            assert pasted.sum() == 3 * sides[0] * sides[1]
        areas.append(1 - seen[range(CLASSES), own].mean())
    assert torch.stack(areas).std() > 0.05  # rectangles of many sizes


@pytest.mark.parametrize(("share", "low", "high"), [(0.25, 0.15, 0.35), (0.75, 0.65, 0.85)])
def test_the_requested_share_of_the_batches_is_mixed(share: float, low: float, high: float) -> None:
    epoch = mixed(share, batch_size=5)
    batches = list(epoch)
    assert len(batches) == len(epoch) > 200
    found = [labels.dim() == 2 for _, labels in batches]
    assert low < sum(found) / len(found) < high
    whole = loader(batch_size=5)
    for (images, labels), (others, classes) in zip(batches, whole, strict=True):
        assert images.is_contiguous(memory_format=torch.channels_last)
        if labels.dim() == 1:
            assert torch.equal(images, others)
            assert torch.equal(labels, classes)


def test_it_yields_the_chosen_epoch() -> None:
    epoch, plain = mixed(1.0), loader()
    assert epoch.num_samples == plain.num_samples
    for each in (epoch, plain):
        each.set_epoch(3, start_batch=2)
    assert len(list(epoch)) == len(plain) - 2
    images, _ = next(iter(epoch))
    others, _ = next(iter(plain))
    corners = (images == others).all(dim=1)[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.any(dim=1).all()


def test_only_mixed_batches_are_materialized() -> None:
    data = replace(DATA, resize=8 * Folding.stride_over_crops)  # a multiple, so that batches are lazy
    torch.manual_seed(0)
    folded = list(CutMixLoader(loader(fold=True, data=data), CLASSES, 0.5))
    torch.manual_seed(0)
    plain = CutMixLoader(loader(data=data), CLASSES, 0.5)
    for (images, labels), (others, classes) in zip(folded, plain, strict=True):
        assert isinstance(images, LazyBatch) == (labels.dim() == 1)
        torch.testing.assert_close(images.materialize() if isinstance(images, LazyBatch) else images, others)
        assert torch.equal(labels, classes)
    assert len({labels.dim() for _, labels in folded}) == 2
