"""Data sets (what) and loaders (how)."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module

import torch

from fastalex.config import DataConfig, LoaderConfig
from fastalex.data.cutmix import CutMixLoader
from fastalex.data.datasets import DataSplits, ImageSet, load_splits
from fastalex.data.loader import Loader, Views
from fastalex.data.staged import StagedLoader
from fastalex.errors import ConfigError

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
        room: bytes for images on the device, of :func:`fastalex.memory.room_for_images`; None for a CPU.
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
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    channels_last: bool = True,
    rank: int = 0,
    world_size: int = 1,
    fold: bool = False,
) -> Loader:
    """The loader that ``loader.name`` names: see :class:`fastalex.data.loader.Loader` for what it yields.

    Args:
        images: the split to load.
        data: the geometry of the views (resize, crop, flip) and their normalisation.
        views: random for training; center or ten_crop for evaluation.
        batch_size: images a batch, on this rank; with ten_crop a batch has ten views of each.
        seed: decides order, offsets and flips, together with the epoch.
        device, dtype, channels_last: where and how the batches are to lie.
        rank, world_size: this process among those that share the epoch.
        fold: yield batches unmade, for a network that takes them (resident only; see `fastalex.crops.pays`).

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
        seed=seed,
        device=device,
        dtype=dtype,
        channels_last=channels_last,
        rank=rank,
        world_size=world_size,
        fold=fold,
    )
    return built
