"""The resolution schedule: which loader serves an epoch."""

from __future__ import annotations

import multiprocessing

from fastalex.config import DataConfig, LoaderConfig
from fastalex.data import StagedLoader, Views, load_splits
from tests.runtimes import loader_on


def test_the_crop_grows_and_the_number_of_samples_stays() -> None:
    data = DataConfig(name="synthetic", images=40, resize=80, crop=72)
    images = load_splits(data, 0).train
    loaders = [
        loader_on(
            images,
            DataConfig(name="synthetic", resize=size + 8, crop=size),
            LoaderConfig(name="resident"),
            views=Views.random,
            batch_size=8,
        )
        for size in (32, 48, 72)
    ]
    staged = StagedLoader(loaders, [2, 1])
    crops = []
    for epoch in range(5):
        staged.set_epoch(epoch)
        batches = list(staged)
        assert len(batches) == len(staged)
        assert sum(len(labels) for _, labels in batches) == staged.num_samples
        crops.append({tuple(batch.shape[-2:]) for batch, _ in batches})
    assert crops == [{(32, 32)}, {(32, 32)}, {(48, 48)}, {(72, 72)}, {(72, 72)}]


def test_workers_of_a_passed_stage_end() -> None:
    data = DataConfig(name="synthetic", images=40, resize=80, crop=72)
    images = load_splits(data, 0).train
    workers = LoaderConfig(name="torchvision", workers=1)
    loaders = [loader_on(images, data, workers, views=Views.random, batch_size=8) for _ in range(2)]
    staged = StagedLoader(loaders, [1])
    del loaders
    before = {child.pid for child in multiprocessing.active_children()}
    running = []
    for epoch in range(3):
        staged.set_epoch(epoch)
        assert len(list(staged)) == len(staged)
        running.append({child.pid for child in multiprocessing.active_children()} - before)
    assert [len(each) for each in running] == [1, 1, 1]
    assert running[0] != running[1] == running[2]


def test_an_epoch_can_start_in_its_middle() -> None:
    data = DataConfig(name="synthetic", images=40, resize=80, crop=72)
    loader = loader_on(
        load_splits(data, 0).train, data, LoaderConfig(name="resident"), views=Views.random, batch_size=8
    )
    staged = StagedLoader([loader, loader], [1])
    staged.set_epoch(1)
    whole = [labels.tolist() for _, labels in staged]
    staged.set_epoch(1, start_batch=2)
    assert [labels.tolist() for _, labels in staged] == whole[2:]
