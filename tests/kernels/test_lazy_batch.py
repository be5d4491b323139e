"""Lazy batches give the same results as materialized ones, and only networks that consume them get them."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fastalex.config import Color, DataConfig, Fit, Flip, LoaderConfig
from fastalex.data import ImageSet, Views
from fastalex.data.resident import can_fold
from fastalex.kernels import LazyBatch
from fastalex.models import create_model
from tests.runtimes import Folding, loader_on
from tests.test_models import LONGEST_SUM, narrow, plain_alexnet
from tests.tolerances import assert_as_accurate, gradients, is_far_from_jumps

CPU = torch.device("cpu")
RESIDENT = LoaderConfig("resident")


def images(side: int = 16, count: int = 12) -> ImageSet:
    rng = np.random.default_rng(0)
    return ImageSet(
        rng.integers(0, 10, count), pixels=rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    )


def data(**changes: object) -> DataConfig:
    return DataConfig(**{"name": "synthetic", "resize": 128, "crop": 96, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes", [{}, {"flip": Flip.none}, {"color": Color.pca, "fit": Fit.shorter_side}], ids=str
)
@pytest.mark.parametrize("views", list(Views))
def test_materialized_equals_the_batch_of_the_loader(views: Views, changes: dict[str, Any]) -> None:
    options = {"views": views, "batch_size": 5 if views is not Views.random else 4, "seed": 3}
    materialized = loader_on(images(), data(**changes), RESIDENT, **options)  # type: ignore[arg-type]
    lazy = loader_on(images(), data(**changes), RESIDENT, network=Folding(), **options)  # type: ignore[arg-type]
    count = 0
    for (batch, labels), (lazy_batch, lazy_labels) in zip(materialized, lazy, strict=True):
        assert isinstance(batch, torch.Tensor)
        assert isinstance(lazy_batch, LazyBatch)
        assert lazy_batch.shape == batch.shape
        assert torch.equal(lazy_batch.materialize(), batch)
        assert torch.equal(labels, lazy_labels)
        count += len(labels)
    assert count == 12


def test_gradients_of_lazy_and_materialized_batches_agree() -> None:
    network = narrow()
    exact = narrow().double()
    shifted = data(color=Color.pca, resize=64, crop=63)
    for seed in range(200):
        options = {"views": Views.random, "batch_size": 2, "network": network, "seed": seed}
        batch, labels = next(iter(loader_on(images(), shifted, RESIDENT, **options)))  # type: ignore[arg-type]
        assert isinstance(batch, LazyBatch)
        if is_far_from_jumps(partial(plain_alexnet, exact, norm="lrn", pool=3), batch.materialize()):
            break
    assert batch.colors is not None
    pixels = batch.materialize()
    found = []
    for model, given in ((network, batch), (narrow(), pixels), (exact, pixels.double())):
        F.cross_entropy(model(given), labels).backward()
        found.append(gradients(model))
    ours, plain, truth = found
    assert_as_accurate(ours, [plain], truth, floor=LONGEST_SUM)


@pytest.mark.parametrize("color", list(Color))
def test_chunks_of_a_lazy_batch_are_chunks_of_the_materialized(color: Color) -> None:
    colored = data(color=color)
    loader = loader_on(images(), colored, RESIDENT, views=Views.random, batch_size=12, network=Folding())
    batch, _ = next(iter(loader))
    assert isinstance(batch, LazyBatch)
    assert torch.equal(torch.cat([part.materialize() for part in batch.chunk(3)]), batch.materialize())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"resize": 64, "crop": 64}, True),  # four times
        ({"resize": 96, "crop": 64}, False),  # six times: no multiple of the stride of 4
        ({"resize": 100, "crop": 96}, False),
    ],
)
def test_only_whole_multiples_of_the_stride_are_folded(changes: dict[str, int], expected: bool) -> None:
    network = create_model("alexnet")
    assert can_fold(network, images(), data(**changes), RESIDENT, CPU) is expected


@pytest.mark.parametrize(("fit", "expected"), [(Fit.square, True), (Fit.shorter_side, False)])
def test_an_image_that_keeps_its_shape_is_folded_if_it_is_square(fit: Fit, expected: bool) -> None:
    network = create_model("alexnet")
    wide = ImageSet(np.zeros(1, np.int64), pixels=np.zeros((1, 16, 32, 3), np.uint8))
    assert can_fold(network, wide, data(fit=fit), RESIDENT, CPU) is expected
    assert can_fold(network, images(), data(fit=fit), RESIDENT, CPU)


def test_what_cannot_be_folded() -> None:
    alexnet, files = create_model("alexnet"), ImageSet(np.zeros(0, np.int64), paths=())
    assert not can_fold(create_model("resnet18"), images(), data(), RESIDENT, CPU)
    assert not can_fold(alexnet, files, data(), RESIDENT, CPU)
    assert not can_fold(alexnet, images(), data(), LoaderConfig("torchvision"), CPU)
    assert not can_fold(alexnet, images(), data(), LoaderConfig("resident", fold=False), CPU)
    assert not can_fold(alexnet, images(), data(), RESIDENT, torch.device("cuda"))


@pytest.mark.parametrize(
    "options",
    [
        {"stride": (4, 2)},
        {"padding": (2, 0)},
        {"padding": "same"},
        {"padding": 2, "padding_mode": "reflect"},
        {"dilation": 2},
        {"groups": 3, "out_channels": 6},
        {"bias": False},
    ],
    ids=str,
)
def test_another_convolution_is_refused(options: dict[str, Any]) -> None:
    loader = loader_on(images(), data(), RESIDENT, views=Views.random, batch_size=4, network=Folding())
    batch, _ = next(iter(loader))
    assert isinstance(batch, LazyBatch)
    convolution = torch.nn.Conv2d(**{"in_channels": 3, "out_channels": 4, "kernel_size": 3, **options})
    with pytest.raises(ValueError, match=r"does not compute Conv2d\(.* call materialize\(\) first"):
        batch.convolve(convolution)
