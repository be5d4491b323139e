"""The data sets by name (``data.name``)."""

from __future__ import annotations

from fastalex.config import DataConfig
from fastalex.data.imageset import DataSplits, ImageSet

__all__ = ["DataSplits", "ImageSet", "load_splits"]


def load_splits(config: DataConfig, seed: int, *, progress: bool = True) -> DataSplits:
    """Finds the data set that ``config.name`` names and divides it."""
    raise NotImplementedError
