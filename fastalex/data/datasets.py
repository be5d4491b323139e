"""The data sets by name (``data.name``)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pkgutil import resolve_name

from fastalex.config import DataConfig
from fastalex.data.imageset import DataSplits, ImageSet
from fastalex.data.splits import split
from fastalex.errors import ConfigError

__all__ = ["DataSplits", "ImageSet", "load_splits"]

# The function of each data set. It is imported when it is called, because torchvision takes seconds. Its
# arguments and its result are those of load_splits.
_DATA_SETS = {
    "cifar10": "fastalex.data.cifar:load_cifar10",
    "digits": "fastalex.data.builtin:load_digits",
    "imagefolder": "fastalex.data.folders:load_imagefolder",
    "tiny_imagenet": "fastalex.data.folders:load_tiny_imagenet",
    "synthetic": "fastalex.data.builtin:load_synthetic",
}


def load_splits(config: DataConfig, seed: int, *, progress: bool = True) -> DataSplits:
    """Find the data set ``config.name`` and split it into training, validation and test images.

    Args:
        config: names the data set and the folder of its files.
        seed: draws the validation images and those of ``train_fraction``, in proportion from each class; the
            test images never depend on it.
        progress: show a progress bar while files are read for the first time, and warnings.

    Raises:
        ConfigError: no such data set.
        DataError: files are missing, damaged or too few.
    """
    if config.name not in _DATA_SETS:
        raise ConfigError(f"data.name={config.name} is unknown; choose one of {', '.join(_DATA_SETS)}")
    load: Callable[..., DataSplits] = resolve_name(_DATA_SETS[config.name])
    splits = load(config, seed, progress=progress)
    if config.train_fraction < 1:
        what = f"data.train_fraction={config.train_fraction}"
        train, _ = split(
            splits.train,
            1 - config.train_fraction,
            seed,
            classes=splits.classes,
            what=what,
            use="to leave out",
            key="data.train_fraction",
        )
        splits = replace(splits, train=train)
    return splits if splits.source else replace(splits, source=f"{config.name} at {config.root}")
