"""Data sets, and loaders that turn their images into batches."""

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

# The class of each loader, in the module of its name. It is imported when needed: DALI and FFCV are optional.
_LOADERS = {
    "torchvision": "TorchvisionLoader",
    "resident": "ResidentLoader",
    "dali": "DaliLoader",
    "ffcv": "FfcvLoader",
}


def resolve_loader(loader: LoaderConfig, splits: DataSplits, room: int | None) -> LoaderConfig:
    """Replace ``loader.name=auto`` by the name of the fastest loader that can hold the data set.

    That is ``resident`` if the decoded images of all splits fit the device, and ``torchvision`` if they do
    not or if they are files of many sizes.

    Args:
        loader: the loader asked for; returned as it is if its name is not ``auto``.
        splits: the data set.
        room: bytes available for images on the device (:func:`fastalex.training.memory.room_for_images`);
            None for a CPU.
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
        data: geometry of the views (resize, crop, flip), in pixels, and their normalisation.
        loader: name and options of the loader; the name is not ``auto`` (see :func:`resolve_loader`).
        views: ``random`` for training; ``center`` or ``ten_crop`` for evaluation.
        batch_size: images per batch on this rank; with ``ten_crop`` a batch has several views of each image.
        runtime: device, dtype and memory layout of the batches.
        world: number of ranks that share the epoch, and the rank of this process.
        seed: decides order, offsets and flips, together with the epoch.
        network: the network that consumes the batches; it, or with ``runtime.graph=step`` its trainer, gets
            lazy batches if they are faster. None always yields tensors.

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
