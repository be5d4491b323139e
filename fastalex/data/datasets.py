"""The data sets by name (``data.name``)."""

from __future__ import annotations

from dataclasses import replace

from fastalex.config import DataConfig
from fastalex.data.builtin import load_digits, load_synthetic
from fastalex.data.imageset import DataSplits, ImageSet
from fastalex.errors import ConfigError

__all__ = ["DataSplits", "ImageSet", "load_splits"]


def load_splits(config: DataConfig, seed: int, *, progress: bool = True) -> DataSplits:
    """Finds the data set ``config.name`` and divides it into training, validation and test images.

    =================  ====================================================================================
    cifar10            :func:`fastalex.data.cifar.load_cifar10`
    digits, synthetic  :mod:`fastalex.data.builtin`
    imagefolder        :func:`fastalex.data.folders.load_imagefolder`
    tiny_imagenet      :func:`fastalex.data.folders.load_tiny_imagenet`
    =================  ====================================================================================

    Args:
        seed: draws the validation images, in proportion from each class; the test images never depend on it.
        progress: show a bar while files are read for the first time.

    Raises:
        ConfigError: no such data set.
        DataError: files are missing, damaged or too few.
    """
    splits = _load(config, seed, progress)
    return splits if splits.source else replace(splits, source=f"{config.name} at {config.root}")


def _load(config: DataConfig, seed: int, progress: bool) -> DataSplits:
    if config.name == "digits":
        return load_digits(config, seed)
    if config.name == "synthetic":
        return load_synthetic(config)
    if config.name == "cifar10":
        from fastalex.data.cifar import load_cifar10  # torchvision takes seconds to import

        return load_cifar10(config, seed, progress=progress)
    from fastalex.data.folders import load_imagefolder, load_tiny_imagenet

    if config.name == "imagefolder":
        return load_imagefolder(config, seed, progress=progress)
    if config.name == "tiny_imagenet":
        return load_tiny_imagenet(config, seed, progress=progress)
    raise ConfigError(
        f"data.name={config.name} is unknown; "
        "choose one of cifar10, digits, imagefolder, tiny_imagenet, synthetic"
    )
