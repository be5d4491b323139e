"""Data sets (what) and loaders (how)."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module

from torch import nn

from fastalex.config import DataConfig, LoaderConfig
from fastalex.data.datasets import DataSplits, ImageSet, load_splits
from fastalex.data.loader import Loader, Views
from fastalex.data.wrappers import CutMixLoader, StagedLoader
from fastalex.distributed.processes import ALONE, World
from fastalex.errors import ConfigError
from fastalex.runtime import Runtime

__all__ = [
    "CutMixLoader",
    "DataSplits",
    "ImageSet",
    "Loader",
    "StagedLoader",
    "Views",
    "build_loader",
    "load_splits",
    "resolve_loader",
]

# Imported when asked for: DALI and FFCV are optional.
_LOADERS = {
    "torchvision": "TorchvisionLoader",
    "resident": "ResidentLoader",
    "dali": "DaliLoader",
    "ffcv": "FfcvLoader",
}


def resolve_loader(loader: LoaderConfig, splits: DataSplits, room: int | None) -> LoaderConfig:
    """Replace ``loader.name=auto`` by ``resident`` where the decoded images of all splits fit the device.

    Where they do not, or are files of many sizes, it becomes ``torchvision``.

    Args:
        loader: as it was asked for.
        splits: of the data set.
        room: bytes for images on the device (:func:`fastalex.training.memory.room_for_images`); None for
            a CPU.
    """
    if loader.name != "auto":
        return loader
    from fastalex.data.resident import fits

    return replace(loader, name="resident" if fits(splits, room) else "torchvision")


def build_loader(
    images: ImageSet,
    data: DataConfig,
    loader: LoaderConfig,
    *,
    views: Views,
    batch_size: int,
    runtime: Runtime,
    world: World = ALONE,
    seed: int = 0,
    network: nn.Module | None = None,
) -> Loader:
    """Build the loader that ``loader.name`` names; :class:`fastalex.data.loader.Loader` says what it yields.

    Args:
        images: the split to load.
        data: the geometry of the views (resize, crop, flip) and their normalisation.
        loader: its name, not ``auto`` (see :func:`resolve_loader`), and its options.
        views: random for training; center or ten_crop for evaluation.
        batch_size: images a batch, on this rank; with ten_crop a batch has ten views of each.
        runtime: the device, dtype and memory layout of the batches.
        world: the ranks that share the epoch, and this one among them.
        seed: decides order, offsets and flips, together with the epoch.
        network: that the batches are for; one that consumes lazy batches gets them where that is faster.

    Raises:
        ConfigError: no such loader, or a batch larger than the training set.
        DataError: an image cannot be read.
        MissingDependencyError: the loader's package is not installed.
    """
    if loader.name not in _LOADERS:
        raise ConfigError(f"loader.name={loader.name} is unknown; choose one of {', '.join(_LOADERS)}")
    cls = getattr(import_module(f"fastalex.data.{loader.name}"), _LOADERS[loader.name])
    built: Loader = cls(
        images,
        data,
        loader,
        views=views,
        batch_size=batch_size,
        runtime=runtime,
        world=world,
        seed=seed,
        network=network,
    )
    return built
